"""The result of a check: a line for each thing that was checked, and the list of what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from src.errors import UserError
from src.ops.toolchain import BuildError
from src.training.console import log

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One thing that was checked, what was found, and what to do about it ('' when all is well)."""

    name: str
    detail: str
    to_do: str = ""


class Checklist:
    """Prints what is found, line by line, and collects what there is to do."""

    def __init__(self) -> None:
        self.to_do: list[str] = []

    def found(self, name: str, detail: str) -> None:
        log(f"{name:>12}  {detail}")

    def take(self, finding: Finding) -> None:
        self.found(finding.name, finding.detail)
        if finding.to_do:
            self.to_do.append(finding.to_do)

    def attempt(self, name: str, question: Callable[[], T]) -> T | None:
        """The answer, or None and its error on the list."""
        try:
            return question()
        except (UserError, OSError, BuildError) as error:
            if str(error) not in self.to_do:
                self.found(name, "see below")
                self.to_do.append(str(error))
            return None

    def result(self) -> int:
        if not self.to_do:
            log("OK: nothing stands in the way of this run")
            return 0
        log("not OK; what to do:")
        for number, advice in enumerate(self.to_do, start=1):
            log(f"  {number}. {advice}")
        return 1

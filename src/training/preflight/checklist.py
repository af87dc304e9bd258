"""The result of a check: one printed line per item, and the list of problems."""

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
    """One item of a check: its name, what is the case, and the problem with its solution ('' when all is well)."""

    name: str
    detail: str
    problem: str = ""


class Checklist:
    """Prints items as they are checked, and collects `problems`."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def report(self, name: str, detail: str) -> None:
        """Print one item. An empty `name` continues the item above."""
        # the width of the names in `settings.summary` and --plan: their lines stand in one column
        log(f"{name:>12}  {detail}")

    def add(self, finding: Finding) -> None:
        self.report(finding.name, finding.detail)
        if finding.problem:
            self.problems.append(finding.problem)

    def attempt(self, name: str, action: Callable[[], T]) -> T | None:
        """The result of `action`; None when it raised an error of the user's or the machine's, which becomes a
        problem."""
        try:
            return action()
        # Only these: they carry a message for the user. Anything else is a defect of this program and needs its
        # traceback.
        except (UserError, OSError, BuildError) as error:
            # The same mistake may fail several items, as weights that are read for the vocabulary and for the model.
            if str(error) not in self.problems:
                self.report(name, "see below")
                self.problems.append(str(error))
            return None

    def conclude(self) -> int:
        """Print the problems. Returns the exit code: 0 without any, else 1."""
        if not self.problems:
            log("OK: no problems found")
            return 0
        log(f"{len(self.problems)} problem{'s' * (len(self.problems) > 1)} found:")
        for number, problem in enumerate(self.problems, start=1):
            log(f"  {number}. {problem}")
        return 1

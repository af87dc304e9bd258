"""`UserError`: a mistake in what the user gave, shown as one sentence and without a traceback."""

from __future__ import annotations

from collections.abc import Sequence

from src.terminal import printable


class UserError(ValueError):
    """A mistake in a flag, a file or the environment, with its parts as fields; `str()` makes the sentence.

    problem   what is wrong, as a clause: "no such file"
    flag      the setting it is about, without its dashes; "" if it is about none
    given     the value, or the path of the file; None if it doesn't matter
    expected  what would have been right: "a multiple of 16"
    advice    what to do: "leave the flag out"

    The sentence is `--flag given: problem; expected ...; advice`, without the parts that are empty, and without control
    characters: names and contents of files are in it.
    """

    def __init__(
        self, problem: str = "", *, flag: str = "", given: object = None, expected: str = "", advice: str = ""
    ) -> None:
        # args hold what the constructor takes by position: pickle, which carries errors between ranks, calls it again.
        super().__init__(problem)
        self.problem, self.flag, self.given, self.expected, self.advice = problem, flag, given, expected, advice

    def __str__(self) -> str:
        subject = []
        if self.flag:
            subject.append(f"--{self.flag}")
        if self.given is not None:
            # An empty value would leave a gap: --proj_dir "": expected a folder for the run
            subject.append('""' if self.given == "" else str(self.given))
        expected = f"expected {self.expected}" if self.expected else ""
        clauses = "; ".join(clause for clause in (self.problem, expected, self.advice) if clause)
        return printable(f"{' '.join(subject)}: {clauses}" if subject else clauses)


class UserErrors(UserError):
    """Several mistakes found together, in `faults`, so that one attempt shows them all."""

    def __init__(self, faults: Sequence[UserError]) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = tuple(faults)
        self.args = (self.faults,)  # for pickle, as above

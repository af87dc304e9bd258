"""An answer as text for a terminal or a file, with its thought marked."""

from __future__ import annotations

from src.inference.answer_stream import REASONING, AnswerPiece
from src.terminal import printable

_DIM, _RESET = "\033[2m", "\033[0m"  # ANSI


class AnswerText:
    """`add(piece)` returns the text to write for a piece, `finish()` that for the end, after Ctrl-C too.

    An answer without a thought is written as it is, a thought and what follows it under the headings `thinking:` and
    `answer:`. With `colors` the thought is dim.
    """

    def __init__(self, colors: bool) -> None:
        self._dim, self._reset = (_DIM, _RESET) if colors else ("", "")
        self._thinking = False

    def add(self, piece: AnswerPiece) -> str:
        heading = ""
        if piece.kind == REASONING and not self._thinking:
            heading = f"{self._dim}thinking:\n"
        elif piece.kind != REASONING and self._thinking:
            heading = f"{self._reset}\n\nanswer:\n"
        self._thinking = piece.kind == REASONING
        return heading + printable(piece.text)

    def finish(self) -> str:
        # What the terminal shows next must not be dim.
        return self._reset if self._thinking else ""

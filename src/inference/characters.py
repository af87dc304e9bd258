"""Tokens to text while they come: never half a character."""

from __future__ import annotations

import codecs

from src.dataset.tokenizer import UNKNOWN, Tokenizer

_LONGEST = 4  # bytes of a UTF-8 character: more tokens than that are never waited for


class CharacterStream:
    """`feed(id)` gives the characters that are complete now, `finish()` the rest.

    All pieces together are the tokenizer's decoding of all ids; bytes that are no UTF-8 become U+FFFD, as there.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._shown: list[
            int
        ] = []  # the last token shown: some tokenizers write a token differently at the start of a text
        self._waiting: list[int] = []

    def feed(self, token: int) -> str:
        self._waiting.append(token)
        before = self._tokenizer.decode_bytes(self._shown)
        now = self._tokenizer.decode_bytes(self._shown + self._waiting)
        if now.endswith(UNKNOWN) and len(self._waiting) < _LONGEST:
            return ""  # a tokenizer that decodes to text may put this for half a character
        self._shown, self._waiting = self._waiting[-1:], []
        return self._utf8.decode(now[len(before) :])

    def finish(self) -> str:
        """What is left: the tokens that were waited with, and U+FFFD for a character that was never completed."""
        before = self._tokenizer.decode_bytes(self._shown)
        rest = self._tokenizer.decode_bytes(self._shown + self._waiting)[len(before) :]
        self._waiting = []
        return self._utf8.decode(rest, final=True)


class UntilText:
    """Passes text on until `end` appears in it: `feed(piece)` gives what is surely before it. An empty `end` never appears."""

    def __init__(self, end: str) -> None:
        self._end, self._held = end, ""
        self.reached = False

    def feed(self, piece: str) -> str:
        if self.reached or not self._end:
            return "" if self.reached else piece
        text = self._held + piece
        before, found, _ = text.partition(self._end)
        if found:
            self.reached, self._held = True, ""
            return before
        held = next(n for n in range(min(len(text), len(self._end) - 1), -1, -1) if text.endswith(self._end[:n]))
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back because `end` might have begun there."""
        held, self._held = self._held, ""
        return held

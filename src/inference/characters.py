"""Decoding of generated tokens to text, piece by piece: whole characters only."""

from __future__ import annotations

import codecs

from src.dataset.tokenizer import UNKNOWN, Tokenizer

# Bytes of the longest UTF-8 character. A character that isn't complete after so many tokens is invalid.
LONGEST_CHARACTER = 4


class CharacterStream:
    """`feed(id)` returns the characters that are complete now, `finish()` the rest.

    Together the pieces are the tokenizer's decoding of all ids; bytes that aren't valid UTF-8 become U+FFFD, as in that
    decoding.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # The last token returned. It is decoded again before the next ones, because some tokenizers decode a token
        # differently (without its leading space) at the start of a text.
        self._context: list[int] = []
        self._pending: list[int] = []

    def feed(self, token: int) -> str:
        """The characters that `token` completes; "" where it ends within one."""
        self._pending.append(token)
        before = self._tokenizer.decode_bytes(self._context)
        now = self._tokenizer.decode_bytes(self._context + self._pending)
        # A tokenizer that decodes to text rather than bytes writes U+FFFD for a character that the next token may
        # complete.
        if now.endswith(UNKNOWN) and len(self._pending) < LONGEST_CHARACTER:
            return ""
        self._context, self._pending = self._pending[-1:], []
        return self._utf8.decode(now[len(before) :])

    def finish(self) -> str:
        """The text of the pending tokens, with U+FFFD for a character that wasn't completed."""
        before = self._tokenizer.decode_bytes(self._context)
        rest = self._tokenizer.decode_bytes(self._context + self._pending)[len(before) :]
        self._pending = []
        return self._utf8.decode(rest, final=True)

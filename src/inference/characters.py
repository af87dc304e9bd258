"""Decoding of generated tokens to text, piece by piece: whole characters only, and nothing after a stop string."""

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


class StopString:
    """Passes text through up to the first occurrence of `stop`; an empty `stop` never occurs.

    `feed(piece)` returns the text that is certain to be before it, `finish()` what was held back as a possible
    beginning of it.
    """

    def __init__(self, stop: str) -> None:
        self._stop, self._held = stop, ""
        self.reached = False

    def feed(self, piece: str) -> str:
        """The text before `stop` that is certain now; "" once it was reached."""
        if self.reached or not self._stop:
            return "" if self.reached else piece
        text = self._held + piece
        before, match, _ = text.partition(self._stop)
        if match:
            self.reached, self._held = True, ""
            return before
        # The longest end of the text that `stop` starts with: the next piece may complete it.
        longest = min(len(text), len(self._stop) - 1)
        held = next(n for n in range(longest, -1, -1) if text.endswith(self._stop[:n]))
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The text held back; there is no more of it."""
        held, self._held = self._held, ""
        return held

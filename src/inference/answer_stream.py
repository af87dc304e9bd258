"""Division of an answer into thought and content while it is generated, up to its end."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

REASONING, CONTENT = "reasoning", "content"
_OPEN, _CLOSE = "<think>", "</think>"
# Parts of an answer that are neither thought nor content: before either has begun, and between the two.
_BEGIN, _BETWEEN = "begin", "between"


class AnswerPiece(NamedTuple):
    """`text` of a `kind`: "reasoning" or "content"."""

    kind: str
    text: str


class AnswerStream:
    """`feed(text)` returns the pieces that are certain now, `finish()` the rest. The tags are in no piece.

    stop_strings   texts that end the answer. One of white space, such as RWKV's blank line, doesn't end it within a
                   thought or directly after it. The one that is complete first counts.
    begun          the beginning of the answer, where the prompt holds it: "<think"
    thoughts       False: all text is content, tags too

    An answer has one thought, with which it begins. The pieces don't depend on how the text is divided.

    text           the answer so far as the model wrote it, with `begun` and the tags
    reached        whether a stop string ended it
    """

    def __init__(self, stop_strings: Collection[str] = (), begun: str = "", thoughts: bool = True) -> None:
        self._stops = tuple(stop for stop in stop_strings if stop)
        self._stops_in_thought = tuple(stop for stop in self._stops if stop.strip())
        self._part, self._has_thought = _BEGIN if thoughts else CONTENT, False
        self._begun, self._held = begun, ""  # text that may be the beginning of a tag or a stop string
        self.text = ""
        self.reached = False

    def feed(self, text: str) -> list[AnswerPiece]:
        """The pieces that are certain to be before a stop string; none once it was reached."""
        if self.reached or not text:
            return []
        self._held, self._begun = self._held + self._begun + text, ""
        return joined(self._advance())

    def finish(self) -> list[AnswerPiece]:
        """The text held back; there is no more of it."""
        if self._begun:  # nothing was generated
            return []
        if self.reached or self._part == _BETWEEN:
            self._take(0 if self.reached else len(self._held))
            return []
        rest = len(self._held)
        return joined([self._thought(rest) if self._part == REASONING else AnswerPiece(CONTENT, self._take(rest))])

    def _advance(self) -> Iterator[AnswerPiece]:
        parts = {_BEGIN: self._begin, REASONING: self._reasoning, _BETWEEN: self._between, CONTENT: self._content}
        part = None
        while part != self._part and not self.reached:  # until no other part has begun
            part = self._part
            yield from parts[part]()

    def _begin(self) -> Iterator[AnswerPiece]:
        word = self._held.lstrip()
        before_and_tag = self._held[: len(self._held) - len(word) + len(_OPEN)]
        if any(stop in before_and_tag for stop in self._stops):
            self._part = CONTENT
        elif word.startswith(_OPEN):
            self._take(len(before_and_tag))
            self._part = REASONING
        elif not _OPEN.startswith(word):
            self._part = CONTENT
        yield from ()

    def _reasoning(self) -> Iterator[AnswerPiece]:
        first = self._first(self._held, (*self._stops_in_thought, _CLOSE))
        if first is not None:
            begin, found = first
            yield self._thought(begin)
            if found == _CLOSE:
                self._take(len(_CLOSE))
                self._part = _BETWEEN
            else:
                self.reached = True
            return
        certain = self._certain(self._held, (*self._stops_in_thought, _CLOSE))
        # White space is not certain either: it is left out at the end of the thought.
        yield self._thought(len(self._held[:certain].rstrip()))

    def _between(self) -> Iterator[AnswerPiece]:
        space = len(self._held) - len(self._held.lstrip())
        first = self._first(self._held, self._stops_in_thought)
        if first is not None and first[0] <= space:
            self._take(first[0])
            self.reached = True
        elif space < len(self._held) and self._certain(self._held, self._stops_in_thought) >= space:
            self._take(space)
            self._part = CONTENT
        yield from ()

    def _content(self) -> Iterator[AnswerPiece]:
        first = self._first(self._held, self._stops)
        if first is not None:
            yield AnswerPiece(CONTENT, self._take(first[0]))
            self.reached = True
            return
        yield AnswerPiece(CONTENT, self._take(self._certain(self._held, self._stops)))

    def _thought(self, length: int) -> AnswerPiece:
        """The next `length` characters, without white space before and after the thought."""
        text = self._take(length).rstrip()
        if not self._has_thought:
            text = text.lstrip()
            self._has_thought = bool(text)
        return AnswerPiece(REASONING, text)

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        self.text += taken
        return taken

    @staticmethod
    def _first(text: str, wanted: tuple[str, ...]) -> tuple[int, str] | None:
        """Where the one of `wanted` that is complete first begins, and which it is; the longest of several."""
        found = [(text.index(each) + len(each), text.index(each), each) for each in wanted if each in text]
        return min(found)[1:] if found else None

    @staticmethod
    def _certain(text: str, wanted: tuple[str, ...]) -> int:
        """The length of `text` without an end that one of `wanted` begins with."""
        longest = min(len(text), max(map(len, wanted), default=1) - 1)
        ends = (n for n in range(longest, 0, -1) if any(w.startswith(text[-n:]) for w in wanted))
        return len(text) - next(ends, 0)


def joined(pieces: Iterator[AnswerPiece] | list[AnswerPiece]) -> list[AnswerPiece]:
    """The pieces that are not empty, those of a kind joined."""
    result: list[AnswerPiece] = []
    for piece in pieces:
        if result and result[-1].kind == piece.kind:
            result[-1] = AnswerPiece(piece.kind, result[-1].text + piece.text)
        elif piece.text:
            result.append(piece)
    return result

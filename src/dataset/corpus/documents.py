"""Documents of text files: the text of each line, or the reason why it has none."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from src.dataset.corpus.text_input import Piece
from src.errors import UserError

# Reasons are noun phrases, which are counted and follow "with": "3 with invalid JSON".
EMPTY_LINE, EMPTY_TEXT = "an empty line", "an empty text"  # skipped without loss of data
INVALID_UTF8, LONE_SURROGATE = "invalid UTF-8", "a lone surrogate"
_EXCERPT_LENGTH = 60  # enough to recognize a line, and fits on a terminal line with its location


class InvalidLine(NamedTuple):
    """A line without a usable document.

    location   "file:line", lines counted from 1
    reason     what is wrong, a noun phrase
    excerpt    the beginning of the line
    """

    location: str
    reason: str
    excerpt: str

    def __str__(self) -> str:
        return f"{self.location}: {self.reason}: {self.excerpt}"


def invalid_line(piece: Piece, index: int, reason: str, content: str | bytes | None) -> InvalidLine:
    """The record for line `index` of `piece`."""
    excerpt = repr(content[:_EXCERPT_LENGTH] if content else content)
    if len(content or "") > _EXCERPT_LENGTH:
        excerpt += "..."
    return InvalidLine(f"{piece.source}:{piece.first_line + index}", reason, excerpt)


def read_lines(piece: Piece) -> Iterator[tuple[int, bytes | str | None]]:
    """(index within the piece, content without the line end) of each line."""
    if isinstance(piece.lines, bytes):
        # Not splitlines: it also splits at \r and \x0b, which would shift the line numbers.
        yield from enumerate(piece.lines.removesuffix(b"\n").split(b"\n"))
    else:
        yield from enumerate(piece.lines)


def parse_json(line: bytes) -> Any:
    """The value of a JSON line. UserError whose `problem` is the reason when there is none."""
    if not line.strip():
        raise UserError(EMPTY_LINE)
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        raise UserError(INVALID_UTF8) from None
    except (ValueError, RecursionError):  # RecursionError: nested about a thousand levels deep
        raise UserError("invalid JSON") from None


def check_encodable(text: str) -> None:
    """UserError with the reason when `text` can't be encoded as UTF-8: JSON may escape half of a surrogate pair."""
    if text.isascii():  # in constant time, and true of most documents
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(LONE_SURROGATE) from None


def _text(line: bytes | str | None, field: str, is_json: bool) -> str:
    """The text of a line. UserError whose `problem` is the reason when there is none."""
    value: Any = line
    if is_json:
        assert isinstance(line, bytes)
        entry = parse_json(line)
        if not isinstance(entry, dict):
            raise UserError("a JSON value that is not an object")
        if field not in entry:
            raise UserError(f"no field {field!r}")
        value = entry[field]
    elif isinstance(line, bytes):
        try:
            value = line.decode().removeprefix("\ufeff")  # the byte order mark of some Windows editors
        except UnicodeDecodeError:
            raise UserError(INVALID_UTF8) from None
    if not isinstance(value, str):
        raise UserError("a text that is not a string")
    if not value:
        raise UserError(EMPTY_TEXT)
    check_encodable(value)
    return value


def read_documents(piece: Piece, field: str) -> Iterator[tuple[int, str | InvalidLine]]:
    """(index within the piece, text or InvalidLine) of every line; no line is skipped silently."""
    is_json = isinstance(piece.lines, bytes)
    for index, line in read_lines(piece):
        try:
            yield index, _text(line, field, is_json)
        except UserError as error:
            yield index, invalid_line(piece, index, error.problem, line)

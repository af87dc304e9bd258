"""From lines to documents: the text of each, or what is wrong with the line."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from src.dataset.text_input import Piece
from src.errors import UserError

EMPTY_LINE, EMPTY_TEXT = "an empty line", "an empty text"  # the reasons of lines with which nothing is lost


class Broken(NamedTuple):
    """A line that gives no document: `place` is "file:line", `reason` what it has or lacks, `excerpt` how the line begins."""

    place: str
    reason: str
    excerpt: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}: {self.excerpt}"


def broken(piece: Piece, index: int, reason: str, content: str | bytes | None) -> Broken:
    """The complaint about line `index` of `piece`."""
    start = repr(content[:60] if content else content)
    return Broken(
        f"{piece.source}:{piece.first_line + index}", reason, start + ("..." if len(content or "") > 60 else "")
    )


def read_lines(piece: Piece) -> Iterator[tuple[int, bytes | str | None]]:
    """The lines of a piece with their indices in it; the line ends are off."""
    if isinstance(piece.lines, bytes):
        yield from enumerate(piece.lines.removesuffix(b"\n").split(b"\n"))
    else:
        yield from enumerate(piece.lines)


def read_json(line: bytes) -> Any:
    """The value of a JSON line, or a ValueError whose text is the reason."""
    if not line.strip():
        raise UserError(EMPTY_LINE)
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        raise UserError("bytes that are no UTF-8") from None
    except (ValueError, RecursionError):  # the latter: nested a thousand deep
        raise UserError("no JSON") from None


def _text(line: bytes | str | None, field: str, is_json: bool) -> str:
    value: Any = line
    if is_json:
        assert isinstance(line, bytes)
        entry = read_json(line)
        if not isinstance(entry, dict):
            raise UserError("no JSON object")
        if field not in entry:
            raise UserError(f"no field {field!r}")
        value = entry[field]
    elif isinstance(line, bytes):
        try:
            value = line.decode().removeprefix("\ufeff")
        except UnicodeDecodeError:
            raise UserError("bytes that are no UTF-8") from None
    if not isinstance(value, str):
        raise UserError("a text that is no string")
    if not value:
        raise UserError(EMPTY_TEXT)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError("half of a surrogate pair") from None
    return value


def read_documents(piece: Piece, field: str) -> Iterator[tuple[int, str | Broken]]:
    """(index within the piece, text or what is wrong) of every line; none is left out."""
    is_json = isinstance(piece.lines, bytes)
    for index, line in read_lines(piece):
        try:
            yield index, _text(line, field, is_json)
        except ValueError as error:
            yield index, broken(piece, index, str(error), line)

"""Files of conversations as pieces of JSON lines.

.jsonl, .json (also .gz, .zst)   one JSON value per line, or one JSON array of all conversations
.parquet                         one row per conversation, its columns the fields
"""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.dataset.conversation_formats import ANSWERS, TURN_LISTS
from src.dataset.corpus import text_input
from src.dataset.corpus.text_input import JSON_LINES, Piece, read_pieces
from src.dataset.parquet import read_batches
from src.errors import UserError

if TYPE_CHECKING:
    import pyarrow

ENDINGS = (*JSON_LINES, ".json", ".json.gz", ".json.zst", ".parquet")


def check_conversation_file(path: str) -> None:
    """UserError for a file that is missing or of an unknown kind."""
    if not path.lower().endswith(ENDINGS):
        raise UserError(
            "unknown kind of file for conversations", flag="data_file", given=path, expected=", ".join(ENDINGS)
        )
    if not Path(path).is_file():
        raise UserError("no such file", flag="data_file", given=path)


def read_conversation_pieces(path: str) -> Iterator[Piece]:
    """All conversations of a file as JSON lines in order; the lines of an array or a table are counted by element.

    UserError for a damaged file.
    """
    if path.lower().endswith(".parquet"):
        yield from _read_parquet(path)
        return
    pieces = read_pieces([path], "conversations")
    first = _with_content(pieces)
    if first is None:
        return
    assert isinstance(first.lines, bytes)
    pieces = chain([first], pieces)
    yield from _read_array(path, pieces) if _begins_array(first.lines) else pieces


def _with_content(pieces: Iterator[Piece]) -> Piece | None:
    """The first piece; those without any content, before the first with content, are joined to it."""
    first: Piece | None = None
    joined: list[bytes] = []
    for piece in pieces:
        assert isinstance(piece.lines, bytes)
        joined.append(piece.lines)
        first = (first or piece)._replace(end=piece.end)
        # Blank lines and brackets don't tell yet what the file is.
        if piece.lines.translate(None, b" \t\r\n[]"):
            break
    return first and first._replace(lines=b"".join(joined))


def _begins_array(content: bytes) -> bool:
    """Whether a file is one or more JSON arrays of conversations, rather than lines that are arrays of turns."""
    # Invalid UTF-8 is reported where the file is read.
    text = content.decode(errors="replace").strip()
    while text[:1] == "[":
        inside = text[1:].lstrip()
        if inside[:1] == "]":  # an empty array shows nothing: what follows it decides
            text = inside[1:].lstrip()
            if not text:
                return True
            continue
        # An array of other things can only be a damaged line.
        if inside[:1] not in ("{", "[", ""):
            return False
        try:
            first, end = json.JSONDecoder().raw_decode(inside)
        except (ValueError, RecursionError):
            return True
        # A line break before the end of the first element: the array extends over lines.
        return "\n" in text[: len(text) - len(inside) + end] or not _is_turn(first)
    return False


def _is_turn(value: Any) -> bool:
    """Whether an element of an array is a turn, which may lack a role, rather than a conversation."""
    # A conversation may have a field of such a name too, as a "value" beside a prompt and a response.
    return (
        isinstance(value, dict)
        and not value.keys().isdisjoint(("role", "from", "content", "value"))
        and value.keys().isdisjoint((*TURN_LISTS, *ANSWERS))
    )


def _read_array(path: str, pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The elements of a JSON array, each as a line. UserError for an array that is damaged or truncated."""
    decoder = json.JSONDecoder()
    lines: list[bytes] = []
    buffer, ordinal, size, end = b"", 0, 0, 0
    is_open = False  # whether the position is between the brackets of an array
    tried = 0

    def piece() -> Piece:
        return Piece(path, ordinal - len(lines) + 1, ordinal - len(lines), b"\n".join(lines) + b"\n", end)

    for part in chain(pieces, [None]):
        if part is not None:
            assert isinstance(part.lines, bytes)
            buffer, end = buffer + part.lines, part.end
            # Tried again only after it has doubled: otherwise an element of many pieces takes quadratic time.
            if len(buffer) < 2 * tried:
                continue
        # Pieces end at line ends, so never within a character.
        try:
            text = buffer.decode()
        except UnicodeDecodeError as error:
            raise _damaged(path, ordinal, "invalid UTF-8") from error
        position = 0
        while (position := _skip_space(text, position)) < len(text):
            if not is_open:
                # Several arrays may follow each other, as `cat` writes them.
                if text[position] != "[":
                    raise _damaged(path, ordinal, "text after the end of the array")
                is_open, position = True, position + 1
            elif text[position] == "]":
                is_open, position = False, position + 1
            elif text[position] == ",":
                position += 1
            else:
                try:
                    _, stop = decoder.raw_decode(text, position)
                except (ValueError, RecursionError) as error:
                    if part is not None:  # the rest of the element may follow
                        break
                    # Not one unusable line: an unknown number of conversations would be lost.
                    raise _damaged(path, ordinal, "invalid JSON") from error
                # A line break within an element is white space between its parts: strings can't contain one.
                lines.append(text[position:stop].encode().replace(b"\n", b" ").replace(b"\r", b" "))
                ordinal, size, position = ordinal + 1, size + stop - position, stop
                if size >= text_input.PIECE_BYTES:
                    yield piece()
                    lines, size = [], 0
        buffer = text[position:].encode()
        tried = len(buffer)
    if is_open:
        raise _damaged(path, ordinal, "no closing bracket")
    if lines:
        yield piece()


def _damaged(path: str, ordinal: int, problem: str) -> UserError:
    return UserError(f"not a readable JSON array: {problem} after conversation {ordinal}", flag="data_file", given=path)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _read_parquet(path: str) -> Iterator[Piece]:
    done = 0
    for batch, n_bytes in read_batches(path, lambda schema: schema.names, "data_file"):
        names = batch.schema.names
        columns = [_values(path, name, column) for name, column in zip(names, batch.columns, strict=True)]
        lines = b"".join(_json_line(dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True))
        yield Piece(path, done + 1, done, lines, n_bytes)
        done += len(batch)


def _values(path: str, name: str, column: "pyarrow.Array") -> list[Any]:
    """The values of a column. UserError for those that Python can't represent, such as invalid UTF-8."""
    try:
        wanted = _times_as_text(column.type)
        values: list[Any] = (column if wanted == column.type else column.cast(wanted)).to_pylist()
        return values
    except (ValueError, OverflowError) as error:
        raise UserError(f"unreadable values in the column {name!r} ({error})", flag="data_file", given=path) from error


def _times_as_text(column_type: "pyarrow.DataType") -> "pyarrow.DataType":
    """A type with texts in place of times, which Python has neither in nanoseconds nor beyond the year 9999."""
    import pyarrow
    from pyarrow import types

    def of_field(field: "pyarrow.Field") -> "pyarrow.Field":
        return field.with_type(_times_as_text(field.type))

    # Nested ones too: the turns of some sets have a time each.
    if types.is_struct(column_type):
        return pyarrow.struct([of_field(column_type.field(i)) for i in range(column_type.num_fields)])
    if types.is_list(column_type):
        return pyarrow.list_(of_field(column_type.value_field))
    if types.is_large_list(column_type):
        return pyarrow.large_list(of_field(column_type.value_field))
    if types.is_dictionary(column_type):
        return pyarrow.string() if types.is_temporal(column_type.value_type) else column_type
    # Arrow can't write intervals as text, but Python has no limit for them.
    return pyarrow.string() if types.is_temporal(column_type) and not types.is_interval(column_type) else column_type


def _json_line(row: dict[str, Any]) -> bytes:
    # `str` for bytes and other types that JSON lacks: they are columns beside the conversation.
    return json.dumps(row, ensure_ascii=True, default=str).encode() + b"\n"

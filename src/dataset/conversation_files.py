"""Files of conversations as pieces of JSON lines.

.jsonl, .json (also .gz, .zst)   one JSON value per line, or one JSON array of all conversations
.parquet                         one row per conversation, its columns the fields
"""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from src.dataset.corpus import text_input
from src.dataset.corpus.text_input import JSON_LINES, Piece, read_pieces
from src.errors import UserError

ENDINGS = (*JSON_LINES, ".json", ".json.gz", ".json.zst", ".parquet")
_PARQUET_ROWS = 512  # per piece: some megabytes with conversations of the usual length


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
    first = next(pieces, None)
    if first is None:
        return
    assert isinstance(first.lines, bytes)
    pieces = chain([first], pieces)
    yield from _read_array(path, pieces) if _begins_array(first.lines) else pieces


def _begins_array(content: bytes) -> bool:
    """Whether a file is one JSON array, rather than lines that are arrays of turns."""
    content = content.lstrip()
    # An array of other things can only be a damaged line.
    if content[:1] != b"[" or content[1:].lstrip()[:1] not in (b"{", b"[", b"]", b""):
        return False
    line, _, rest = content.partition(b"\n")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return True
    # A first line that is complete: an array in a single line, or turns (of one conversation) in the first of many.
    is_turn = bool(value) and isinstance(value[0], dict) and not value[0].keys().isdisjoint(("role", "from"))
    return not is_turn and not rest.strip()


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
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "reading .parquet needs the package pyarrow", flag="data_file", given=path, advice="pip install pyarrow"
        ) from error
    size = Path(path).stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows, done = max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                lines = b"".join(_json_line(row) for row in batch.to_pylist())
                # The bytes read are estimated from the rows: pyarrow doesn't expose a file position.
                yield Piece(path, done + 1, done, lines, size * (done + len(batch)) // rows)
                done += len(batch)
    except pyarrow.ArrowException as error:
        raise UserError(f"not a readable Parquet file ({error})", flag="data_file", given=path) from error


def _json_line(row: dict[str, Any]) -> bytes:
    # `str` for times, bytes and other types that JSON lacks: they are columns beside the conversation.
    return json.dumps(row, ensure_ascii=True, default=str).encode() + b"\n"

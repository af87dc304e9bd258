"""Text files of any size as a stream of pieces that fit into memory.

.jsonl .jsonl.gz .jsonl.zst, and - for standard input    one JSON object a line
.parquet                                                 one row a document
.txt                                                     the whole file is one document
"""

from __future__ import annotations

import gzip
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from src.dataset.parquet import read_batches
from src.errors import UserError

if TYPE_CHECKING:
    import pyarrow

PIECE_BYTES = 1 << 20  # some 250,000 tokens: tenths of a second of work for a worker, which hides the cost of sending
# Of a line of a compressed file or of standard input, whose size bounds nothing: 14 MB may be a line of 3 GB. A book
# has a few MB; reading a line takes some six times its memory.
MAX_LINE_BYTES = 1 << 28
# Of zstd, at a time: it may be 32,000 times as much text.
COMPRESSED_BYTES = 1 << 10
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
ENDINGS = (*JSON_LINES, ".parquet", ".txt")
STDIN = "-"


class Piece(NamedTuple):
    """Consecutive lines of one source.

    source       path, or "-"
    first_line   number of the first line within the source, from 1
    ordinal      number of the first line over all sources, from 0
    lines        JSON lines as one bytes object, or a list of texts (None: not a string)
    end          bytes of input read so far over all sources; compressed bytes of compressed files
    """

    source: str
    first_line: int
    ordinal: int
    lines: bytes | list[str | bytes | None]
    end: int


def check_inputs(paths: Sequence[str]) -> int:
    """Size of the inputs in bytes, 0 when unknown. UserError for a folder, a missing file or an unknown kind."""
    total = 0
    for path in paths:
        if path == STDIN:  # nothing to check, and the total is unknown
            return 0
        # Before the ending, which a folder may have too: `x.parquet/` is how Spark writes one table.
        if Path(path).is_dir():
            raise UserError("is a folder", given=path, advice=_advice_for_folder(Path(path)))
        if not path.lower().endswith(ENDINGS):
            raise UserError(
                "unknown kind of file",
                given=path,
                expected=f"a name that ends in {' '.join(ENDINGS)}, or - for JSON lines from standard input",
            )
        if not Path(path).is_file():
            raise UserError("no such file", given=path)
        total += Path(path).stat().st_size
    return total


def _advice_for_folder(folder: Path) -> str:
    """How to name the files in `folder` on a command line: by the ending that most of them have."""
    names = [path.name.lower() for path in folder.iterdir() if path.is_file()]
    # Longest ending first, so that x.jsonl.gz is not taken for another kind.
    by_length = sorted(ENDINGS, key=len, reverse=True)
    counts = Counter(ending for name in names if (ending := next(filter(name.endswith, by_length), None)))
    if not counts:
        return f"name files that end in {' '.join(ENDINGS)}; this folder has none"
    return f"name its files, for example {folder}/*{counts.most_common(1)[0][0]}"


def read_pieces(paths: Sequence[str], field: str) -> Iterator[Piece]:
    """All lines of all inputs in order.

    UserError for a damaged file, and for a Parquet file without a column `field` or with one that is no text.
    """
    ordinal = finished = 0
    for path in paths:
        first_line = 1
        for lines, count, end in _read_one(path, field):
            yield Piece(path, first_line, ordinal, lines, finished + end)
            first_line += count
            ordinal += count
        # By file size rather than by the last `end`, which may stop before trailing bytes of a compressed file.
        finished += 0 if path == STDIN else Path(path).stat().st_size


_Part = tuple[bytes | list[str | bytes | None], int, int]  # lines, number of lines, bytes read of this source


def _read_one(path: str, field: str) -> Iterator[_Part]:
    if path == STDIN:
        stdin = sys.stdin.buffer
        yield from _split_lines(iter(lambda: stdin.read(PIECE_BYTES), b""), stdin, path, MAX_LINE_BYTES)
    elif path.lower().endswith(".parquet"):
        yield from _read_parquet(path, field)
    elif path.lower().endswith(".txt"):
        content = Path(path).read_bytes()
        yield [content], 1, len(content)
    else:
        with open(path, "rb") as raw:
            is_compressed = path.lower().endswith((".gz", ".zst"))
            yield from _split_lines(_blocks(raw, path), raw, path, MAX_LINE_BYTES if is_compressed else None)


def _blocks(raw: IO[bytes], path: str) -> Iterator[bytes]:
    """The decompressed content. UserError where a compressed file turns out to be truncated or damaged."""
    if not path.lower().endswith((".gz", ".zst")):
        yield from iter(lambda: raw.read(PIECE_BYTES), b"")
        return
    content, damage_errors = _zstd(raw, path) if path.lower().endswith(".zst") else _gzip(raw)
    try:
        yield from content
    except damage_errors as error:
        raise UserError(f"damaged or truncated ({error})", given=path) from error


_Decompressed = tuple[Iterator[bytes], tuple[type[Exception], ...]]  # the content; exceptions that mean damage


def _gzip(raw: IO[bytes]) -> _Decompressed:
    file = gzip.GzipFile(fileobj=raw)
    return iter(lambda: file.read(PIECE_BYTES), b""), (EOFError, gzip.BadGzipFile, zlib.error)


def _zstd(raw: IO[bytes], path: str) -> _Decompressed:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(
            "reading .zst needs the package zstandard", given=path, advice="pip install zstandard"
        ) from error

    def decompress() -> Iterator[bytes]:
        # Frame by frame, because the package's stream reader doesn't report a truncated file.
        frame = None
        parts: list[bytes] = []
        size = 0
        while data := raw.read(COMPRESSED_BYTES):
            while data:  # several frames may follow each other, as pzstd and `cat` write them
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                parts.append(frame.decompress(data))
                size += len(parts[-1])
                data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
                if size >= PIECE_BYTES:
                    yield b"".join(parts)
                    parts, size = [], 0
        yield b"".join(parts)
        if frame is not None:
            raise EOFError("the last frame is incomplete")

    return decompress(), (EOFError, zstandard.ZstdError)


def _split_lines(blocks: Iterator[bytes], raw: IO[bytes], path: str, limit: int | None) -> Iterator[_Part]:
    """Pieces that end at line ends; a line longer than a piece is not divided. A leading byte order mark is removed.

    UserError for a line of more than `limit` bytes.
    """
    position = raw.tell if raw.seekable() else lambda: 0  # a pipe has no position
    rest: list[bytes] = []
    first = True
    count, length = 0, 0  # of the lines before, of `rest`
    for data in blocks:
        if first and data:
            data, first = data.removeprefix(b"\xef\xbb\xbf"), False
        # Undivided lines are collected in a list: joining them each time would be quadratic for a huge line.
        cut = data.rfind(b"\n") + 1
        if cut:
            lines = b"".join([*rest, data[:cut]])
            rest, length = [], 0
            n_lines = lines.count(b"\n")
            yield lines, n_lines, position()
            count += n_lines
        if cut < len(data):
            rest.append(data[cut:])
            length += len(data) - cut
            if limit is not None and length > limit:
                raise UserError(
                    f"line {count + 1} has more than {limit >> 20} MiB",
                    given=path,
                    expected="one document or conversation a line",
                    advice="decompress the file first if it is what it should be",
                )
    if rest:
        yield b"".join(rest), 1, position()


def _read_parquet(path: str, field: str) -> Iterator[_Part]:
    def text_column(schema: pyarrow.Schema) -> list[str]:
        if field not in schema.names:
            raise UserError(
                f"no column {field!r}; the columns are {schema.names}",
                given=path,
                advice="name the text column with --field",
            )
        column_type = schema.field(field).type
        if not _is_text(column_type):
            texts = [column.name for column in schema if _is_text(column.type)]
            raise UserError(
                f"the column {field!r} has the type {column_type}, not text",
                given=path,
                advice=f"name a text column with --field; it has {texts}" if texts else "it has no text column",
            )
        return [field]

    for batch, n_bytes in read_batches(path, text_column):
        yield batch.column(0).to_pylist(), len(batch), n_bytes


def _is_text(column_type: pyarrow.DataType) -> bool:
    """Whether a column of this type holds strings, or bytes, which are decoded as UTF-8."""
    import pyarrow

    if isinstance(column_type, pyarrow.BaseExtensionType):
        return _is_text(column_type.storage_type)
    if pyarrow.types.is_dictionary(column_type):  # how pandas stores categories
        return _is_text(column_type.value_type)
    # By name, because older versions of pyarrow have no functions for the views. A column of nulls has no other type.
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
    return str(column_type) in names or pyarrow.types.is_fixed_size_binary(column_type)

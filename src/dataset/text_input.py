"""Text files as a stream of pieces, each small enough to hold: what make_data reads, whatever the size.

.jsonl .jsonl.gz .jsonl.zst, and - for standard input    one JSON object a line
.parquet                                                 one row a document
.txt                                                     the whole file is one document
"""

import gzip
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from src.errors import UserError

PIECE_BYTES = 1 << 20  # a quarter of a million tokens: some tenths of a second of work
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
ENDINGS = (*JSON_LINES, ".parquet", ".txt")
STDIN = "-"


class Piece(NamedTuple):
    """Some lines, rows or files in a row. `lines` is JSON lines undivided, or a list of texts (None: no string)."""

    source: str
    first_line: int  # counted from 1 within the source
    ordinal: int  # of the first line, counted from 0 over all sources
    lines: bytes | list[str | bytes | None]
    end: int  # bytes of the input read so far, over all sources, compressed where they are


def check_inputs(paths: Sequence[str]) -> int:
    """The inputs' size in bytes, 0 when unknown. ValueError for a file that is missing or of no known kind."""
    total = 0
    for path in paths:
        if path == STDIN:
            return 0
        if not path.lower().endswith(ENDINGS):
            raise UserError(f"{path}: the name must end in {' '.join(ENDINGS)}, or be - for JSON lines from stdin.")
        if not Path(path).is_file():
            raise UserError(f"{path} does not exist.")
        total += Path(path).stat().st_size
    return total


def read_pieces(paths: Sequence[str], field: str) -> Iterator[Piece]:
    """All lines of all inputs in order. ValueError for a file that can't be unpacked or a Parquet without `field`."""
    ordinal = finished = 0
    for path in paths:
        first_line = 1
        for lines, count, end in _read_one(path, field):
            yield Piece(path, first_line, ordinal, lines, finished + end)
            first_line += count
            ordinal += count
        finished += 0 if path == STDIN else Path(path).stat().st_size


_Part = tuple[bytes | list[str | bytes | None], int, int]  # lines, how many, bytes read of this source


def _read_one(path: str, field: str) -> Iterator[_Part]:
    if path == STDIN:
        stdin = sys.stdin.buffer
        yield from _split_lines(iter(lambda: stdin.read(PIECE_BYTES), b""), stdin)
    elif path.lower().endswith(".parquet"):
        yield from _read_parquet(path, field)
    elif path.lower().endswith(".txt"):
        content = Path(path).read_bytes()
        yield [content], 1, len(content)
    else:
        with open(path, "rb") as raw:
            yield from _split_lines(_blocks(raw, path), raw)


def _blocks(raw: IO[bytes], path: str) -> Iterator[bytes]:
    """The unpacked content. A packed file that is cut or damaged is a ValueError when it comes to that."""
    if not path.lower().endswith((".gz", ".zst")):
        yield from iter(lambda: raw.read(PIECE_BYTES), b"")
        return
    unpack, damaged = _zstd(raw, path) if path.lower().endswith(".zst") else _gzip(raw)
    try:
        yield from unpack
    except damaged as error:
        raise UserError(f"{path} is damaged or cut: {error}") from error


_Unpacking = tuple[Iterator[bytes], tuple[type[Exception], ...]]  # the content, and the errors of damage


def _gzip(raw: IO[bytes]) -> _Unpacking:
    file = gzip.GzipFile(fileobj=raw)
    return iter(lambda: file.read(PIECE_BYTES), b""), (EOFError, gzip.BadGzipFile, zlib.error)


def _zstd(raw: IO[bytes], path: str) -> _Unpacking:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path}: reading .zst needs the package zstandard: pip install zstandard") from error

    def unpack() -> Iterator[bytes]:  # by hand, because the package's stream reader takes a cut file for a whole one
        frame = None
        while data := raw.read(PIECE_BYTES // 4):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(data)
                data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        if frame is not None:
            raise EOFError("the last frame is not complete")

    return unpack(), (EOFError, zstandard.ZstdError)


def _split_lines(blocks: Iterator[bytes], raw: IO[bytes]) -> Iterator[_Part]:
    """Pieces that end at line ends; a line longer than a piece stays whole. A byte order mark is no part of a line."""
    read = raw.tell if raw.seekable() else lambda: 0
    rest: list[bytes] = []
    first = True
    for data in blocks:
        if first and data:
            data, first = data.removeprefix(b"\xef\xbb\xbf"), False
        cut = data.rfind(b"\n") + 1
        if cut:
            lines = b"".join([*rest, data[:cut]])
            rest = []
            yield lines, lines.count(b"\n"), read()
        if cut < len(data):
            rest.append(data[cut:])
    if rest:
        yield b"".join(rest), 1, read()


def _read_parquet(path: str, field: str) -> Iterator[_Part]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading .parquet needs the package pyarrow: pip install pyarrow") from error
    size = Path(path).stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise UserError(f"{path} has no column {field!r}, it has {file.schema_arrow.names}: use --field.")
            rows, done = max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(batch_size=512, columns=[field]):
                done += len(batch)
                yield batch.column(0).to_pylist(), len(batch), size * done // rows
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} can't be read as Parquet: {error}") from error

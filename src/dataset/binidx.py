"""Megatron's indexed dataset, version 1: a pair of files that holds documents as a flat run of token ids.

    X.bin   the tokens of all items, one after another
    X.idx   "MMIDIDX\\0\\0", u64 version = 1, u8 dtype code, u64 items, u64 document bounds,
            i32 sizes [items], i64 byte pointers [items], i64 document bounds [documents + 1]

All little-endian. An item is a document here; files that keep several items per document are read as well.
"""

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from src.errors import UserError
from src.files import atomic_write

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_INTEGERS = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_FLOATS = {6: "float64", 7: "float32"}
_CODES = {np.dtype(kind): code for code, kind in _INTEGERS.items()}
_ITEMS_AT_ONCE = 1 << 20  # bounds the memory for index arrays to some MB, however many items there are


def file_prefix(path: str | os.PathLike[str]) -> Path:
    """`X` for `X`, `X.bin` and `X.idx`."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def with_ending(prefix: Path, ending: str) -> Path:
    """`X.bin` for (`X`, ".bin"); a dot in X's own name stays, unlike with `Path.with_suffix`."""
    return prefix.with_name(prefix.name + ending)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every id of a vocabulary: u16 up to 65536 entries (id 65535 included), else i32."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.int32)


class MMapIndexedDataset:
    """Read access to `X.bin` / `X.idx` through the page cache; files larger than memory are fine.

    `path` is X, X.bin or X.idx. Everything that can be checked is checked here, once: a missing, cut, foreign or
    mismatched pair is a ValueError that names the file and what to do.

        .tokens   all tokens, one flat array       .sizes    int32 [items]
        .dtype    their integer type               .doc_idx  int64 [documents + 1], in items
        .n_tokens                                  len(), [i]  items
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.prefix = file_prefix(path)
        self.bin_path, self.idx_path = with_ending(self.prefix, ".bin"), with_ending(self.prefix, ".idx")
        if self.prefix.is_file() and not self.bin_path.exists() and not self.idx_path.exists():
            raise UserError(
                f"{path} is no token data: data/make_data.py makes X.bin and X.idx from texts (jsonl, txt, parquet); a jsonl of conversations "
                "is read as it is, with --data_type sft"
            )
        for file in (self.bin_path, self.idx_path):
            if not file.is_file():
                raise UserError(
                    f"{file} does not exist; a dataset is the two files X.bin and X.idx, given as X (--data_file, --val_data_file, --data)."
                )
        self.dtype, n_items, n_bounds = self._read_header()
        start = _HEADER.size
        self.sizes = _map(self.idx_path, np.int32, start, n_items)
        self._pointers = _map(self.idx_path, np.int64, start + 4 * n_items, n_items)
        self.doc_idx = _map(self.idx_path, np.int64, start + 12 * n_items, n_bounds)
        self.n_tokens = self._check_layout()
        self.tokens = _map(self.bin_path, self.dtype, 0, self.n_tokens)

    def _read_header(self) -> tuple[np.dtype[Any], int, int]:
        length = self.idx_path.stat().st_size
        with self.idx_path.open("rb") as file:
            header = file.read(_HEADER.size)
        if not header.startswith(_MAGIC):
            raise self._fault("it does not begin with MMIDIDX, so it is no index of this kind")
        if len(header) < _HEADER.size:
            raise self._fault(f"it is cut within its header, {length} bytes long")
        _, version, code, n_items, n_bounds = _HEADER.unpack(header)
        if version != 1:
            raise self._fault(f"its version is {version}, this program reads version 1")
        if code in _FLOATS:
            raise self._fault(f"it holds {_FLOATS[code]} numbers, tokens must be integers")
        if code not in _INTEGERS:
            raise self._fault(f"its number type has the unknown code {code}")
        expected = _HEADER.size + 12 * n_items + 8 * n_bounds
        if length != expected:
            raise self._fault(f"it is {length} bytes long and by its header should be {expected}")
        return np.dtype(_INTEGERS[code]).newbyteorder("<"), n_items, n_bounds

    def _check_layout(self) -> int:
        """The number of tokens, once it is sure that items follow each other without gaps and end where .bin ends."""
        end = 0  # bytes
        for start in range(0, len(self.sizes), _ITEMS_AT_ONCE):
            n_bytes = self.sizes[start : start + _ITEMS_AT_ONCE].astype(np.int64) * self.dtype.itemsize
            if n_bytes.min() < 0:
                raise self._fault(f"item {start + int(n_bytes.argmin())} has a negative size")
            ends = end + np.cumsum(n_bytes)
            astray = np.flatnonzero(self._pointers[start : start + len(n_bytes)] != ends - n_bytes)
            if len(astray):
                raise self._fault(f"item {start + int(astray[0])} does not begin where the one before it ends")
            end = int(ends[-1])
        n_bounds = len(self.doc_idx)
        if n_bounds == 0 or self.doc_idx[0] != 0 or self.doc_idx[-1] != len(self.sizes):
            raise self._fault("its document bounds do not run from the first to the last item")
        for start in range(0, n_bounds - 1, _ITEMS_AT_ONCE):
            if (np.diff(self.doc_idx[start : start + _ITEMS_AT_ONCE + 1]) < 0).any():
                raise self._fault("its document bounds do not ascend")
        length = self.bin_path.stat().st_size
        if length != end:
            what = "cut short or of another dataset" if length < end else "of another dataset"
            raise UserError(
                f"{self.bin_path} is {length} bytes long and by {self.idx_path.name} should be {end}: one of the two "
                f"files is {what}. Copy or make both again."
            )
        return end // self.dtype.itemsize

    def _fault(self, what: str) -> ValueError:
        return ValueError(f"{self.idx_path} can't be used: {what}. Copy or make the dataset again (data/make_data.py).")

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, item: int) -> npt.NDArray[Any]:
        """Token ids of one item, a read-only view."""
        start = int(self._pointers[item]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sizes[item])]

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        # A pickled memmap would carry the whole file to every loader process.
        return type(self), (self.prefix,)


def _map(path: Path, dtype: npt.DTypeLike, offset: int, length: int) -> npt.NDArray[Any]:
    if length == 0:  # an empty range can't be mapped
        return np.empty(0, dtype)
    mapped = np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r", offset, (length,))
    return mapped.view(np.ndarray)  # the same pages without memmap's cost at every slice


class BinIdxWriter:
    """Writes `X.bin` / `X.idx`, documents one after another; the pair appears under its name only when whole.

        with BinIdxWriter("data/x", np.uint16) as out:
            out.add_document([17, 4, 0])

    Until then it is `X.bin.part`; an error inside the block removes it. Document ends (token 0) are
    the caller's. An earlier pair of the name stays until the new one is complete: its index is taken away first, and
    the new index comes last, so that no moment shows a pair that doesn't fit.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike) -> None:
        self.prefix = file_prefix(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in _CODES:
            raise UserError(f"{self.dtype} is no token type; use one of {', '.join(map(str, _CODES))}.")
        self.n_tokens = 0
        self.n_documents = 0
        self._bin_part = with_ending(self.prefix, ".bin.part")
        self._sizes_part = with_ending(self.prefix, ".sizes.part")

    def __enter__(self) -> "BinIdxWriter":
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin: BinaryIO = self._bin_part.open("wb")
        self._sizes: BinaryIO = self._sizes_part.open("wb")  # on disk: a hundred million documents are no list
        return self

    def add_document(self, ids: Sequence[int] | npt.NDArray[Any]) -> None:
        """Appends one document. ValueError when an id doesn't fit the file's type."""
        given = np.asarray(ids, dtype=None if len(ids) else self.dtype)
        tokens = given.astype(self.dtype.newbyteorder("<"), copy=False)
        if not np.array_equal(given, tokens):
            span = f"{given.min()} to {given.max()}"
            raise UserError(f"document {self.n_documents}: its ids, {span}, do not fit {self.dtype}.")
        self.add_bytes(tokens.tobytes(), np.array([len(tokens)]))

    def add_bytes(self, tokens: bytes, sizes: npt.NDArray[Any]) -> None:
        """Appends several documents at once: their little-endian tokens, joined, and their lengths."""
        assert len(tokens) == int(sizes.sum()) * self.dtype.itemsize
        self._bin.write(tokens)
        self._sizes.write(sizes.astype("<i4").tobytes())
        self.n_tokens += int(sizes.sum())
        self.n_documents += len(sizes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._bin, self._sizes:
                self._bin.flush()
                os.fsync(self._bin.fileno())
            if kind is None:
                bin_path, idx_path = with_ending(self.prefix, ".bin"), with_ending(self.prefix, ".idx")
                with atomic_write(idx_path) as idx:
                    self._write_index(idx)
                    idx_path.unlink(missing_ok=True)
                    self._bin_part.replace(bin_path)
        finally:
            self._bin_part.unlink(missing_ok=True)
            self._sizes_part.unlink(missing_ok=True)

    def _write_index(self, idx: IO[bytes]) -> None:
        n = self.n_documents
        sizes = _map(self._sizes_part, np.int32, 0, n)
        blocks = range(0, n, _ITEMS_AT_ONCE)
        idx.write(_HEADER.pack(_MAGIC, 1, _CODES[self.dtype], n, n + 1))
        for start in blocks:
            idx.write(sizes[start : start + _ITEMS_AT_ONCE].tobytes())
        end = 0
        for start in blocks:
            n_bytes = sizes[start : start + _ITEMS_AT_ONCE].astype(np.int64) * self.dtype.itemsize
            ends = end + np.cumsum(n_bytes)
            idx.write((ends - n_bytes).astype("<i8").tobytes())
            end = int(ends[-1])
        for start in range(0, n + 1, _ITEMS_AT_ONCE):
            idx.write(np.arange(start, min(n + 1, start + _ITEMS_AT_ONCE), dtype="<i8").tobytes())

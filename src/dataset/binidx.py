"""Megatron's indexed dataset (binidx), version 1: documents as one contiguous array of token ids in a pair of files.

    X.bin   the tokens of all items, one after another
    X.idx   "MMIDIDX\\0\\0", u64 version = 1, u8 dtype code, u64 items, u64 document bounds,
            i32 sizes [items], i64 byte pointers [items], i64 document bounds [documents + 1]

All little-endian. We write one item per document; files with several items per document are read as well. So are files
of other tools whose sizes agree with the .bin, though another part is damaged: `MMapIndexedDataset.warnings` names it.
"""

import os
import struct
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from src.dataset.watched_file import WatchedFile
from src.errors import UserError
from src.files import atomic_write, sync_folder

# Magic, version and dtype codes: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_INTEGERS = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_FLOATS = {6: "float64", 7: "float32"}
# The format has no code for uint32 and uint64.
_CODES = {np.dtype(kind): code for code, kind in _INTEGERS.items()}
_WRAP = 1 << 32  # sums of int32 sizes overflow to a number that differs by a multiple of this
_INDEX_BLOCK = 1 << 20  # items: index arrays are processed in blocks of some MB, however many items there are


def file_prefix(path: str | os.PathLike[str]) -> Path:
    """`X` for `X`, `X.bin` and `X.idx`."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def with_ending(prefix: Path, ending: str) -> Path:
    """`X.bin` for (`X`, ".bin"); unlike `Path.with_suffix` it keeps a dot in the name of X."""
    return prefix.with_name(prefix.name + ending)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest supported type for the ids of a vocabulary: uint16 up to 65536 entries, else int32."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.int32)


class MMapIndexedDataset:
    """Read access to `X.bin` / `X.idx`; the files may be larger than memory.

    `path` is X, X.bin or X.idx. The pair is validated once, in the constructor: UserError with the file as `given` when
    one is missing, truncated, of another format, or doesn't belong to the other.

        .tokens   all tokens, one flat array       .sizes    int32 [items]
        .dtype    their integer type               .doc_idx  int64 [documents + 1], in items
        .n_tokens                                  len(), [i]  items
        .warnings                                  sentences on what is damaged and how it was read all the same

    `tokens`, `sizes` and `doc_idx` are memory maps: a process that uses them dies (SIGBUS) when the file is truncated
    meanwhile. What lasts for hours uses `read` and [i], which raise DataFileError instead, and `check_unchanged`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.prefix = file_prefix(path)
        self.bin_path, self.idx_path = with_ending(self.prefix, ".bin"), with_ending(self.prefix, ".idx")
        # A text file given in place of a dataset is the most common mistake, so it gets its own advice.
        if self.prefix.is_file() and not self.bin_path.exists() and not self.idx_path.exists():
            raise UserError(
                "not a token dataset (X.bin and X.idx)",
                given=path,
                advice="convert text with data/make_data.py; train on a .jsonl of conversations with --data_type sft",
            )
        for file in (self.bin_path, self.idx_path):
            if not file.is_file():
                raise UserError(
                    "no such file", given=file, advice="a dataset consists of X.bin and X.idx and is given as X"
                )
        self.warnings: list[str] = []
        self._bin, self._idx = WatchedFile(self.bin_path), WatchedFile(self.idx_path)
        self.dtype, n_items, n_bounds = self._read_header()
        start = _HEADER.size
        self.sizes = _map(self.idx_path, np.int32, start, n_items)
        self._pointers = _map(self.idx_path, np.int64, start + 4 * n_items, n_items)
        self._bounds = _map(self.idx_path, np.int64, start + 12 * n_items, n_bounds)
        self._block_starts: list[int] = []  # bytes before each block of items
        self.n_tokens = self._validate_layout()
        self._validate_bounds()
        self.tokens = _map(self.bin_path, self.dtype, 0, self.n_tokens)

    def _read_header(self) -> tuple[np.dtype[Any], int, int]:
        """The dtype of the tokens, the number of items and the number of document bounds."""
        length = self.idx_path.stat().st_size
        with self.idx_path.open("rb") as file:
            header = file.read(_HEADER.size)
        if not header.startswith(_MAGIC):
            raise self._invalid_index("does not begin with MMIDIDX, so it is not an index of this format")
        if len(header) < _HEADER.size:
            raise self._invalid_index(f"truncated within the header, after {length} bytes")
        _, version, code, n_items, n_bounds = _HEADER.unpack(header)
        if version != 1:
            raise self._invalid_index(f"format version {version} is not supported", expected="version 1")
        if code in _FLOATS:
            raise self._invalid_index(f"the data type is {_FLOATS[code]}", expected="an integer type for token ids")
        if code not in _INTEGERS:
            raise self._invalid_index(f"unknown data type code {code}")
        expected = _HEADER.size + 12 * n_items + 8 * n_bounds  # i32 size and i64 pointer per item, i64 per bound
        if n_items and length == expected + n_items:  # Megatron's multimodal sets: an i8 mode per item, 0 for text
            n_other = int(np.count_nonzero(_map(self.idx_path, np.int8, expected, n_items)))
            self._warn(f"has modes of a multimodal set; {n_other} of {n_items} items are not text and are read as text")
        elif length != expected:
            raise self._invalid_index(f"has {length} bytes", expected=f"{expected} bytes according to its header")
        return np.dtype(_INTEGERS[code]).newbyteorder("<"), n_items, n_bounds

    def _validate_layout(self) -> int:
        """The number of tokens, after checking that items are contiguous and end where the .bin file ends."""
        end = wrapped = 0  # bytes, and pointers
        for start in range(0, len(self.sizes), _INDEX_BLOCK):
            # int64 before multiplying: an int32 size in bytes overflows from 2^31 bytes on.
            n_bytes = self.sizes[start : start + _INDEX_BLOCK].astype(np.int64) * self.dtype.itemsize
            if n_bytes.min() < 0:
                raise self._invalid_index(f"item {start + int(n_bytes.argmin())} has a negative size")
            ends = end + np.cumsum(n_bytes)
            distance = self._pointers[start : start + len(n_bytes)] - (ends - n_bytes)
            wrapped += (n_wrong := int(np.count_nonzero(distance)))
            # Two's complement: the remainder is right even where the difference overflowed.
            if n_wrong and len(misplaced := np.flatnonzero(distance % _WRAP)):
                item = start + int(misplaced[0])
                raise self._invalid_index(f"item {item} does not begin where the previous item ends")
            self._block_starts.append(end)
            end = int(ends[-1])
        self._pointers_overflowed = wrapped > 0
        if wrapped:
            self._warn(f"{wrapped} byte pointers overflowed at 2^32; the items are located by their sizes")
        length = self.bin_path.stat().st_size
        if length > end and self._is_zero_from(end):
            self.warnings.append(f"{self.bin_path}: the {length - end} zero bytes after the last item are ignored")
        elif length != end:
            raise UserError(
                f"has {length} bytes",
                given=self.bin_path,
                expected=f"{end} bytes according to {self.idx_path.name}",
                advice=f"{'the .bin is truncated or ' * (length < end)}the two files are from different datasets: "
                "copy or create both again",
            )
        return end // self.dtype.itemsize

    def _is_zero_from(self, position: int) -> bool:
        """Whether the .bin contains only zero bytes from `position` on: padding."""
        with self.bin_path.open("rb") as file:
            file.seek(position)
            return all(block.count(0) == len(block) for block in iter(lambda: file.read(_INDEX_BLOCK), b""))

    def _validate_bounds(self) -> None:
        """Checks that the document bounds ascend from 0 to the number of items, or to fewer after a merge."""
        bounds, n_items = self._bounds, len(self.sizes)
        if len(bounds) and (bounds[0] != 0 or bounds[-1] > n_items):
            raise self._invalid_index("the document bounds do not span all items")
        for start in range(0, len(bounds) - 1, _INDEX_BLOCK):
            # One more than a block, so that the difference across the border of two blocks is checked too.
            if (np.diff(bounds[start : start + _INDEX_BLOCK + 1]) < 0).any():
                raise self._invalid_index("the document bounds are not in ascending order")
        covered = int(bounds[-1]) if len(bounds) else 0
        if covered < n_items:  # older versions of Megatron merge sizes only: NVIDIA/Megatron-LM issue 81
            self._warn(f"the document bounds span {covered} of {n_items} items; each other item is taken as a document")

    # When first used, because training doesn't need it and completed bounds take memory.
    @cached_property
    def doc_idx(self) -> npt.NDArray[np.int64]:
        """The first item of each document, and the number of items."""
        bounds = self._bounds if len(self._bounds) else np.zeros(1, np.int64)
        missing = np.arange(bounds[-1] + 1, len(self.sizes) + 1)
        return np.concatenate([bounds, missing]) if len(missing) else bounds

    def _warn(self, problem: str) -> None:
        self.warnings.append(f"{self.idx_path}: {problem}")

    def _invalid_index(self, problem: str, expected: str = "") -> UserError:
        advice = "copy the dataset again, or create it again with data/make_data.py"
        return UserError(problem, given=self.idx_path, expected=expected, advice=advice)

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """The tokens from `start` up to `stop`, or to the end, a read-only array. Raises DataFileError."""
        start, stop, _ = slice(start, stop).indices(self.n_tokens)
        size = self.dtype.itemsize
        return np.frombuffer(self._bin.read(start * size, max(0, stop - start) * size), self.dtype)

    def check_unchanged(self) -> None:
        """Raises DataFileError unless both files are still those that were opened."""
        self._bin.check()
        self._idx.check()

    def __getitem__(self, item: int) -> npt.NDArray[Any]:
        """Token ids of one item, a read-only array. Raises DataFileError."""
        item = range(len(self))[item]
        start = self._first_byte(item) // self.dtype.itemsize
        (size,) = struct.unpack("<i", self._idx.read(_HEADER.size + 4 * item, 4))
        return self.read(start, start + size)

    def _first_byte(self, item: int) -> int:
        if not self._pointers_overflowed:
            return struct.unpack("<q", self._idx.read(_HEADER.size + 4 * len(self) + 8 * item, 8))[0]
        # Added up within a block: other pointers for all items would be as large as the index.
        block = item // _INDEX_BLOCK
        before = self.sizes[block * _INDEX_BLOCK : item].sum(dtype=np.int64)
        return self._block_starts[block] + int(before) * self.dtype.itemsize

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        # By path: a pickled memmap would send the contents of the whole file to every loader process.
        return type(self), (self.prefix,)


def _map(path: Path, dtype: npt.DTypeLike, offset: int, length: int) -> npt.NDArray[Any]:
    if length == 0:  # mmap rejects empty ranges
        return np.empty(0, dtype)
    mapped = np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r", offset, (length,))
    return mapped.view(np.ndarray)  # same memory; slicing np.memmap objects is slower


class BinIdxWriter:
    """Writes `X.bin` / `X.idx` document by document; the pair appears under its name only when it is complete.

        with BinIdxWriter("data/x", np.uint16) as out:
            out.add_document([17, 4, 0])

    Until then the tokens are in `X.bin.part`; an error inside the block removes it. The end-of-document token 0 is
    the caller's task. An earlier pair of the same name is kept until the new one is complete. Then its index is deleted
    first and the new index is renamed last, so that at no time an index exists next to a .bin of another dataset.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike) -> None:
        self.prefix = file_prefix(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in _CODES:
            raise ValueError(f"unsupported token dtype {self.dtype}; expected one of {', '.join(map(str, _CODES))}")
        self.n_tokens = 0
        self.n_documents = 0
        self._bin_part = with_ending(self.prefix, ".bin.part")
        self._sizes_part = with_ending(self.prefix, ".sizes.part")

    def __enter__(self) -> "BinIdxWriter":
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin: BinaryIO = self._bin_part.open("wb")
        # On disk, because a Python list of a hundred million sizes would take gigabytes of memory.
        self._sizes: BinaryIO = self._sizes_part.open("wb")
        return self

    def add_document(self, ids: Sequence[int] | npt.NDArray[Any]) -> None:
        """Appends one document. ValueError when an id is out of the range of the dtype."""
        values = np.asarray(ids, dtype=None if len(ids) else self.dtype)
        tokens = values.astype(self.dtype.newbyteorder("<"), copy=False)
        if not np.array_equal(values, tokens):  # the cast wraps around without an error
            raise ValueError(
                f"document {self.n_documents}: ids {values.min()} to {values.max()} are out of range for {self.dtype}"
            )
        self.add_bytes(tokens.tobytes(), np.array([len(tokens)]))

    def add_bytes(self, tokens: bytes, sizes: npt.NDArray[Any]) -> None:
        """Appends several documents: their concatenated little-endian tokens, and the number of tokens of each."""
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
                # The tokens must be on disk before an index that refers to them.
                self._bin.flush()
                os.fsync(self._bin.fileno())
            if kind is None:
                bin_path, idx_path = with_ending(self.prefix, ".bin"), with_ending(self.prefix, ".idx")
                with atomic_write(idx_path) as idx:
                    self._write_index(idx)
                    # In this order, see the class docstring; `atomic_write` puts the new index in place afterwards.
                    # Each step is on disk before the next: a power failure may otherwise leave a later one without it.
                    idx_path.unlink(missing_ok=True)
                    sync_folder(self.prefix.parent)
                    self._bin_part.replace(bin_path)
                    sync_folder(self.prefix.parent)
        finally:
            self._bin_part.unlink(missing_ok=True)
            self._sizes_part.unlink(missing_ok=True)

    def _write_index(self, idx: IO[bytes]) -> None:
        n = self.n_documents
        sizes = _map(self._sizes_part, np.int32, 0, n)
        blocks = range(0, n, _INDEX_BLOCK)
        idx.write(_HEADER.pack(_MAGIC, 1, _CODES[self.dtype], n, n + 1))
        for start in blocks:
            idx.write(sizes[start : start + _INDEX_BLOCK].tobytes())
        end = 0
        for start in blocks:
            n_bytes = sizes[start : start + _INDEX_BLOCK].astype(np.int64) * self.dtype.itemsize
            ends = end + np.cumsum(n_bytes)
            idx.write((ends - n_bytes).astype("<i8").tobytes())
            end = int(ends[-1])
        for start in range(0, n + 1, _INDEX_BLOCK):
            idx.write(np.arange(start, min(n + 1, start + _INDEX_BLOCK), dtype="<i8").tobytes())

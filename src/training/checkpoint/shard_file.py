"""A file of tensors of a state: safetensors, written from one buffer and read in ranges whose checksums agree.

The header is that of safetensors; of a tensor that is not whole in the file it has the values [count], and its
metadata entry "parts" says from where on they are in the flattened whole, and the whole's shape. Header and data are
hashed in blocks, so that a reader verifies what it reads without reading the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from src.training.checkpoint.manifest import BLOCK_BYTES, DamagedStateError, Entry, parse_json
from src.training.checkpoint.parts import Part

RETRY_SECONDS = 1.0  # network file systems fail for a moment now and then
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH_BYTES = 8  # before the header: its length, little-endian


def header_of(parts: list[Part]) -> bytes:
    """What stands before the data of these parts, which follow each other without gaps."""
    header: dict[str, Any] = {}
    partial: dict[str, Any] = {}
    offset = 0
    for part in parts:
        shape = list(part.shape) if part.is_whole else [part.tensor.numel()]
        header[part.key] = {
            "dtype": NAMES[part.tensor.dtype],
            "shape": shape,
            "data_offsets": [offset, offset + part.size],
        }
        if not part.is_whole:
            partial[part.key] = [part.start, list(part.shape)]
        offset += part.size
    assert len(header) == len(parts), "one part of each tensor"
    if partial:
        header = {"__metadata__": {"parts": json.dumps(partial)}, **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values at multiples of their size
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def blocks(header: bytes, data: memoryview) -> list[bytes | memoryview]:
    """The file as it is hashed: the header, which every reader needs, then blocks of BLOCK_BYTES, not copied."""
    return [header, *(data[begin : begin + BLOCK_BYTES] for begin in range(0, len(data), BLOCK_BYTES))]


@dataclass(frozen=True)
class StoredPart:
    """Values of a tensor in a file: from byte `offset` on."""

    key: str
    dtype: torch.dtype
    start: int
    count: int
    shape: tuple[int, ...]  # of the whole
    offset: int

    @property
    def stop(self) -> int:
        return self.start + self.count


class ShardFile:
    """A file of tensors that is being read. Every byte that it gives belongs to a block whose SHA-256 agrees.

    Whatever is wrong with it raises DamagedStateError.
    """

    def __init__(self, path: Path, entry: Entry) -> None:
        self.name, self.entry = path.name, entry
        self.bytes_read = 0
        self._file: IO[bytes] = _open(path)
        self._block = (-1, memoryview(b""))  # the last one: small tensors share it
        try:
            self.parts = self._parse()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def copy(self, part: StoredPart, begin: int, target: Tensor) -> None:
        """Copy the values from `begin` on (of the flattened whole) into `target` [count]."""
        size, done = part.dtype.itemsize, 0
        first = part.offset + (begin - part.start) * size
        for view in self._read(first, first + target.numel() * size):
            values = torch.frombuffer(view, dtype=part.dtype)
            target[done : done + len(values)].copy_(values)
            done += len(values)

    def _parse(self) -> list[StoredPart]:
        """The parts in the order in which they lie in the file."""
        length = int.from_bytes(self._bytes(0, LENGTH_BYTES), "little")
        data_begin = LENGTH_BYTES + length
        header = parse_json(f"the header of {self.name}", self._bytes(LENGTH_BYTES, data_begin))
        try:
            metadata = header.pop("__metadata__", {})
            partial = json.loads(metadata["parts"]) if "parts" in metadata else {}
            parts = [self._parse_part(key, value, partial.get(key), data_begin) for key, value in header.items()]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise DamagedStateError(f"the header of {self.name} is malformed ({error})") from error
        if not parts:
            raise DamagedStateError(f"{self.name} has no tensors")
        return sorted(parts, key=lambda part: part.offset)

    def _parse_part(self, key: str, value: Any, partial: Any, data_begin: int) -> StoredPart:
        """Raises ValueError and others where it is malformed."""
        if value["dtype"] not in DTYPES:
            raise DamagedStateError(f"{key} is {value['dtype']} instead of floating point")
        dtype, (begin, end) = DTYPES[value["dtype"]], value["data_offsets"]
        count = math.prod(value["shape"])
        start, shape = partial if partial is not None else (0, value["shape"])
        if not all(
            type(number) is int and 0 <= number < 1 << 63 for number in (begin, end, start, *shape, *value["shape"])
        ):
            raise ValueError(f"{key} has no offsets")
        offset = data_begin + begin
        is_inside = end - begin == count * dtype.itemsize and data_begin + end <= self.entry.size
        if not is_inside or offset % dtype.itemsize or start + count > math.prod(shape):
            raise ValueError(f"{key} lies elsewhere than its shape says")
        return StoredPart(key, dtype, start, count, tuple(shape), offset)

    def _bytes(self, begin: int, end: int) -> bytes:
        return b"".join(self._read(begin, end))

    def _read(self, begin: int, end: int) -> Iterator[memoryview]:
        """Verified bytes, block by block."""
        if end > self.entry.size:
            raise DamagedStateError(f"{self.name} is too short for its header")
        while begin < end:
            first, block = self._verified(begin)
            yield block[begin - first : end - first]
            begin = first + len(block)

    def _verified(self, position: int) -> tuple[int, memoryview]:
        """Where the block of a byte begins, and the block."""
        header, length = self.entry.header_bytes, self.entry.block_bytes
        number = 0 if position < header else 1 + (position - header) // length
        first, end = (0, header) if number == 0 else (header + (number - 1) * length, header + number * length)
        if self._block[0] != first:
            data = memoryview(bytearray(min(end, self.entry.size) - first))
            _read_at(self._file, first, data, self.name)
            self.bytes_read += len(data)
            if hashlib.sha256(data).hexdigest() != self.entry.hashes[number]:
                raise DamagedStateError(f"{self.name} is not what was written (its SHA-256 differs)")
            self._block = (first, data)
        return self._block


def _open(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise DamagedStateError(f"{path.name} can't be read ({error.strerror})") from error


def _read_at(file: IO[bytes], offset: int, target: memoryview, name: str) -> None:
    """Fill `target`. Raises DamagedStateError when the disk can't read it (EIO), after a second try, or it ends."""
    for last_try in (False, True):
        try:
            file.seek(offset)
            done = 0
            while done < len(target):
                if not (count := file.readinto(target[done:])):  # type: ignore[attr-defined]
                    raise DamagedStateError(f"{name} is shorter than it was written")
                done += count
            return
        except OSError as error:
            if last_try:
                raise DamagedStateError(f"{name} can't be read ({error.strerror})") from error
            time.sleep(RETRY_SECONDS)

"""The container format GGUF: metadata and tensors of a file, read from a memory map with every length checked.

    "GGUF", u32 version, u64 tensors, u64 keys; keys: name, type, value; tensors: name, sizes, type, offset; then, from
    a multiple of general.alignment on, the data. Strings and arrays begin with their length as u64.

Source: docs/gguf.md of ggml. What `gguf.GGUFReader` lacks is the check of lengths, without which a cut file is read as
one of zeros or as an endless array.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from src.errors import UserError
from src.inference.formats.lazy import LazyWeights

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY, _BOOL = 8, 9, 7
# Type of a value -> its struct format.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
F32, F16, Q8_0, BF16 = 0, 1, 8, 30
Q8_0_BLOCK = 32  # numbers of a row that share a scale
# Type of a tensor -> (numbers in a block, bytes of a block): those that are read.
_BLOCKS = {F32: (1, 4), F16: (1, 2), Q8_0: (Q8_0_BLOCK, 2 + Q8_0_BLOCK), BF16: (1, 2)}
# Names of others that people have, for the message.
_OTHER_TYPES = {
    **{2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K"},
    **{14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 20: "IQ4_NL", 23: "IQ4_XS", 28: "F64"},
}


@dataclass(frozen=True)
class GGUFFile:
    """metadata: key -> number, string, list of strings, or array of numbers; tensors: under their names in the file;
    shapes: theirs, in NumPy's order."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: LazyWeights
    shapes: Mapping[str, tuple[int, ...]]


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that begins as GGUF does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class _Cursor:
    """A position in the bytes of a file. Raises UserError where they end too early."""

    def __init__(self, data: npt.NDArray[np.uint8], path: Path) -> None:
        self.data, self.path, self.position = data, path, 0

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        begin, self.position = self.position, self.position + size
        if self.position > len(self.data):
            raise UserError("cut short", given=self.path, advice="copy or download it again")
        return self.data[begin : self.position]

    def number(self, format: str) -> Any:
        return struct.unpack(f"<{format}", self.take(struct.calcsize(f"<{format}")).tobytes())[0]

    def string(self) -> str:
        # World's tokens are written with escapes, so that all text is UTF-8; nothing here depends on a damaged one.
        return bytes(self.take(self.number("Q"))).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise UserError(f"a value of the unknown type {kind}: damaged", given=self.path)
        element, count = self.number("I"), self.number("Q")
        if element == _STRING:
            return [self.string() for _ in range(count)]
        if element not in _SCALARS:
            raise UserError(f"an array of the unknown type {element}: damaged", given=self.path)
        dtype = np.dtype(_SCALARS[element]).newbyteorder("<")
        return self.take(count * dtype.itemsize).view(dtype)


def read_gguf_file(path: Path) -> GGUFFile:
    """Metadata and tensors of `path`. Raises UserError when it is cut short, or a tensor is of a type that isn't
    read."""
    # Copy on write, as PyTorch has no tensors that can't be written to.
    cursor = _Cursor(np.memmap(path, mode="c"), path)
    if bytes(cursor.take(len(MAGIC))) != MAGIC:
        raise UserError("not a GGUF file", given=path)
    if (version := cursor.number("I")) not in VERSIONS:
        raise UserError(f"GGUF version {version}", given=path, expected=f"version {' or '.join(map(str, VERSIONS))}")
    n_tensors, n_keys = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(n_keys):
        name = cursor.string()
        metadata[name] = cursor.value(cursor.number("I"))
    places = [_tensor_place(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise UserError(f"general.alignment is {alignment}: damaged", given=path)
    data_begin = -(-cursor.position // alignment) * alignment
    makers: dict[str, Callable[[], Tensor]] = {}
    for name, shape, kind, offset in places:
        per_block, block_bytes = _BLOCKS[kind]
        cursor.position = data_begin + offset
        data = cursor.take(int(np.prod(shape, dtype=object)) // per_block * block_bytes)  # a view: nothing is read yet
        makers[name] = partial(_decode, data, kind, shape)
    return GGUFFile(path, metadata, LazyWeights(makers), {name: shape for name, shape, *_ in places})


def _tensor_place(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape in NumPy's order, type, and offset in the data."""
    name = cursor.string()
    shape = tuple(cursor.number("Q") for _ in range(cursor.number("I")))[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in _BLOCKS:
        raise UserError(
            f"its tensor {name!r} is quantised as {_OTHER_TYPES.get(kind, f'type {kind}')}",
            given=cursor.path,
            expected="F32, F16, BF16 or Q8_0",
            advice="use a file of one of these types, or the weights that it was made of",
        )
    return name, shape, kind, offset


def _decode(data: npt.NDArray[np.uint8], kind: int, shape: tuple[int, ...]) -> Tensor:
    """The numbers of a tensor: a view of the file in its own dtype, or, of Q8_0, fp32."""
    if kind == Q8_0:
        # a row of blocks [scale fp16, 32 x int8]; value = scale * integer
        blocks = data.reshape(-1, 2 + Q8_0_BLOCK)
        scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
        with np.errstate(invalid="ignore"):  # infinite scales of a damaged file: whoever uses the weights checks them
            values = scale * blocks[:, 2:].view(np.int8)
        return torch.from_numpy(values.reshape(shape))
    if kind == BF16:
        return torch.from_numpy(data.view("<i2")).view(torch.bfloat16).reshape(shape)
    return torch.from_numpy(data.view("<f4" if kind == F32 else "<f2")).reshape(shape)

"""Reads files of torch.save: what a file claims to contain is compared with its size before memory is taken for it.

`torch.load(weights_only=True)` runs no foreign code, but it allocates what the pickle asks for, unpacks compressed
members of a zip archive, and creates tensors without values (meta, nested, sparse). So the pickle is gone through
first, with nothing created but plain objects.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from src.errors import UserError
from src.model.file_kind import file_kind

EXPECTED = "a state dict saved by torch.save"
# An instruction of a pickle creates at most a tensor, about 1 kB. A checkpoint of 100 layers with its optimizer has
# 200,000 of them.
MAX_INSTRUCTIONS = 500_000
# Of values in a tuple, counted as often as they are referred to: a shape has few. Nested tuples of 100 bytes can have
# 2^50, and a dict would hash them one by one.
MAX_TUPLE_VALUES = 100_000
INSTRUCTIONS = frozenset(  # those that torch.load knows
    "PROTO STOP GLOBAL NEWOBJ REDUCE BUILD APPEND APPENDS SETITEM SETITEMS MARK TUPLE TUPLE1 TUPLE2 TUPLE3 NONE "
    "NEWFALSE NEWTRUE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET BININT BININT1 BININT2 BINFLOAT BINUNICODE "
    "SHORT_BINSTRING BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT LONG1".split()
)
_REBUILD = "torch._utils _rebuild_"
# Functions of torch.save for tensors with values in a storage of the file, and what else is around them.
TENSORS = {_REBUILD + kind for kind in ("tensor", "tensor_v2", "tensor_v3")}
HARMLESS = {
    *TENSORS,
    *(_REBUILD + kind for kind in ("parameter", "parameter_with_state")),
    *("torch.serialization _get_layout", "torch per_tensor_affine", "torch per_channel_affine"),
    *("collections OrderedDict", "collections Counter", "torch Size", "torch device", "__builtin__ set"),
}
OTHER_TENSORS = {
    _REBUILD + "meta_tensor_no_storage": "a meta tensor, which has no values",
    _REBUILD + "nested_tensor": "a nested tensor",
    _REBUILD + "sparse_tensor": "a sparse tensor",
    _REBUILD + "qtensor": "a quantized tensor",
    _REBUILD + "wrapper_subclass": "a tensor without a storage",
    "torch._tensor _rebuild_from_type_v2": "a tensor of a subclass",
}
STORAGES = {  # bytes of a value in each kind of storage
    "torch.storage UntypedStorage": 1,
    **{
        f"{module} {name}Storage": size
        for module in ("torch", "torch.cuda")
        for size, names in (
            (1, ("Byte", "Char", "Bool", "QInt8", "QUInt8")),
            (2, ("Half", "BFloat16", "Short")),
            (4, ("Float", "Int", "QInt32")),
            (8, ("Double", "Long", "ComplexFloat")),
            (16, ("ComplexDouble",)),
        )
        for name in names
    },
}
_LEGACY_PICKLES = 5  # of torch before 1.6: magic number, protocol, machine, content, keys of storages


def read_torch_file(path: Path, mmap: bool) -> Any:
    """The content of a file of torch.save, tensors on the CPU; no code in it is executed.

    `mmap`: tensors are mapped from the file, where its format allows it (files of torch before 1.6 don't).
    Raises UserError for a file that is damaged, of another program, contains more than plain tensors, or claims more
    bytes than it has; OSError when it can't be read.
    """
    kind = file_kind(path)
    try:
        if kind == "zip":
            _check_zip(path)
        elif kind == "pickle":
            _check_pickle_file(path)
        else:
            raise damaged_file(path)
        with path.open("rb") as file:  # not the path alone: torch.load would go by an ending .safetensors
            source = str(path) if kind == "zip" and path.suffix != ".safetensors" else file
            mapped = mmap and source is not file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except UserError:
        raise
    except Exception as error:  # pickle, zipfile and torch raise a dozen types for a damaged file
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a seek to where an archive points
            raise
        raise damaged_file(path) from error


def damaged_file(path: Path) -> UserError:
    """The error for a file that its reader rejects."""
    return UserError(
        "cut short or not a weights file", given=path, advice="copy or download it again, or name another file"
    )


def _too_large(path: Path, claim: str) -> UserError:
    return UserError(f"damaged, or made to exhaust memory: {claim}", given=path, advice="download or copy it again")


def _check_zip(path: Path) -> None:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise _too_large(path, "two of its members have one name")
        for member in members.values():
            # torch.save compresses nothing: a tensor is mapped into memory as it is.
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise _too_large(path, f"its member {member.filename!r} is compressed to {member.compress_size} bytes")
        if (total := sum(member.file_size for member in members.values())) > size:
            raise _too_large(path, f"its members have {total} bytes, the file {size}")
        prefix = next(iter(members)).partition("/")[0]  # as torch.load finds it
        content = archive.read(f"{prefix}/data.pkl")

    def check_storage(key: str, n_bytes: int) -> None:
        member = members.get(f"{prefix}/data/{key}")
        if member is None or member.file_size != n_bytes:
            raise _too_large(path, f"a tensor of {n_bytes} bytes with {member.file_size if member else 0} in the file")

    _check_pickle(io.BytesIO(content), path, check_storage)


def _check_pickle_file(path: Path) -> None:
    storages: dict[str, int] = {}

    def count_storage(key: str, n_bytes: int) -> None:
        storages[key] = max(n_bytes, storages.get(key, 0))  # torch goes by the first of several claims for a key

    with _BoundedReader(io.FileIO(path)) as file:
        for _ in range(_LEGACY_PICKLES):
            _check_pickle(file, path, count_storage)
        size = file.size
    if (total := sum(storages.values())) > size:
        raise _too_large(path, f"its tensors have {total} bytes, the file {size}")


class _BoundedReader(io.BufferedReader):
    """Takes no memory for bytes that the file lacks: read(n) allocates n bytes first, and a pickle can claim 4 GB."""

    @property
    def size(self) -> int:
        return os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self.size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def _check_pickle(file: IO[bytes], path: Path, check_storage: Callable[[str, int], None]) -> None:
    """Goes through the next pickle in `file`. Raises UserError unless it has plain tensors only."""
    start = file.tell()
    _check_instructions(file, path)
    file.seek(start)
    unpickler = _PlainUnpickler(file, path, check_storage)
    content = unpickler.load()
    if unpickler.other_kinds:
        raise _other_tensor(content, unpickler.other_kinds[0], path)


def _check_instructions(file: IO[bytes], path: Path) -> None:
    """Goes through a pickle without creating its objects. Raises UserError where they would be code or too many."""
    mark = object()
    stack: list[Any] = []  # the number of values in each object, or `mark`
    memo: dict[int, int] = {}
    argument: Any
    for count, (instruction, argument, _) in enumerate(pickletools.genops(file)):
        name = instruction.name
        if name not in INSTRUCTIONS or count > MAX_INSTRUCTIONS:
            raise _too_large(path, "its list of contents is too long" if name in INSTRUCTIONS else f"it has a {name}")
        if name == "GLOBAL" and not _is_readable(argument):
            raise UserError(
                f"not opened, as it contains more than plain tensors: that could run code, it calls "
                f"{_shown(argument).replace(' ', '.')}",
                given=path,
                expected=EXPECTED,
            )
        values = 1
        if pickletools.markobject in instruction.stack_before:
            while (top := stack.pop()) is not mark:
                values += top
            taken = instruction.stack_before.index(pickletools.markobject)
        else:
            taken = len(instruction.stack_before)
        for _ in range(taken):
            values += stack.pop()
        if name in ("BINPUT", "LONG_BINPUT"):
            if argument > MAX_INSTRUCTIONS:  # pickle makes a table of this length
                raise _too_large(path, f"its list of contents has an entry {argument}")
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            values = memo[argument]
        elif not name.startswith("TUPLE"):  # only tuples are hashed with all that is in them
            values = 1
        if values > MAX_TUPLE_VALUES:
            raise _too_large(path, f"a tuple of more than {MAX_TUPLE_VALUES} values")
        stack.extend([mark if name == "MARK" else values] * len(instruction.stack_after))


def _is_readable(name: str) -> bool:
    return name in HARMLESS or name in OTHER_TENSORS or name in STORAGES or _is_dtype(name)


def _is_dtype(name: str) -> bool:
    module, _, attribute = name.partition(" ")
    return module == "torch" and isinstance(getattr(torch, attribute, None), torch.dtype)


def _shown(name: str) -> str:
    return name[:80]


class _Plain(dict):  # type: ignore[type-arg]  # a dict, as state dicts are
    """What any harmless function returns; its entries, where it is a container."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *_: object) -> None:
        super().__init__()

    def __setstate__(self, _: object) -> None:
        pass  # the versions of modules, which torch puts next to a state dict


class _Storage(_Plain):
    def __init__(self, value_bytes: int, n_bytes: int) -> None:
        super().__init__()
        self.value_bytes, self.n_bytes = value_bytes, n_bytes


class _OtherTensor:
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __setstate__(self, _: object) -> None:
        pass


class _PlainUnpickler(pickle.Unpickler):
    """Creates plain objects only, and hands (key, bytes) of each storage to `check_storage`. Raises UserError for a
    tensor that goes beyond its storage: torch would make that larger."""

    def __init__(self, file: IO[bytes], path: Path, check_storage: Callable[[str, int], None]) -> None:
        super().__init__(file)
        self._path, self._check_storage = path, check_storage
        self.other_kinds: list[str] = []

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module} {name}"
        if kind := OTHER_TENSORS.get(full):
            self.other_kinds.append(kind)
            return lambda *_: _OtherTensor(kind)
        if full in TENSORS:
            return self._tensor
        # The types of storages and values can be called to allocate memory; their sizes and names can't.
        return _Plain if full in HARMLESS else STORAGES.get(full, full)

    def persistent_load(self, pid: Any) -> Any:
        _, value_bytes, key, _, n_values, *_ = pid
        if not isinstance(key, str) or not isinstance(value_bytes, int) or not isinstance(n_values, int):
            raise pickle.UnpicklingError("not a storage")
        self._check_storage(key, value_bytes * n_values)
        return _Storage(value_bytes, value_bytes * n_values)

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *others: Any) -> _Plain:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("not a storage")
        dtype = others[2] if len(others) > 2 else ""  # of a storage of bytes
        value_bytes = getattr(torch, dtype.partition(" ")[2]).itemsize if dtype else storage.value_bytes
        values = 0 if 0 in shape else 1 + offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if values * value_bytes > storage.n_bytes:
            raise _too_large(self._path, f"a tensor of shape {_shown(str(shape))} in {storage.n_bytes} bytes")
        return _Plain()


def _other_tensor(content: Any, kind: str, path: Path) -> UserError:
    """About a tensor without values, or with values that aren't a plain storage; by its name where that is known."""
    entries = content.items() if isinstance(content, dict) else ()
    name, kind = next(((name, v.kind) for name, v in entries if isinstance(v, _OtherTensor)), ("", kind))
    return UserError(
        f"not a state dict: the entry {_shown(repr(name))} is {kind}" if name else f"contains {kind}",
        given=path,
        expected="plain tensors (torch.strided), each with its values",
    )

"""Reads full states: each rank the ranges that it needs, and nothing that isn't verified."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from src.training.checkpoint.manifest import MANIFEST, PAYLOAD, DamagedStateError, parse_json, parse_manifest
from src.training.checkpoint.parts import Part, whole_part
from src.training.checkpoint.shard_file import RETRY_SECONDS, ShardFile, StoredPart


class StateReader:
    """Reads a state: the manifest and `payload` at construction, the tensors by `load` or `tensors`, in one pass over
    the files that the manifest lists, and no others. `bytes_read` counts what was read of them.

    Whatever is wrong with a file (missing, unreadable, other content than was written, malformed) raises
    DamagedStateError.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._files = parse_manifest(_read_bytes(folder / MANIFEST), folder)
        for name, entry in self._files.items():  # cheap, and finds most damage before a model is built
            _check_size(folder / name, entry.size)
        data = _read_bytes(folder / PAYLOAD)
        if hashlib.sha256(data).hexdigest() != self._files[PAYLOAD].hashes[0]:
            raise DamagedStateError(f"{PAYLOAD} is not what was written (its SHA-256 differs)")
        self.payload = parse_json(PAYLOAD, data)

    def load(self, wanted: Iterable[Part], rank: int = 0) -> None:
        """Fill these parts, whichever ranks wrote them. Files of `rank` come first; no more are read than needed."""
        parts = {part.key: part for part in wanted}
        names = sorted(self._names(), key=lambda name: not name.startswith(f"rank{rank}-"))
        self._fill(names, parts, lambda stored: parts.get(stored.key), sum(p.tensor.numel() for p in parts.values()))

    def tensors(self, is_wanted: Callable[[str], bool] = lambda key: True) -> dict[str, Tensor]:
        """Whole tensors, of the keys that are wanted."""
        parts: dict[str, Part] = {}
        size = sum(entry.size for entry in self._files.values())

        def find(stored: StoredPart) -> Part | None:
            if not is_wanted(stored.key):
                return None
            if stored.key not in parts:
                if math.prod(stored.shape) * stored.dtype.itemsize > size:  # before memory is taken
                    raise DamagedStateError(f"{stored.key} {list(stored.shape)} is larger than the state")
                parts[stored.key] = whole_part(stored.key, torch.empty(stored.shape, dtype=stored.dtype))
            return parts[stored.key]

        self._fill(self._names(), parts, find)
        return {key: part.tensor for key, part in parts.items()}

    def _names(self) -> list[str]:
        return [name for name in self._files if name != PAYLOAD]

    def _fill(
        self,
        names: list[str],
        parts: dict[str, Part],
        find: Callable[[StoredPart], Part | None],
        count: float = math.inf,
    ) -> None:
        """Fill what `find` gives for what is stored, until `count` values are; all of `parts` have to be full then."""
        filled: dict[str, list[tuple[int, int]]] = {}
        for name in names:
            if count <= 0:
                break
            with ShardFile(self.folder / name, self._files[name]) as file:
                for stored in file.parts:
                    if (part := find(stored)) is None:
                        continue
                    if stored.shape != tuple(part.shape):
                        raise DamagedStateError(f"{part.key} is {list(stored.shape)} instead of {list(part.shape)}")
                    begin, end = max(stored.start, part.start), min(stored.stop, part.stop)
                    if begin < end:
                        file.copy(stored, begin, part.flat[begin - part.start : end - part.start])
                        filled.setdefault(part.key, []).append((begin, end))
                        count -= end - begin
                self.bytes_read += file.bytes_read
        for key, part in parts.items():
            _check_full(part, sorted(filled.get(key, [])))


def _check_full(part: Part, ranges: list[tuple[int, int]]) -> None:
    """Raises DamagedStateError unless the ranges are all of a part."""
    reached = part.start
    for begin, end in ranges:
        if begin < reached:
            raise DamagedStateError(f"{part.key} is stored twice")
        if begin > reached:
            break
        reached = end
    if reached != part.stop:
        raise DamagedStateError(f"{part.key} is missing" + (", in part" if ranges else ""))


def _check_size(path: Path, size: int) -> None:
    try:
        actual = path.stat().st_size
    except OSError as error:
        raise DamagedStateError(f"{path.name} is missing ({error.strerror})") from error
    if actual != size:
        raise DamagedStateError(f"{path.name} has {actual} bytes instead of {size}")


def _read_bytes(path: Path) -> bytes:
    for last_try in (False, True):
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            raise DamagedStateError(f"{path.name} is missing") from error
        except OSError as error:  # the disk can't read it (EIO), or a network file system fails for a moment
            if last_try:
                raise DamagedStateError(f"{path.name} can't be read ({error.strerror})") from error
            time.sleep(RETRY_SECONDS)
    raise AssertionError("the second try returns or raises")

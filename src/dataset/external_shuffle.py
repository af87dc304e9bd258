"""Shuffles more documents than memory holds, the same way every time.

A document's place in epoch e is the rank of a 64-bit hash of (seed, e, its line number): a pure function of these, so
neither the number of workers nor the sizes below change the order. Sorting by it is an external sort: documents gather
in memory until a run is full, each run is written sorted, and ranges of the hash are then read from all runs at once.
Everything on the disk is written and read in long stretches.
"""

import hashlib
import os
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

RUN_BYTES = 64 << 20  # tokens in memory at once; a few times this is the memory that all of it needs
RUN_DOCUMENTS = 1 << 20  # the same for very short documents
_JOINED_AT_ONCE = 1 << 14

Sorted = tuple[bytes, npt.NDArray[np.int32]]  # tokens of some documents and their sizes


def scramble(numbers: npt.NDArray[np.uint64], *salt: object) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each number, another one for each salt (splitmix64's finaliser; Steele et al., 2014)."""
    start = np.frombuffer(hashlib.blake2b(repr(salt).encode(), digest_size=8).digest(), "<u8")
    x = start + numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass
class _Run:
    """What is still to be read of one sorted run: documents [next, end), the first of them at byte `at`."""

    next: int
    end: int
    at: int


class _Epoch:
    """The sorted runs of one epoch, one after another in three files: tokens, sizes, keys."""

    def __init__(self, prefix: Path) -> None:
        self._paths = [prefix.with_suffix(ending) for ending in (".tokens", ".sizes", ".keys")]
        self._files = [path.open("w+b") for path in self._paths]
        self._runs: list[_Run] = []
        self._documents = self._bytes = 0

    def write_run(
        self, tokens: bytes, sizes: npt.NDArray[np.int32], keys: npt.NDArray[np.uint64], itemsize: int
    ) -> None:
        """Some documents (tokens joined, size and key of each), sorted by their keys."""
        order = np.argsort(keys, kind="stable")
        for piece in _gather(tokens, sizes, order, itemsize):
            self._files[0].write(piece)
        self._files[1].write(sizes[order].tobytes())
        self._files[2].write(keys[order].tobytes())
        self._runs.append(_Run(self._documents, self._documents + len(sizes), self._bytes))
        self._documents += len(sizes)
        self._bytes += len(tokens)

    def merged(self, itemsize: int) -> Iterator[Sorted]:
        """All documents in the order of their keys, in portions: a range of keys at a time is read from every run."""
        for file in self._files:
            file.flush()
        by_bytes, by_documents = -(-self._bytes // RUN_BYTES), -(-self._documents // RUN_DOCUMENTS)
        ranges = max(1, by_bytes, by_documents)
        for number in range(1, ranges + 1):
            parts = [self._take(run, number * (1 << 64) // ranges, itemsize) for run in self._runs]
            sizes = np.concatenate([part[1] for part in parts])
            order = np.argsort(np.concatenate([part[2] for part in parts]), kind="stable")
            tokens = b"".join([part[0] for part in parts])
            del parts
            start = 0
            for piece in _gather(tokens, sizes, order, itemsize):
                some = sizes[order[start : start + _JOINED_AT_ONCE]]
                start += len(some)
                yield piece, some

    def _take(self, run: _Run, limit: int, itemsize: int) -> tuple[bytes, npt.NDArray[Any], npt.NDArray[Any]]:
        """Reads on in a run up to the first key that is `limit` or more: tokens, sizes, keys."""
        end = bisect_left(_KeysOnDisk(self._files[2].fileno()), limit, run.next, run.end)
        count = end - run.next
        sizes = np.frombuffer(os.pread(self._files[1].fileno(), 4 * count, 4 * run.next), np.int32)
        keys = np.frombuffer(os.pread(self._files[2].fileno(), 8 * count, 8 * run.next), np.uint64)
        n_bytes = int(sizes.sum(dtype=np.int64)) * itemsize
        tokens = os.pread(self._files[0].fileno(), n_bytes, run.at)
        run.next, run.at = end, run.at + n_bytes
        return tokens, sizes, keys

    def delete(self) -> None:
        for file, path in zip(self._files, self._paths, strict=True):
            file.close()
            path.unlink(missing_ok=True)


class _KeysOnDisk:
    """A sorted file of u64 as `bisect` wants it: a few reads instead of a map that would count as memory."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __getitem__(self, index: int) -> int:
        return int.from_bytes(os.pread(self._descriptor, 8, 8 * index), "little")

    def __len__(self) -> int:
        raise NotImplementedError("bisect is given its bounds")


class ExternalShuffle:
    """Takes documents in the order of their lines, gives them back shuffled, `epochs` times differently.

    folder    an existing folder for the runs: `epochs` times the size of all tokens
    itemsize  bytes per token
    """

    def __init__(self, folder: Path, name: str, itemsize: int, epochs: int, seed: int) -> None:
        self._itemsize = itemsize
        self._seed = seed
        self._epochs = [_Epoch(folder / f"{name}-{epoch}") for epoch in range(epochs)]
        self._clear()
        self.n_documents = 0
        self.n_tokens = 0

    def _clear(self) -> None:
        self._tokens: list[bytes] = []
        self._sizes: list[npt.NDArray[np.int32]] = []
        self._ordinals: list[npt.NDArray[np.uint64]] = []
        self._held_bytes = self._held_documents = 0

    def add(self, tokens: bytes, sizes: npt.NDArray[np.int32], ordinals: npt.NDArray[np.uint64]) -> None:
        """Some documents: their tokens joined, the size of each, and the number of each one's line over all inputs."""
        self._tokens.append(tokens)
        self._sizes.append(sizes)
        self._ordinals.append(ordinals)
        self._held_bytes += len(tokens)
        self._held_documents += len(sizes)
        self.n_documents += len(sizes)
        self.n_tokens += len(tokens) // self._itemsize
        if self._held_bytes >= RUN_BYTES or self._held_documents >= RUN_DOCUMENTS:
            self._write_runs()

    def _write_runs(self) -> None:
        tokens, sizes, ordinals = b"".join(self._tokens), np.concatenate(self._sizes), np.concatenate(self._ordinals)
        self._clear()
        for number, epoch in enumerate(self._epochs):
            epoch.write_run(tokens, sizes, scramble(ordinals, self._seed, number), self._itemsize)

    def shuffled(self) -> Iterator[Sorted]:
        """All epochs, one after another, in portions. An epoch's files go when it has been read."""
        if self._sizes:
            self._write_runs()
        for epoch in self._epochs:
            if self.n_documents:
                yield from epoch.merged(self._itemsize)
            epoch.delete()


def _gather(tokens: bytes, sizes: npt.NDArray[np.int32], order: npt.NDArray[np.intp], itemsize: int) -> Iterator[bytes]:
    """The documents of `tokens` in another order, joined by the `_JOINED_AT_ONCE`."""
    ends = np.cumsum(sizes, dtype=np.int64) * itemsize
    starts = ends - sizes * np.int64(itemsize)
    view = memoryview(tokens)
    for first in range(0, len(order), _JOINED_AT_ONCE):
        some = order[first : first + _JOINED_AT_ONCE]
        yield b"".join(map(view.__getitem__, map(slice, starts[some].tolist(), ends[some].tolist())))

"""Reproducible shuffle of more documents than fit into memory.

The position of a document in epoch e is the rank of a 64-bit hash of (seed, e, its line number), so neither the number
of workers nor the sizes below change the order. Sorting by the hash is an external sort: documents are collected in
memory until a run is full, each run is sorted and written to disk, and the runs are merged by reading the same range of
hashes from all of them. All disk access is sequential within a run.
"""

import os
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from src.dataset.hashing import splitmix64

RUN_BYTES = 64 << 20  # of tokens per run; the peak memory is a few times this
RUN_DOCUMENTS = 1 << 20  # limit for very short documents, whose sizes and hashes need more memory than their tokens
_JOINED_DOCUMENTS = 1 << 14  # joined per write: keeps the lists of Python objects small

Batch = tuple[bytes, npt.NDArray[np.int32]]  # concatenated tokens of some documents, and the size of each in tokens


@dataclass
class _Run:
    """The unread part of a sorted run: documents [next, end), whose tokens begin at byte `offset`."""

    next: int
    end: int
    offset: int


class _Epoch:
    """The sorted runs of one epoch, one after another in three files: tokens, sizes, keys (hashes)."""

    def __init__(self, prefix: Path) -> None:
        self._paths = [prefix.with_suffix(ending) for ending in (".tokens", ".sizes", ".keys")]
        self._files = [path.open("w+b") for path in self._paths]
        self._runs: list[_Run] = []
        self._documents = self._bytes = 0

    def write_run(
        self, tokens: bytes, sizes: npt.NDArray[np.int32], keys: npt.NDArray[np.uint64], itemsize: int
    ) -> None:
        """Sorts documents (concatenated tokens, size and key of each) by their keys and appends them as a run."""
        order = np.argsort(keys, kind="stable")  # stable: equal hashes keep the order of lines
        for joined in _gather(tokens, sizes, order, itemsize):
            self._files[0].write(joined)
        self._files[1].write(sizes[order].tobytes())
        self._files[2].write(keys[order].tobytes())
        self._runs.append(_Run(self._documents, self._documents + len(sizes), self._bytes))
        self._documents += len(sizes)
        self._bytes += len(tokens)

    def merged(self, itemsize: int) -> Iterator[Batch]:
        """All documents in the order of their keys, in batches: range after range of keys, read from every run."""
        for file in self._files:
            file.flush()
        # Hashes are uniform, so equal ranges hold about equally many documents: about one run's size each.
        by_bytes, by_documents = -(-self._bytes // RUN_BYTES), -(-self._documents // RUN_DOCUMENTS)
        ranges = max(1, by_bytes, by_documents)
        for number in range(1, ranges + 1):
            parts = [self._take(run, number * (1 << 64) // ranges, itemsize) for run in self._runs]
            sizes = np.concatenate([part[1] for part in parts])
            order = np.argsort(np.concatenate([part[2] for part in parts]), kind="stable")
            tokens = b"".join([part[0] for part in parts])
            del parts  # frees the tokens of the range, which `tokens` holds again
            start = 0
            for joined in _gather(tokens, sizes, order, itemsize):
                batch_sizes = sizes[order[start : start + _JOINED_DOCUMENTS]]
                start += len(batch_sizes)
                yield joined, batch_sizes

    def _take(self, run: _Run, limit: int, itemsize: int) -> tuple[bytes, npt.NDArray[Any], npt.NDArray[Any]]:
        """The next documents of a run whose keys are below `limit`: tokens, sizes, keys."""
        end = bisect_left(_KeysOnDisk(self._files[2].fileno()), limit, run.next, run.end)
        count = end - run.next
        # pread: the three files have no common position to keep in step.
        sizes = np.frombuffer(os.pread(self._files[1].fileno(), 4 * count, 4 * run.next), np.int32)
        keys = np.frombuffer(os.pread(self._files[2].fileno(), 8 * count, 8 * run.next), np.uint64)
        n_bytes = int(sizes.sum(dtype=np.int64)) * itemsize
        tokens = os.pread(self._files[0].fileno(), n_bytes, run.offset)
        run.next, run.offset = end, run.offset + n_bytes
        return tokens, sizes, keys

    def delete(self) -> None:
        for file, path in zip(self._files, self._paths, strict=True):
            file.close()
            path.unlink(missing_ok=True)


class _KeysOnDisk:
    """A sorted file of uint64 as a sequence for `bisect`.

    Reads single keys: the pages of a memory map would count as memory of the process.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __getitem__(self, index: int) -> int:
        return int.from_bytes(os.pread(self._descriptor, 8, 8 * index), "little")

    def __len__(self) -> int:
        raise NotImplementedError("pass lo and hi to bisect")


class ExternalShuffle:
    """Collects documents in any number of batches and yields them shuffled, once per epoch in another order.

    folder    an existing folder for temporary files, which take `epochs` times the size of all tokens
    name      prefix of the temporary files
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
        self._buffered_bytes = self._buffered_documents = 0

    def add(self, tokens: bytes, sizes: npt.NDArray[np.int32], ordinals: npt.NDArray[np.uint64]) -> None:
        """Adds documents: concatenated tokens, sizes in tokens, and line numbers over all inputs as identifiers."""
        self._tokens.append(tokens)
        self._sizes.append(sizes)
        self._ordinals.append(ordinals)
        self._buffered_bytes += len(tokens)
        self._buffered_documents += len(sizes)
        self.n_documents += len(sizes)
        self.n_tokens += len(tokens) // self._itemsize
        if self._buffered_bytes >= RUN_BYTES or self._buffered_documents >= RUN_DOCUMENTS:
            self._write_runs()

    def _write_runs(self) -> None:
        tokens, sizes, ordinals = b"".join(self._tokens), np.concatenate(self._sizes), np.concatenate(self._ordinals)
        self._clear()  # before writing, which needs memory for the sorted copy
        for number, epoch in enumerate(self._epochs):
            epoch.write_run(tokens, sizes, splitmix64(ordinals, self._seed, number), self._itemsize)

    def shuffled(self) -> Iterator[Batch]:
        """All epochs, one after another, in batches. The files of an epoch are deleted when it has been read."""
        if self._sizes:  # the last run, which isn't full
            self._write_runs()
        for epoch in self._epochs:
            if self.n_documents:
                yield from epoch.merged(self._itemsize)
            epoch.delete()


def _gather(tokens: bytes, sizes: npt.NDArray[np.int32], order: npt.NDArray[np.intp], itemsize: int) -> Iterator[bytes]:
    """The documents of `tokens` in another order, concatenated in groups of `_JOINED_DOCUMENTS`."""
    ends = np.cumsum(sizes, dtype=np.int64) * itemsize
    starts = ends - sizes * np.int64(itemsize)
    view = memoryview(tokens)
    for first in range(0, len(order), _JOINED_DOCUMENTS):
        group = order[first : first + _JOINED_DOCUMENTS]
        # `map` over a memoryview: no copy and no bytecode per document, of which there may be a hundred million.
        yield b"".join(map(view.__getitem__, map(slice, starts[group].tolist(), ends[group].tolist())))

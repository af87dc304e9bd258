"""The copy of a rank's part of the state that is written while training goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from src.training.checkpoint.parts import Part, in_shards
from src.training.console import log
from src.training.hardware.memory_limits import free_memory

# Bytes of a file of tensors, and of a buffer.
SHARD_BYTES = 1 << 28
# Of the memory that is free at the first save. The rest is for what other programs and later steps need.
MEMORY_SHARE = 0.5
LEAST_BUFFERS = 2  # one that is filled while the other is written


PAGE_BYTES = 4096


class SnapshotBuffers:
    """Buffers in CPU memory, one for each shard of the state; kept between saves, since memory that is new to the
    process, and pinned memory above all, takes longer to get than to fill.

    Where they don't fit into memory there are fewer, and copying waits until one is written.
    """

    def __init__(self, processes: int = 1) -> None:
        """`processes` of this machine share its memory."""
        self._processes = processes
        self._buffers: list[Tensor] = []
        self._free: queue.Queue[Tensor] = queue.Queue()
        self._is_pinned = False
        self._preparation: threading.Thread | None = None
        self._failure: BaseException | None = None  # of the preparation

    def prepare(self, parts: list[Part]) -> None:
        """Begin to get the memory for these parts, in a thread."""
        if self._preparation is None:
            self._preparation = threading.Thread(target=self._prepare, args=(parts,), daemon=True)
            self._preparation.start()

    def copies(self, parts: list[Part], is_wanted: Callable[[], bool]) -> Iterator[tuple[list[Part], Tensor]]:
        """The shards, each with a buffer that holds its values one after the other. `release` gives a buffer back.

        Ends early when `is_wanted` says so while no buffer is free. The copies of the last call are released.
        """
        self.prepare(parts)
        assert self._preparation is not None
        self._preparation.join()
        if self._failure is not None:
            raise self._failure
        self._free = queue.Queue()
        for released in self._buffers:
            self._free.put(released)
        for shard in in_shards(parts, SHARD_BYTES):
            if (buffer := self._acquire(is_wanted)) is None:
                return
            offset = 0
            for part in shard:
                target = buffer[offset : offset + part.size].view(part.tensor.dtype)
                # pinned memory is filled by the GPU while the next copy is queued
                target.copy_(part.tensor, non_blocking=self._is_pinned)
                offset += part.size
            if self._is_pinned:
                torch.cuda.current_stream().synchronize()
            yield shard, buffer

    def release(self, buffer: Tensor) -> None:
        self._free.put(buffer)

    def _prepare(self, parts: list[Part]) -> None:
        try:
            self._allocate(parts)
        except BaseException as error:  # no memory
            self._failure = error

    def _allocate(self, parts: list[Part]) -> None:
        total = sum(part.size for part in parts)
        size, needed = min(SHARD_BYTES, total), -(-total // SHARD_BYTES)
        free = free_memory("cpu", self._processes)
        affordable = needed if free is None else int(MEMORY_SHARE * free / max(1, size))
        count = max(LEAST_BUFFERS, affordable) if affordable < needed else needed
        if count < needed:
            log(
                f"note: a copy of the state ({total / 1e9:.1f} GB per process) does not fit into half of the free "
                "memory: training waits for the disk while a state is saved"
            )
        self._is_pinned = any(part.tensor.is_cuda for part in parts)
        for _ in range(count):
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._is_pinned)
            buffer.numpy()[::PAGE_BYTES] = 0  # the system gives a page at its first write
            self._buffers.append(buffer)

    def _acquire(self, is_wanted: Callable[[], bool]) -> Tensor | None:
        while True:
            try:
                return self._free.get(timeout=1.0)
            except queue.Empty:
                if not is_wanted():
                    return None

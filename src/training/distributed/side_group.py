"""Objects that threads of the ranks exchange while training goes on."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

# A slow disk is no failure. Ranks that died are noticed by the collectives of training, long before.
TIMEOUT = timedelta(hours=2)

T = TypeVar("T")


def rank_and_world_size() -> tuple[int, int]:
    """Of this process; (0, 1) where there is only one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class SideGroup:
    """All ranks, over a group of its own on CPUs: collectives of two threads on one group would mix. Made by every
    rank, used by one thread of each."""

    def __init__(self) -> None:
        self.rank, self.world_size = rank_and_world_size()
        self._group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT) if self.world_size > 1 else None

    def meet(self, seconds: float) -> None:
        """Wait for all ranks to come here, so long at most; raises TimeoutError where one doesn't, RuntimeError when
        one is gone."""
        if self._group is not None:
            begin = time.monotonic()
            try:
                dist.monitored_barrier(self._group, timedelta(seconds=seconds))
            except RuntimeError as error:
                if time.monotonic() - begin < seconds:
                    raise
                raise TimeoutError(f"a rank has not come within {seconds:.0f} s ({error})") from error

    def exchange(self, value: T) -> list[T]:
        """The values of all ranks, by rank. Waits for all of them; raises RuntimeError when one is gone."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def close(self) -> None:
        """Give back the group's threads and connections. Its last exchange is over."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

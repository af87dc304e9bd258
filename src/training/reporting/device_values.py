"""Copies values from the device to the host without making either wait for the other."""

from __future__ import annotations

import torch
from torch import Tensor


class PendingValues:
    """Values that are being copied from the device. `read` waits for the work queued before the copy, not after it."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.is_cuda:
            # a copy to pageable memory would make the host wait
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            # the event lets `read` wait for this copy alone; synchronising the device would also wait for the next step
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        """The values, flattened in their order."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()

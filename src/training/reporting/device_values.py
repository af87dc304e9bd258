"""Numbers that travel between host and device without either waiting for the other."""

from __future__ import annotations

import torch
from torch import Tensor


class PendingValues:
    """Values that are being copied from the device. Reading them waits only for the work before the copy, not for what follows."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.is_cuda:
            # a copy to pageable memory would make the host wait
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()

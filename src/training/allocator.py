"""How memory for tensors is taken on a CPU: kept for the next step, or, where a run saves memory, given back at once."""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # of <malloc.h>
GROWTH_BYTES = 64 << 20  # by which the heap grows at least
MAPPED_BYTES = 1 << 20  # of a block that is mapped by itself


def set_up_malloc(lean: bool) -> None:
    """Tell glibc's malloc how to serve a run, before its first large tensor; elsewhere it does nothing.

    By default every tensor above 32 MB is mapped anew and unmapped after use, and each of its pages costs a fault: a fifth of the
    time of the demo's training step. So nothing is mapped by itself, and freed memory stays. The price is holes between blocks: before
    glibc 2.38 an aligned block doesn't fit into the hole that one of its size has left (its bug 14581).

    `lean` is for runs that recompute activations (--grad_cp 1): they take and free far more than they hold, and holes double their peak.
    There every larger tensor is mapped by itself, in huge pages where the system has them, and gone when it is freed. L4-D256, 16 x 256 tokens
    in fp32, on a busy machine: 0.76 GiB at the peak instead of 1.21, steps of 3.4 s instead of 2.8; 1.29 GiB and 2.4 s without --grad_cp.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    keep = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, GROWTH_BYTES))
    libc = ctypes.CDLL(None)
    for parameter, value in ((M_MMAP_THRESHOLD, MAPPED_BYTES),) if lean else keep:
        libc.mallopt(parameter, value)
    if lean:
        os.environ.setdefault(
            "THP_MEM_ALLOC_ENABLE", "1"
        )  # PyTorch reads it at its first tensor of 2 MB, and has no other switch

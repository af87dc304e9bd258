"""How memory for tensors is taken on a CPU: kept for the next step, or, where a run saves memory, given back at once."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # of <malloc.h>
GROWTH_BYTES = 64 << 20  # by which the heap grows at least
MAPPED_BYTES = 1 << 20  # of a block that is mapped by itself


def set_up_malloc(lean: bool) -> None:
    """Tell glibc's malloc how to serve a run, before its first large tensor; elsewhere it does nothing.

    By default every tensor above 32 MB is mapped anew and unmapped after use, and each of its pages costs a fault: a fifth of the
    time of the demo's training step. So nothing is mapped by itself, and freed memory stays. The price is skipped_samples between blocks: before
    glibc 2.38 an aligned block doesn't fit into the hole that one of its size has left (its bug 14581).

    `lean` is for runs that recompute activations (--grad_cp 1): they take and free far more than they hold, and skipped_samples double their peak.
    There every larger tensor is mapped by itself, and gone when it is freed. L8-D512, 4 x 512 tokens in fp32: 1.35 GB at the peak instead of
    2.10 and steps of 5.4 s instead of 3.6; 2.45 GB and 2.9 s without --grad_cp.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    keep = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, GROWTH_BYTES))
    libc = ctypes.CDLL(None)
    for parameter, value in ((M_MMAP_THRESHOLD, MAPPED_BYTES),) if lean else keep:
        libc.mallopt(parameter, value)

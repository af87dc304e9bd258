"""Freed memory stays with the process: a step on a CPU takes and frees the same gigabyte again and again."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of <malloc.h>
GROWTH_BYTES = 64 << 20  # by which the heap grows at least


def keep_freed_memory() -> None:
    """Tell glibc's malloc to map nothing by itself and to give nothing back; elsewhere it does nothing.

    By default every tensor above 32 MB is mapped anew and unmapped after use, and each of its pages costs a fault: a fifth of the
    time of the demo's training step. The price is a tenth more memory at the peak, for gaps between blocks.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, GROWTH_BYTES)):
        libc.mallopt(parameter, value)

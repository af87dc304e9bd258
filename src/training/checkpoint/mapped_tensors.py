"""Tensors of a whole model in memory that a disk stands behind, for processes that hold only a part of it."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor


def mapped_tensors(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, folder: Path) -> dict[str, Tensor]:
    """Tensors without values, each with memory of its own, mapped from a temporary file in `folder`: the system writes
    to it what does not fit into memory. The file has no name, and its space is free again when the tensors are gone or
    the process has ended. Raises OSError where the disk is full.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    length = sum(sizes.values()) * dtype.itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            # All of it at once: a disk that is full later would end the process with a signal.
            os.posix_fallocate(file.fileno(), 0, length)
        else:
            file.truncate(length)
        memory = mmap.mmap(file.fileno(), length)
    tensors, offset = {}, 0
    for name, size in sizes.items():
        tensors[name] = torch.frombuffer(memory, dtype=dtype, count=size, offset=offset).view(*shapes[name])
        offset += size * dtype.itemsize
    return tensors

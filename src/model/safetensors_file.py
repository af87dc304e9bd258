"""Writes safetensors files, whole and durable whatever the library does beneath."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from src.files import atomic_path


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` to `path`, whole or not at all; they may be on any device. Raises OSError."""
    from safetensors.torch import save_file

    # save_file of safetensors 0.8 renames a file of its own, of mode 0600 and not synced, over the path that it gets.
    with atomic_path(path) as temporary:
        save_file({name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}, temporary, metadata)

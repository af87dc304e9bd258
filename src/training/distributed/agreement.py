"""What all ranks of a run must have in common at its start: flags, code, torch. A rank that differs is named."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from src.config import RunConfig
from src.training.distributed.process_group import ProcessGroup

# What may differ between machines: how many processes each one starts, and what only concerns it.
PER_MACHINE = {"devices", "num_nodes", "rdzv_endpoint", "num_workers", "enable_progress_bar"}
SOURCES = Path(__file__).parents[3]


def refuse_other_starts(process_group: ProcessGroup, config: RunConfig) -> None:
    """Raises UserError on every rank when one was started with other flags, code or torch than rank 0."""
    if process_group.world_size == 1:
        return
    flags = {name: value for name, value in config.as_settings().items() if name not in PER_MACHINE}
    process_group.refuse_other_values(flags, flags=True)
    process_group.refuse_other_values({"the code": code_version(), "torch": torch.__version__}, flags=False)


def code_version() -> str:
    """A hash of the sources that a run executes."""
    digest = hashlib.sha256()
    for folder in ("src", "cuda"):
        for path in sorted((SOURCES / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                digest.update(str(path.relative_to(SOURCES)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]

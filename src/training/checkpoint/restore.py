"""From a full state back to a training module, to plain weights or to an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from src.config import ModelConfig
from src.model import RWKV7
from src.model.shared_memory import IDLE_IN_LAYER_0
from src.training.checkpoint.manifest import DamagedStateError
from src.training.checkpoint.mapped_tensors import mapped_tensors
from src.training.checkpoint.parts import own_parts, owners, state_parts, whole_part
from src.training.checkpoint.reader import StateReader
from src.training.distributed.engine_adamw import EngineAdamW
from src.training.distributed.side_group import rank_and_world_size
from src.training.module import TrainingModule


@torch.no_grad()
def load_full_state(module: pl.LightningModule, reader: StateReader, counters: dict[str, float]) -> None:
    """Load masters, moments and idle parameters from `reader`, and the optimizer's `counters`.

    Every rank takes part: it reads what it holds, and of what all hold its share, which it then sends to the others.
    Raises DamagedStateError, on every rank, when one of them finds the state damaged.
    """
    assert isinstance(module, TrainingModule)
    rank, world_size = rank_and_world_size()
    parts = state_parts(module)
    owner = owners(parts, world_size)
    damage = ""
    try:
        reader.load(own_parts(parts, owner, rank), rank)
    except DamagedStateError as error:
        damage = str(error)
    _raise_damage(damage, world_size)
    if world_size > 1:
        for part in parts:
            if part.is_replicated:
                dist.broadcast(part.tensor, src=owner[part.key])
    if isinstance(module.optimizer, EngineAdamW):
        module.optimizer.round_masters_into_parameters()
    else:
        for parameter in module.optimizer.parameters:
            parameter.copy_(module.optimizer.master_of(parameter))
    module.optimizer.load_counters(counters)


def _raise_damage(damage: str, world_size: int) -> None:
    """On every rank, what the first of them found."""
    found: list[Any] = [damage]
    if world_size > 1:
        found = [""] * world_size
        dist.all_gather_object(found, damage)
    if damage := next(filter(None, found), ""):
        raise DamagedStateError(damage)


def weights_of_state(reader: StateReader, sizes: ModelConfig, dtype: torch.dtype, folder: Path) -> dict[str, Tensor]:
    """The plain weights in `dtype` of a model of these sizes, mapped from a temporary file in `folder`: they may be
    larger than this machine's memory. Raises DamagedStateError when one is missing."""
    with torch.device("meta"):
        model = RWKV7(sizes).state_dict()
    weights = mapped_tensors({name: tensor.shape for name, tensor in model.items()}, dtype, folder)
    reader.load(
        whole_part(f"{name}/{'idle' if name in IDLE_IN_LAYER_0 else 'master'}", tensor)
        for name, tensor in weights.items()
    )
    return weights


def held_of_state(reader: StateReader) -> dict[str, Tensor]:
    """The trained and idle parameters beside a frozen base, fp32."""
    tensors = reader.tensors(lambda key: key.endswith(("/master", "/idle")))
    return {key.rpartition("/")[0]: tensor.float() for key, tensor in tensors.items()}

"""Weights and optimizer state by parameter name: one format for every strategy and any number of processes.

Per trained parameter: `master` (fp32 weights), `exp_avg` and `exp_avg_sq` (Adam's moments, fp32); per idle one (layer 0's value
residual): `idle`. Under ZeRO each process holds parts; they pass through rank 0 one tensor at a time, bit by bit as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from src.errors import UserError
from src.training.distributed.sharded_init import gathered
from src.training.distributed.zero import EngineAdamW
from src.training.module import TrainingModule

KINDS = ("master", "exp_avg", "exp_avg_sq")


def gather_full_state(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, tensors by kind) of each parameter on rank 0, on its device; {} on the others, which have to go through all of it too."""
    optimizer = _module(module).optimizer
    for name, parameter in _module(module).model.named_parameters():
        if isinstance(optimizer, EngineAdamW):
            if parameter.requires_grad:
                kinds = {kind: _collect(optimizer, parameter, kind) for kind in KINDS}
            else:
                kinds = {"idle": _whole(parameter)}
        elif parameter.requires_grad:
            moments = optimizer.moments(parameter)
            kinds = {"master": optimizer.master_of(parameter).detach(), **{kind: moments[kind] for kind in KINDS[1:]}}
        else:
            kinds = {"idle": parameter.detach()}
        yield name, kinds if trainer.is_global_zero else {}


@torch.no_grad()
def scatter_full_state(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    shards: Iterable[dict[str, Tensor]],
    counters: dict[str, float],
) -> None:
    """Puts back what `gather_full_state` gave: `shards` map `name/kind` to tensors; only rank 0's are looked at. `counters` are the
    optimizer's numbers that belong to no parameter.

    Every rank takes part. Raises ValueError, on every rank, when a tensor is missing.
    """
    optimizer = _module(module).optimizer
    parameters = dict(_module(module).model.named_parameters())
    left = {
        f"{name}/{kind}"
        for name, parameter in parameters.items()
        for kind in (KINDS if parameter.requires_grad else ("idle",))
    }
    for key, tensor in _from_rank_zero(trainer, shards, left, parameters):
        name, kind = key.rsplit("/", 1)
        parameter = parameters[name]
        if kind == "idle":
            _set_whole(parameter, tensor)
        elif isinstance(optimizer, EngineAdamW):
            if part := optimizer.part_of(parameter):
                optimizer.tensor_of(part, kind).copy_(tensor.flatten().narrow(0, part.start, part.count))
        elif kind == "master":
            optimizer.master_of(parameter).copy_(tensor)
            parameter.copy_(tensor)
        else:
            optimizer.moments(parameter)[kind].copy_(tensor)
        left.discard(key)
    if left:
        raise UserError(
            f"the saved state lacks {sorted(left)[0]}; it belongs to another model: give this one a --proj_dir of its own"
        )
    if isinstance(optimizer, EngineAdamW):
        optimizer.round_masters_into_parameters()
    optimizer.load_counters(counters)


def gather_weights(model: nn.Module, rank: int) -> dict[str, Tensor] | None:
    """The model's state dict on the CPU, in the run's precision, on rank 0; None on the others, which take part (stage 3)."""
    weights = {}
    for name, parameter in model.named_parameters():
        whole = _whole(parameter) if hasattr(parameter, "ds_id") else parameter.detach()
        if rank == 0:
            weights[name] = whole.to("cpu").contiguous()
    assert rank != 0 or hasattr(next(model.parameters()), "ds_id") or weights.keys() == model.state_dict().keys()
    return weights if rank == 0 else None


def _from_rank_zero(
    trainer: pl.Trainer, shards: Iterable[dict[str, Tensor]], wanted: set[str], parameters: dict[str, nn.Parameter]
) -> Iterator[tuple[str, Tensor]]:
    """Each wanted (name/kind, tensor) of rank 0's shards, on every rank."""
    if trainer.world_size == 1:
        yield from ((key, tensor) for shard in shards for key, tensor in shard.items() if key in wanted)
        return
    device = trainer.strategy.root_device
    at = iter(shards) if trainer.is_global_zero else None
    while True:
        shard = next(at, None) if at is not None else None
        keys = trainer.strategy.broadcast(None if shard is None else [key for key in shard if key in wanted])
        if keys is None:
            return
        for key in keys:
            parameter = parameters[key.rsplit("/", 1)[0]]
            dtype = parameter.dtype if key.endswith("/idle") else torch.float32
            shape = getattr(parameter, "ds_shape", parameter.shape)
            tensor = torch.empty(shape, dtype=dtype, device=device) if shard is None else shard[key].to(device, dtype)
            dist.broadcast(tensor, src=0)
            yield key, tensor


def _collect(optimizer: EngineAdamW, parameter: nn.Parameter, kind: str) -> Tensor:
    """The parts of all processes put together on rank 0 (what the others get is of no use)."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    # added as integers, where the other ranks have zeros: that keeps every bit, the sign of a zero too
    bits = torch.zeros(shape, dtype=torch.int32, device=parameter.device)
    if part := optimizer.part_of(parameter):
        bits.view(-1).narrow(0, part.start, part.count).copy_(optimizer.tensor_of(part, kind).view(torch.int32))
    dist.reduce(bits, dst=0)
    return bits.view(torch.float32)


def _whole(parameter: nn.Parameter) -> Tensor:
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    with gathered(parameter):
        return parameter.detach().clone()


def _set_whole(parameter: nn.Parameter, tensor: Tensor) -> None:
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(tensor)
        return
    with gathered(parameter, by_rank=0):
        parameter.copy_(tensor)


def _module(module: pl.LightningModule) -> TrainingModule:
    assert isinstance(module, TrainingModule)
    return module

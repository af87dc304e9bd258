"""What a run trains, gathered on rank 0: plain weights, or what is beside frozen ones."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from src.training.checkpoint.mapped_tensors import mapped_tensors
from src.training.checkpoint.parts import held_parameters
from src.training.console import is_rank_zero
from src.training.distributed.deepspeed_internals import is_partitioned, whole_shape
from src.training.distributed.engine_adamw import EngineAdamW
from src.training.distributed.sharded_init import gathered
from src.training.module import TrainingModule


def gather_weights(model: nn.Module, folder: Path) -> dict[str, Tensor] | None:
    """The model's state dict on the CPU, in the run's precision, on rank 0; None on the others, which take part (stage
    3).

    Of a model that stage 3 divided, one parameter at a time is whole on the ranks; the state dict is mapped from a
    temporary file in `folder`, as large as the weights.
    """
    parameters = dict(model.named_parameters())
    if not any(map(is_partitioned, parameters.values())):
        if not is_rank_zero():
            return None
        return {name: parameter.detach().to("cpu").contiguous() for name, parameter in parameters.items()}
    weights: dict[str, Tensor] | None = None
    if is_rank_zero():
        dtype = next(iter(parameters.values())).dtype  # of all: a partitioned model has no adapter
        weights = mapped_tensors({name: whole_shape(p) for name, p in parameters.items()}, dtype, folder)
    for name, parameter in parameters.items():
        with gathered(parameter):
            if weights is not None:
                weights[name].copy_(parameter.detach())
    return weights


def gather_held(module: TrainingModule) -> dict[str, Tensor] | None:
    """What a model has beside its frozen parts, fp32 on the CPU, on rank 0; None on the others, which take part. Its
    parameters are whole on every rank: stage 3 divides only models that are trained as a whole."""
    tensors = {}
    for name, parameter in held_parameters(module.model).items():
        tensor = _whole_master(module, parameter) if parameter.requires_grad else parameter.detach()
        if is_rank_zero():
            tensors[name] = tensor.to("cpu", torch.float32, copy=True)
    return tensors if is_rank_zero() else None


def _whole_master(module: TrainingModule, parameter: nn.Parameter) -> Tensor:
    """The fp32 weights of a parameter, on rank 0; under ZeRO's stages 1 and 2 its partitions combined."""
    optimizer = module.optimizer
    if not isinstance(optimizer, EngineAdamW):
        return optimizer.master_of(parameter).detach()
    # Summed as integers, with zeros for the other ranks' partitions: that keeps every bit, the sign of a zero too.
    bits = torch.zeros(parameter.shape, dtype=torch.int32, device=parameter.device)
    if part := optimizer.part_of(parameter):
        bits.view(-1).narrow(0, part.start, part.count).copy_(optimizer.tensor_of(part, "master").view(torch.int32))
    dist.reduce(bits, dst=0)
    return bits.view(torch.float32)

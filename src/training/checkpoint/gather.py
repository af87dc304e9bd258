"""What a run trains, gathered on rank 0: plain weights, or what is beside frozen ones."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from src.training.checkpoint.parts import held_parameters
from src.training.console import is_rank_zero
from src.training.distributed.deepspeed_internals import is_partitioned
from src.training.distributed.engine_adamw import EngineAdamW
from src.training.distributed.sharded_init import gathered
from src.training.module import TrainingModule


def gather_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """The model's state dict on the CPU, in the run's precision, on rank 0; None on the others, which take part (stage
    3)."""
    weights = {}
    for name, parameter in model.named_parameters():
        tensor = whole(parameter)
        if is_rank_zero():
            weights[name] = tensor.to("cpu").contiguous()
    return weights if is_rank_zero() else None


def gather_held(module: TrainingModule) -> dict[str, Tensor] | None:
    """What a model has beside its frozen parts, fp32 on the CPU, on rank 0; None on the others, which take part."""
    tensors = {}
    for name, parameter in held_parameters(module.model).items():
        tensor = _whole_master(module, parameter) if parameter.requires_grad else whole(parameter)
        if is_rank_zero():
            tensors[name] = tensor.to("cpu", torch.float32, copy=True)
    return tensors if is_rank_zero() else None


def whole(parameter: nn.Parameter) -> Tensor:
    """The parameter's values; under ZeRO's stage 3 gathered from all ranks, which take part."""
    if not is_partitioned(parameter):
        return parameter.detach()
    with gathered(parameter):
        return parameter.detach().clone()


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

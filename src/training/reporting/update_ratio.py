"""The size of the last optimizer step relative to the weights, from Adam's moments, without a copy of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from src.training.distributed.engine_adamw import EngineAdamW
from src.training.optim import MasterAdamW, adam_state
from src.training.reporting.sink import UPDATE_GROUPS

CHUNK_NUMEL = 1 << 26  # elements whose update exists at a time: 256 MiB in fp32


@torch.no_grad()
def update_ratios(optimizer: MasterAdamW | EngineAdamW) -> Tensor:
    """|update| / |weights| of the last step by UPDATE_GROUPS, fp32 [3] on the optimizer's device; 0 for a skipped step.

    With Adam's moments m, v after step t, A = lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps), weights w after
    the step and decay d: the step subtracted (A + lr d w) / (1 - lr d) from them. Collective under ZeRO; nothing waits
    for the device.
    """
    squares = torch.zeros(len(UPDATE_GROUPS), 2, device=optimizer.grad_norm.device)
    for number, group, weights, states in _groups(optimizer):
        (beta1, beta2), decay = group["betas"], group["lr"] * group["weight_decay"]
        for indices in _chunks(weights):
            w, chunk_states = [weights[i] for i in indices], [states[i] for i in indices]
            t = chunk_states[0]["step"].to(w[0].device)
            # sqrt(v) * rsqrt(1 - beta2^t) + eps, inverted, times m: in place, so that one buffer per chunk is enough
            update = torch._foreach_sqrt([state["exp_avg_sq"] for state in chunk_states])
            torch._foreach_mul_(update, (1 - beta2**t).rsqrt())
            torch._foreach_add_(update, group["eps"])
            torch._foreach_reciprocal_(update)
            torch._foreach_mul_(update, [state["exp_avg"] for state in chunk_states])
            torch._foreach_mul_(update, group["lr"] / (1 - beta1**t))
            torch._foreach_add_(update, w, alpha=decay)
            squares[number, 0] += _sum_of_squares(list(update)) / (1 - decay) ** 2
            squares[number, 1] += _sum_of_squares(w)
    if isinstance(optimizer, EngineAdamW):
        dist.all_reduce(squares)  # each rank has summed its own shard
    ratios = (squares[:, 0] / squares[:, 1].clamp(min=1e-30)).sqrt()
    # after a skipped step the moments are those of the step before, whose update would be reported twice
    return torch.where(torch.isfinite(optimizer.grad_norm), ratios, 0.0)


def _groups(
    optimizer: MasterAdamW | EngineAdamW,
) -> Iterator[tuple[int, dict[str, Any], list[Tensor], list[dict[str, Tensor]]]]:
    """(number, group, fp32 weights, their Adam states) of each group; under ZeRO the shards that this process holds."""
    if isinstance(optimizer, EngineAdamW):
        for i, flat in optimizer.flats_by_group():
            group = optimizer.param_groups[i]
            yield group["number"], group, [flat.detach()], [adam_state(optimizer, flat)]
        return
    for group in optimizer.param_groups:
        weights = [optimizer.master_of(parameter).detach() for parameter in group["params"]]
        moments = [optimizer.moments(parameter) for parameter in group["params"]]
        defaults = optimizer.defaults  # betas and eps are set once for all groups
        yield group["number"], {**defaults, **group}, weights, moments


def _chunks(tensors: list[Tensor]) -> Iterator[list[int]]:
    """Indices of consecutive tensors of at most CHUNK_NUMEL elements in all; a larger tensor is a chunk of its own."""
    chunk: list[int] = []
    size = 0
    for i, tensor in enumerate(tensors):
        if chunk and size + tensor.numel() > CHUNK_NUMEL:
            yield chunk
            chunk, size = [], 0
        chunk.append(i)
        size += tensor.numel()
    if chunk:
        yield chunk


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).square().sum()

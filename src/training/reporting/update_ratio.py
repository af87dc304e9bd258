"""How large the last optimizer step was beside the weights, group by group: found from Adam's moments, without a copy of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from src.training.distributed.engine_adamw import EngineAdamW
from src.training.optim import MasterAdamW, adam_state
from src.training.reporting.sink import UPDATE_GROUPS

ELEMENTS_AT_A_TIME = 1 << 26  # bounds what is computed beside the weights: 256 MiB


@torch.no_grad()
def update_ratios(optimizer: MasterAdamW | EngineAdamW) -> Tensor:
    """|update| / |weights| of the last step for each of UPDATE_GROUPS, fp32 [3] on the optimizer's device; 0 for a step that was left out.

    With Adam's moments m, v after step t, A = lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps), weights w after the step and
    decay d: the step took (A + lr d w) / (1 - lr d) from them. Under ZeRO every rank takes part; nothing waits for the device.
    """
    squares = torch.zeros(len(UPDATE_GROUPS), 2, device=optimizer.grad_norm.device)
    for number, group, weights, states in _members(optimizer):
        (beta1, beta2), decay = group["betas"], group["lr"] * group["weight_decay"]
        for part in _parts(weights):
            w, own = [weights[i] for i in part], [states[i] for i in part]
            t = own[0]["step"].to(w[0].device)
            update = torch._foreach_sqrt([state["exp_avg_sq"] for state in own])
            torch._foreach_mul_(update, (1 - beta2**t).rsqrt())
            torch._foreach_add_(update, group["eps"])
            torch._foreach_reciprocal_(update)
            torch._foreach_mul_(update, [state["exp_avg"] for state in own])
            torch._foreach_mul_(update, group["lr"] / (1 - beta1**t))
            torch._foreach_add_(update, w, alpha=decay)
            squares[number, 0] += _sum_of_squares(list(update)) / (1 - decay) ** 2
            squares[number, 1] += _sum_of_squares(w)
    if isinstance(optimizer, EngineAdamW):
        dist.all_reduce(squares)
    ratios = (squares[:, 0] / squares[:, 1].clamp(min=1e-30)).sqrt()
    return torch.where(torch.isfinite(optimizer.grad_norm), ratios, 0.0)


def _members(
    optimizer: MasterAdamW | EngineAdamW,
) -> Iterator[tuple[int, dict[str, Any], list[Tensor], list[dict[str, Tensor]]]]:
    """(number, group, fp32 weights, their Adam states) of each group; under ZeRO the parts that this process keeps."""
    if isinstance(optimizer, EngineAdamW):
        for number, flat in optimizer.flats_by_group():
            yield number, optimizer.param_groups[number], [flat.detach()], [adam_state(optimizer, flat)]
        return
    for number, group in enumerate(optimizer.param_groups):
        weights = [optimizer.master_of(parameter).detach() for parameter in group["params"]]
        defaults = optimizer.defaults
        yield number, {**defaults, **group}, weights, [optimizer.moments(parameter) for parameter in group["params"]]


def _parts(tensors: list[Tensor]) -> Iterator[list[int]]:
    """Their numbers, as many at a time as stay below ELEMENTS_AT_A_TIME together."""
    part: list[int] = []
    size = 0
    for i, tensor in enumerate(tensors):
        if part and size + tensor.numel() > ELEMENTS_AT_A_TIME:
            yield part
            part, size = [], 0
        part.append(i)
        size += tensor.numel()
    if part:
        yield part


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).square().sum()

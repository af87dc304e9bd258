"""All that this project uses of DeepSpeed that is not its public interface, as of version READ_FROM.

The public functions (`safe_get_full_fp32_param` and others of `deepspeed.utils`) give whole tensors, gathered on every
rank, or copies of stage 3's partitions. A state needs what a rank holds, in place, and where it lies in the whole, for
every stage. `zero` below is the ZeRO optimizer, `engine.optimizer`. tests/test_deepspeed_internals.py compares the
source of what is used with the one that was read.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

READ_FROM = "0.19.8"


@dataclass(frozen=True)
class Partition:
    """The `count` values of a flattened parameter from `start` on, which this rank keeps in `flat` from `offset` on."""

    flat: nn.Parameter
    offset: int
    start: int
    count: int


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether stage 3 divided this parameter over the ranks."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Of a partitioned parameter, `shape` is empty."""
    return getattr(parameter, "ds_shape", parameter.shape)


def partition_of(zero: Any, parameter: nn.Parameter) -> Partition | None:
    """Where this rank's part of a trained parameter's fp32 weights lies; None when it holds none of them."""
    if is_partitioned(parameter):
        # Stage 3 divides every parameter into equal parts, the last one padded.
        group, offset, count = zero.grad_position[zero.get_param_id(parameter)]
        start = count * dist.get_rank()
        count = min(count, parameter.ds_numel - start)  # type: ignore[attr-defined]
        return Partition(zero.fp32_partitioned_groups_flat[group], offset, start, count) if count > 0 else None
    # Stages 1 and 2 flatten each group and divide it into equal parts: a parameter may lie in one or several.
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    in_flat, in_parameter = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
    return Partition(flat, in_flat.start, in_parameter.start, in_parameter.numel)


def partition_in_place(parameter: nn.Parameter) -> tuple[Tensor, int]:
    """This rank's part of a parameter that stage 3 divided, in the model's precision, and where it starts; it may be
    empty."""
    padded: Tensor = parameter.ds_tensor.data  # type: ignore[attr-defined]
    start = padded.numel() * dist.get_rank()
    count = max(0, min(padded.numel(), parameter.ds_numel - start))  # type: ignore[attr-defined]
    return padded.narrow(0, 0, count), start


def flats(zero: Any) -> list[nn.Parameter]:
    """This rank's fp32 weights: a tensor per parameter group, under stage 3 one or more."""
    return zero.fp32_partitioned_groups_flat if _is_stage_3(zero) else zero.single_partition_of_fp32_groups


def flats_by_group(zero: Any) -> Iterator[tuple[int, nn.Parameter]]:
    """(index of the parameter group, this rank's fp32 weights of it), padding included."""
    for i, flat in enumerate(flats(zero)):
        yield (zero.sub_group_to_group_id[i] if _is_stage_3(zero) else i), flat


def round_masters_into_parameters(zero: Any) -> None:
    """Copy the fp32 weights into the model's parameters, rounded to their dtype. Every rank takes part."""
    if not _is_stage_3(zero):
        zero.update_lp_params()
        return
    for i in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(i)
    if zero.persistent_parameters:
        # Small parameters are kept whole on every rank: the partitions set above have to reach these copies.
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def gradient_norm(zero: Any) -> float | Tensor:
    """Of the last step, before clipping; infinite when fp16 overflowed, 0 before the first step."""
    norm = getattr(zero, "_global_grad_norm", None)
    return 0.0 if norm is None else norm


def computes_in_fp16(zero: Any) -> bool:
    """Whether the engine scales the loss and skips steps by itself."""
    return zero.dtype == torch.float16


def loss_scale(zero: Any) -> tuple[float, int]:
    """The scale, and the good steps since it last changed (0 where it is fixed)."""
    scaler = zero.loss_scaler
    return float(scaler.cur_scale), getattr(scaler, "cur_iter", 0) - getattr(scaler, "last_overflow_iter", 0)


def set_loss_scale(zero: Any, scale: float, good_steps: int) -> None:
    """What `loss_scale` gave; nothing where the scale is fixed."""
    scaler = zero.loss_scaler
    if hasattr(scaler, "last_overflow_iter"):  # fp16
        # the scaler counts from its last overflow, not the good steps themselves
        scaler.cur_scale = scale
        scaler.last_overflow_iter = scaler.cur_iter - good_steps


def allow_least_loss_scale(zero: Any) -> None:
    """fp16: no exception when the scale has reached its minimum; NonFiniteMonitor rolls back."""
    zero.loss_scaler.raise_error_at_min_scale = False


def skip_norm_check(zero: Any) -> None:
    """Turn off the engine's own check of the gradient norm, since `EngineAdamW` checks it on the device."""
    # The engine copies the norm to the host at every step, and so waits for the device. A release without this function
    # keeps that wait; the results are the same.
    module = importlib.import_module(type(zero).__module__)
    if hasattr(module, "is_invalid_grad_norm"):
        module.is_invalid_grad_norm = lambda norm: False  # type: ignore[attr-defined]


def leave_out_shm_comm(deepspeed: Any) -> None:
    """This extension for CPU collectives takes two minutes to build, and gloo does the same work."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _is_stage_3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")

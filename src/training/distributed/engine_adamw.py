"""AdamW inside DeepSpeed's ZeRO engine, and where this rank's partition of each parameter lies.

DeepSpeed has no public interface to its partitions; what this file reads of the engine (`fp32_partitioned_groups_flat`,
`single_partition_of_fp32_groups`, `_hp_mapping`, `grad_position`) is that of the range in `zero.REQUIREMENT`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from src.training.optim import adam_state


@dataclass(frozen=True)
class Part:
    """The `count` values of a flattened parameter from `start` on, which this rank keeps in `flat` from `offset` on."""

    flat: nn.Parameter
    offset: int
    start: int
    count: int


class EngineAdamW(torch.optim.AdamW):
    """AdamW inside a ZeRO engine: the mathematics of `MasterAdamW` on this rank's fp32 partition of the weights.

    The engine calls `step` once per group, with flattened parameters, after it has computed the global gradient norm.
    Clipping and skipping (a norm that is not finite) follow from that norm on the device, through AdamW's `grad_scale`
    and `found_inf`: no step waits for the device.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, grad_clip: float
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.grad_clip = grad_clip
        self.device = groups[0]["params"][0].device
        self.loss_scale = torch.ones((), device=self.device)  # fp16: the engine scales the loss itself
        self._skipped = torch.zeros((), device=self.device)
        self._engine: Any = None

    def attach(self, engine: Any) -> None:
        """Connect with the engine that calls `step`; needed before the first step."""
        self._engine = engine
        # fp16: DeepSpeed would raise an exception when the scale has reached its minimum; NonFiniteMonitor rolls back.
        self.zero.loss_scaler.raise_error_at_min_scale = False

    @property
    def zero(self) -> Any:
        """The ZeRO optimizer around this one."""
        return self._engine.optimizer

    @property
    def grad_norm(self) -> Tensor:
        """Global gradient norm of the last step before clipping; infinite when that step was skipped."""
        norm = getattr(self.zero, "_global_grad_norm", None)
        return torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32, device=self.device)

    @property
    def skipped_steps(self) -> Tensor:
        """The number of skipped steps, those of the engine (fp16), which doesn't call `step` then, included."""
        return self._skipped + self._engine.skipped_steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One group's part of an optimizer step."""
        assert closure is None, "the engine has run backward already"
        norm = self.grad_norm
        # 1e-6 as in torch.nn.utils.clip_grad_norm_
        clip = self.grad_clip / (norm + 1e-6) if self.grad_clip else torch.ones_like(norm)
        # with offload the weights are on the CPU, the norm on the GPU
        weights_device = next(p.device for group in self.param_groups for p in group["params"])
        # fused AdamW divides gradients by `grad_scale`, and leaves everything as it is where `found_inf` is 1
        self.grad_scale = (1.0 / clip.clamp(max=1.0)).to(weights_device)
        self.found_inf = (~torch.isfinite(norm)).float().to(weights_device)
        return super().step()

    def count_step(self) -> None:
        """Count a skipped step; called once after `step` of all groups."""
        # in fp16 the engine counts
        if self.zero.dtype != torch.float16:
            self._skipped += ~torch.isfinite(self.grad_norm)

    # ---- the state by parameter, of which this rank holds a partition
    # --------------------------------------------------

    def part_of(self, parameter: nn.Parameter) -> Part | None:
        """Where this rank's part of a parameter lies; None when it holds none of it."""
        zero = self.zero
        if hasattr(parameter, "ds_id"):
            # Stage 3 divides every parameter into equal parts, the last one padded.
            group, offset, count = zero.grad_position[zero.get_param_id(parameter)]
            start = count * dist.get_rank()
            count = min(count, parameter.ds_numel - start)  # type: ignore[attr-defined]
            return Part(zero.fp32_partitioned_groups_flat[group], offset, start, count) if count > 0 else None
        # Stages 1 and 2 flatten each group and divide it into equal parts: a parameter may lie in one or several.
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        in_flat, in_parameter = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
        return Part(flat, in_flat.start, in_parameter.start, in_parameter.numel)

    def tensor_of(self, part: Part, kind: str) -> Tensor:
        """The part of `master`, `exp_avg` or `exp_avg_sq` [count], fp32; zeros before the first step."""
        whole = part.flat if kind == "master" else adam_state(self, part.flat)[kind]
        return whole.detach().narrow(0, part.offset, part.count)

    def _flats(self) -> list[nn.Parameter]:
        zero = self.zero
        return zero.fp32_partitioned_groups_flat if _is_stage_3(zero) else zero.single_partition_of_fp32_groups

    def flats_by_group(self) -> Iterator[tuple[int, nn.Parameter]]:
        """(index of the parameter group, this rank's fp32 weights of it), padding included."""
        zero = self.zero
        for i, flat in enumerate(self._flats()):
            yield (zero.sub_group_to_group_id[i] if _is_stage_3(zero) else i), flat

    def counters(self) -> dict[str, float]:
        """The optimizer's scalars, with the names of `MasterAdamW.counters`."""
        scaler = self.zero.loss_scaler
        return {
            "adam_steps": adam_state(self, self._flats()[0])["step"].item(),
            "skipped_steps": self.skipped_steps.item(),
            "loss_scale": float(scaler.cur_scale),
            "good_steps": float(getattr(scaler, "cur_iter", 0) - getattr(scaler, "last_overflow_iter", 0)),
        }

    def load_counters(self, counters: dict[str, float]) -> None:
        """Set what `counters` gave, of this class or of `MasterAdamW`."""
        for flat in self._flats():
            adam_state(self, flat)["step"].fill_(counters["adam_steps"])
        self._skipped.fill_(counters["skipped_steps"])
        scaler = self.zero.loss_scaler
        if hasattr(scaler, "last_overflow_iter") and "loss_scale" in counters:  # fp16
            # the scaler counts from its last overflow, not the good steps themselves
            scaler.cur_scale = counters["loss_scale"]
            scaler.last_overflow_iter = scaler.cur_iter - int(counters["good_steps"])

    @torch.no_grad()
    def round_masters_into_parameters(self) -> None:
        """Copy the fp32 masters into the model's weights, rounded to their dtype. Every rank takes part."""
        zero = self.zero
        if not _is_stage_3(zero):
            zero.update_lp_params()
            return
        for i in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(i)
        if zero.persistent_parameters:
            # Small parameters are kept whole on every rank: the partitions set above have to reach these copies.
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _is_stage_3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")

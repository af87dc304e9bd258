"""AdamW inside DeepSpeed's ZeRO engine, and the partitions of its state that this rank holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from src.training.distributed import deepspeed_internals
from src.training.distributed.deepspeed_internals import Partition
from src.training.optim import adam_state


class EngineAdamW(torch.optim.AdamW):
    """AdamW inside a ZeRO engine: the mathematics of `MasterAdamW` on this rank's fp32 partition of the weights.

    The engine calls `step` once per group, with flattened parameters, after it has computed the global gradient norm.
    Clipping and skipping (a norm that is not finite) follow from that norm on the device, through AdamW's `grad_scale`
    and `found_inf`: no step waits for the device.

    PyTorch's fused AdamW, not the op of src/ops/adamw.py that steps on bf16 gradients: the engine makes fp32 gradients
    of its partition before `step` and rounds the fp32 weights after it, in functions of its own. These passes are over
    a rank's partition only: with N ranks 1 / N of the parameters.
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
        deepspeed_internals.allow_least_loss_scale(self.zero)

    @property
    def zero(self) -> Any:
        """The ZeRO optimizer around this one."""
        return self._engine.optimizer

    @property
    def grad_norm(self) -> Tensor:
        """Global gradient norm of the last step before clipping; infinite when that step was skipped."""
        norm = deepspeed_internals.gradient_norm(self.zero)
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device)

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
        if not deepspeed_internals.computes_in_fp16(self.zero):
            self._skipped += ~torch.isfinite(self.grad_norm)

    # ---- the state by parameter, of which this rank holds a partition
    # --------------------------------------------------

    def part_of(self, parameter: nn.Parameter) -> Partition | None:
        """Where this rank's part of a trained parameter lies; None when it holds none of it."""
        return deepspeed_internals.partition_of(self.zero, parameter)

    def tensor_of(self, part: Partition, kind: str) -> Tensor:
        """The part of `master`, `exp_avg` or `exp_avg_sq` [count], fp32; zeros before the first step."""
        whole = part.flat if kind == "master" else adam_state(self, part.flat)[kind]
        return whole.detach().narrow(0, part.offset, part.count)

    def flats_by_group(self) -> Iterator[tuple[int, nn.Parameter]]:
        """(index of the parameter group, this rank's fp32 weights of it), padding included."""
        return deepspeed_internals.flats_by_group(self.zero)

    def counters(self) -> dict[str, float]:
        """The optimizer's scalars, with the names of `MasterAdamW.counters`."""
        scale, good_steps = deepspeed_internals.loss_scale(self.zero)
        return {
            "adam_steps": adam_state(self, deepspeed_internals.flats(self.zero)[0])["step"].item(),
            "skipped_steps": self.skipped_steps.item(),
            "loss_scale": scale,
            "good_steps": float(good_steps),
        }

    def load_counters(self, counters: dict[str, float]) -> None:
        """Set what `counters` gave, of this class or of `MasterAdamW`."""
        for flat in deepspeed_internals.flats(self.zero):
            adam_state(self, flat)["step"].fill_(counters["adam_steps"])
        self._skipped.fill_(counters["skipped_steps"])
        if "loss_scale" in counters:
            deepspeed_internals.set_loss_scale(self.zero, counters["loss_scale"], int(counters["good_steps"]))

    @torch.no_grad()
    def round_masters_into_parameters(self) -> None:
        """Copy the fp32 masters into the model's weights, rounded to their dtype. Every rank takes part."""
        deepspeed_internals.round_masters_into_parameters(self.zero)

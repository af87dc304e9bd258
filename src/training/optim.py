"""The optimizer: AdamW in fp32 whatever the model's precision, clipped, and deaf to gradients that are not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from src.model.init import row_of

LOSS_SCALE_START = 2.0**16  # fp16 only; halved at an overflow, doubled after this many good steps:
LOSS_SCALE_GROWTH_STEPS = 1000


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The three groups of rwkv7.md section 3, from the init table: (lr x2, no decay), (lr x1, decay), (lr x1, no decay).

    Each has `lr_scale`, which the schedule multiplies in, and `names`. Parameters that are never trained are in none.
    """
    groups: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            row = row_of(name)
            groups.setdefault((row.lr_scale, row.decay), []).append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in members],
            "names": [name for name, _ in members],
            "lr_scale": lr_scale,
            "weight_decay": weight_decay if decay else 0.0,
        }
        for (lr_scale, decay), members in sorted(groups.items(), reverse=True)
    ]


class MasterAdamW(torch.optim.Optimizer):
    """AdamW with decoupled decay and an fp32 master copy of parameters that are bf16 or fp16.

    One step: the global gradient norm in fp32; gradients times min(1, grad_clip / norm); AdamW on the masters; masters rounded into
    the parameters. When the norm is not finite the step is left out as a whole: neither weights nor moments nor the
    step count change, and `skipped_steps` grows by one. That is decided on the device; nothing here waits for it.

    `grad_norm` and `skipped_steps` are tensors on the parameters' device. With `scale_loss` (fp16) the caller multiplies
    its loss by `loss_scale`, which this class takes out again and adapts.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        grad_clip: float,
        scale_loss: bool = False,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self.grad_clip = grad_clip
        self.parameters = [p for group in self.param_groups for p in group["params"]]
        device = self.parameters[0].device
        self.masters = [p if p.dtype == torch.float32 else _master(p) for p in self.parameters]
        master_of = dict(zip(self.parameters, self.masters, strict=True))
        self._adam = torch.optim.AdamW(
            [{**group, "params": [master_of[p] for p in group["params"]]} for group in self.param_groups],
            fused=True,
        )
        self.grad_norm = torch.zeros((), device=device)
        self.skipped_steps = torch.zeros((), device=device)
        self.scale_loss = scale_loss
        self.loss_scale = torch.full((), LOSS_SCALE_START if scale_loss else 1.0, device=device)
        self._good_steps = torch.zeros((), device=device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = []
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master:
                master.grad = None if parameter.grad is None else parameter.grad.float()
            if master.grad is not None:
                gradients.append(master.grad)
        self.grad_norm = torch.nn.utils.get_total_norm(gradients) / self.loss_scale
        found_inf = (~torch.isfinite(self.grad_norm)).float()
        clip = self.grad_clip / (self.grad_norm + 1e-6) if self.grad_clip else torch.ones_like(self.grad_norm)
        # The fused AdamW divides gradients by grad_scale and leaves everything as it is where found_inf is 1, inside its one
        # pass over memory; GradScaler hands it the same two attributes.
        self._adam.grad_scale = self.loss_scale / clip.clamp(max=1.0)
        self._adam.found_inf = found_inf
        for own, inner in zip(self.param_groups, self._adam.param_groups, strict=True):
            inner["lr"] = own["lr"]
        self._adam.step()
        low = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p is not m]
        if low:
            torch._foreach_copy_([p for p, _ in low], [m for _, m in low])
            for _, master in low:
                master.grad = None
        self.skipped_steps = self.skipped_steps + found_inf
        if self.scale_loss:
            self._adapt_loss_scale(found_inf)
        return loss

    def _adapt_loss_scale(self, found_inf: Tensor) -> None:
        self._good_steps = (self._good_steps + 1) * (1 - found_inf)
        grow = (self._good_steps >= LOSS_SCALE_GROWTH_STEPS).float()
        self._good_steps = self._good_steps * (1 - grow)
        self.loss_scale = (self.loss_scale * (1 - 0.5 * found_inf) * (1 + grow)).clamp(min=1.0)

    def state_dict(self) -> dict[str, Any]:
        """Moments, step counts and masters: with the weights, all that a continued run needs."""
        return {
            "adam": self._adam.state_dict(),
            "masters": [m for p, m in zip(self.parameters, self.masters, strict=True) if p is not m],
            "skipped_steps": self.skipped_steps,
            "loss_scale": self.loss_scale,
            "good_steps": self._good_steps,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        low = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p is not m]
        assert len(low) == len(state_dict["masters"]), "the optimizer state belongs to another model or precision"
        self._adam.load_state_dict(state_dict["adam"])
        for (parameter, master), kept in zip(low, state_dict["masters"], strict=True):
            master.copy_(kept)
            parameter.copy_(master)
        device = self.skipped_steps.device
        self.skipped_steps = state_dict["skipped_steps"].to(device)
        self.loss_scale = state_dict["loss_scale"].to(device)
        self._good_steps = state_dict["good_steps"].to(device)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().float())

"""AdamW with fp32 master weights, gradient clipping, and steps skipped when the gradient norm is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from src.config import RunConfig
from src.model.init import row_of
from src.ops.adamw import adamw_step_, fused_adamw, gradient_norm

# fp16 only: halved at an overflow and doubled after so many good steps, as in torch.amp.GradScaler, with DeepSpeed's
# default values, so that a run under ZeRO adapts its scale alike.
LOSS_SCALE_POWER = 16  # the scale starts at 2^16
LOSS_SCALE_GROWTH_STEPS = 1000
# Elements of bf16 or fp16 gradients that exist in fp32 at a time: 256 MiB. A larger parameter is a chunk of its own.
MAX_FP32_GRAD_NUMEL = 1 << 26


# (lr_scale, decay) of the groups; reporting/sink.py has their names
GROUPS = ((2.0, False), (1.0, True), (1.0, False))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The groups, from the init table: (lr x2, no decay), (lr x1, decay), (lr x1, no decay).

    Each has `lr_scale`, by which the schedule's learning rate is multiplied, `names`, and `number`, its place in
    GROUPS. Frozen parameters are in none, and a group without parameters is left out.
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
            "number": number,
        }
        for number, (lr_scale, decay) in enumerate(GROUPS)
        if (members := groups.get((lr_scale, decay)))
    ]


def adam_arguments(config: RunConfig) -> dict[str, Any]:
    """Adam's settings of a run, as arguments of `MasterAdamW` and `EngineAdamW`; their defaults are those of the
    flags."""
    return {
        "lr": config.lr_init,
        "betas": (config.beta1, config.beta2),
        "eps": config.adam_eps,
        "grad_clip": config.grad_clip,
    }


class MasterAdamW(torch.optim.Optimizer):
    """AdamW with decoupled decay and an fp32 master copy of parameters that are bf16 or fp16.

    One step: the global gradient norm in fp32; gradients times min(1, grad_clip / norm); AdamW on the masters; masters
    rounded to the parameters. Below fp32 this is done in chunks of parameters, so that a second, fp32 copy of all
    gradients never exists; in bf16 on a CPU natively, without any copy, unless `kernel` is a plain one. When the norm
    is not finite the whole step is skipped: weights, moments and step count stay as they are, and `skipped_steps`
    grows by one. On a GPU that is decided on the device; nothing here synchronises with it.

    `grad_norm` and `skipped_steps` are tensors on the parameters' device. With `scale_loss` (fp16) the caller
    multiplies its loss by `loss_scale`, which this class divides out and adapts.
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
        kernel: str = "auto",
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self.grad_clip = grad_clip
        self.parameters = [p for group in self.param_groups for p in group["params"]]
        self._fused = fused_adamw(self.parameters, kernel)
        device = self.parameters[0].device
        self.masters = [p if p.dtype == torch.float32 else _master(p) for p in self.parameters]
        self._master_of = dict(zip(self.parameters, self.masters, strict=True))
        self._chunks = _chunks(self.parameters)
        # one AdamW per chunk, so that fp32 gradients need to exist for one chunk at a time
        self._adams = [
            torch.optim.AdamW(
                [
                    {**group, "params": [self._master_of[p] for p in group["params"] if p in chunk]}
                    for group in self.param_groups
                ],
                fused=True,
            )
            for chunk in map(set, self._chunks)
        ]
        self._adam_of = {
            master: adam for adam in self._adams for group in adam.param_groups for master in group["params"]
        }
        self.grad_norm = torch.zeros((), device=device)
        self.skipped_steps = torch.zeros((), device=device)
        self.scale_loss = scale_loss
        self.loss_scale = torch.full((), 2.0**LOSS_SCALE_POWER if scale_loss else 1.0, device=device)
        self._good_steps = torch.zeros((), device=device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step, with the `lr` of each group. Returns what `closure` (forward and backward) returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if self._fused:
            norm = gradient_norm(gradients)
        else:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float32)))
        self.grad_norm = norm / self.loss_scale
        # a tensor, not a bool: reading it on the host would wait for the device
        found_inf = (~torch.isfinite(self.grad_norm)).float()
        clip = self.grad_clip / (self.grad_norm + 1e-6) if self.grad_clip else torch.ones_like(self.grad_norm)
        scale = self.loss_scale / clip.clamp(max=1.0)
        if self._fused:
            self._fused_step(scale.item())
        else:
            self._chunked_step(scale, found_inf)
        self.skipped_steps = self.skipped_steps + found_inf
        if self.scale_loss:
            self._adapt_loss_scale(found_inf)
        return loss

    def _fused_step(self, scale: float) -> None:
        if not math.isfinite(self.grad_norm.item()):
            return
        for group in self.param_groups:
            settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    master, state = self._master_of[parameter], self.moments(parameter)
                    adamw_step_(parameter, parameter.grad, master, state, **settings, scale=scale)

    def _chunked_step(self, scale: Tensor, found_inf: Tensor) -> None:
        for chunk, adam in zip(self._chunks, self._adams, strict=True):
            pairs = [(p, self._master_of[p]) for p in chunk if p is not self._master_of[p]]
            for parameter, master in pairs:
                master.grad = None if parameter.grad is None else parameter.grad.float()
            # The fused AdamW divides gradients by grad_scale and changes nothing where found_inf is 1, inside its one
            # pass over memory; torch.amp.GradScaler sets the same two attributes.
            adam.grad_scale, adam.found_inf = scale, found_inf  # type: ignore[attr-defined]
            for group, inner in zip(self.param_groups, adam.param_groups, strict=True):
                inner["lr"] = group["lr"]  # the schedule sets it in this optimizer's groups
            adam.step()
            if pairs:
                torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])
                for _, master in pairs:
                    master.grad = None  # frees the fp32 gradients before those of the next chunk are made

    def _adapt_loss_scale(self, found_inf: Tensor) -> None:
        # arithmetic in place of branches, which would need the values on the host
        self._good_steps = (self._good_steps + 1) * (1 - found_inf)
        grow = (self._good_steps >= LOSS_SCALE_GROWTH_STEPS).float()
        self._good_steps = self._good_steps * (1 - grow)
        self.loss_scale = (self.loss_scale * (1 - 0.5 * found_inf) * (1 + grow)).clamp(min=1.0)

    def master_of(self, parameter: nn.Parameter) -> nn.Parameter:
        """The fp32 copy that is optimized; the parameter itself in an fp32 model."""
        return self._master_of[parameter]

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Adam's state of a parameter, fp32: `exp_avg`, `exp_avg_sq` (like the parameter), `step`; zeros at first."""
        master = self._master_of[parameter]
        return adam_state(self._adam_of[master], master)

    def counters(self) -> dict[str, float]:
        """The numbers that belong to no parameter. With masters and moments they are all that a resumed run needs."""
        return {
            "adam_steps": self.moments(self.parameters[0])["step"].item(),
            "skipped_steps": self.skipped_steps.item(),
            "loss_scale": self.loss_scale.item(),
            "good_steps": self._good_steps.item(),
        }

    def load_counters(self, counters: dict[str, float]) -> None:
        """Set what `counters` returned (here or in EngineAdamW); the loss scale only where this run scales its loss."""
        for parameter in self.parameters:
            self.moments(parameter)["step"].fill_(counters["adam_steps"])
        self.skipped_steps.fill_(counters["skipped_steps"])
        if self.scale_loss and "loss_scale" in counters:
            self.loss_scale.fill_(counters["loss_scale"])
            self._good_steps.fill_(counters["good_steps"])


def adam_state(adam: torch.optim.AdamW, weights: nn.Parameter) -> dict[str, Tensor]:
    """The state of `weights` in `adam`: `exp_avg`, `exp_avg_sq` (like `weights`), `step`; zeros before step 1."""
    state = adam.state[weights]
    if not state:  # AdamW creates it at its first step; a state that is loaded before that needs it now
        state["step"] = torch.zeros((), device=weights.device)
        state["exp_avg"] = torch.zeros_like(weights)
        state["exp_avg_sq"] = torch.zeros_like(weights)
    return state


def _chunks(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in order, in chunks of at most MAX_FP32_GRAD_NUMEL elements below fp32; fp32 ones need no copy."""
    chunks: list[list[nn.Parameter]] = [[]]
    size = 0
    for parameter in parameters:
        numel = 0 if parameter.dtype == torch.float32 else parameter.numel()
        if size + numel > MAX_FP32_GRAD_NUMEL and chunks[-1]:
            chunks.append([])
            size = 0
        chunks[-1].append(parameter)
        size += numel
    return chunks


def _master(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().float())

"""AdamW with fp32 master weights, gradient clipping, and steps skipped when the gradient norm is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from src.config import RunConfig
from src.model.init import row_of
from src.ops import adamw

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
    rounded to the parameters: natively in one pass on a GPU and, in bf16, on a CPU, unless `kernel` is a plain one.
    When the norm is not finite the whole step is skipped: weights, moments and step count stay as they are, and
    `skipped_steps` grows by one. On a GPU that is decided on the device; nothing here synchronises with it.

    `grad_norm` and `skipped_steps` are tensors on the parameters' device, the same ones at every step. With
    `scale_loss` (fp16) the caller multiplies its loss by `loss_scale`, which this class divides out and adapts.
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
        device = self.parameters[0].device
        self.masters = [p if p.dtype == torch.float32 else _master(p) for p in self.parameters]
        self._master_of = dict(zip(self.parameters, self.masters, strict=True))
        self._adam: _AdamOnGpu | _AdamInChunks
        if adamw.adamw_on_gpu(self.parameters, kernel):
            self._adam = _AdamOnGpu(self.param_groups, self._master_of)
        elif adamw.fused_adamw(self.parameters, kernel):
            self._adam = _AdamOnCpu(self.param_groups, self._master_of)
        else:
            self._adam = _AdamInChunks(self.param_groups, self._master_of)
        self.grad_norm = torch.zeros((), device=device)
        self.skipped_steps = torch.zeros((), device=device)
        self.scale_loss = scale_loss
        self.loss_scale = torch.full((), 2.0**LOSS_SCALE_POWER if scale_loss else 1.0, device=device)
        self._good_steps = torch.zeros((), device=device)
        self._hold = torch.zeros((), device=device)  # 1: `update` leaves everything but the gradient norm as it is
        self.is_updated = False  # by the graph that the closure replayed (hardware/step_graph.py)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step, with the `lr` of each group. Returns what `closure` (forward and backward) returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.is_updated:
            self.set_rates()
            self.update()
        self.is_updated = False
        return loss

    def set_rates(self) -> None:
        """Bring each group's `lr`, which the schedule sets, to where `update` reads it."""
        self._adam.set_rates(self.param_groups)

    @torch.no_grad()
    def update(self) -> None:
        """The step itself, on tensors that stay the same ones; the rates are those that `set_rates` took."""
        self.grad_norm.copy_(self.gradient_norm())
        # a tensor, not a bool: reading it on the host would wait for the device
        found_inf = (~torch.isfinite(self.grad_norm)).float()
        clip = self.grad_clip / (self.grad_norm + 1e-6) if self.grad_clip else torch.ones_like(self.grad_norm)
        self._adam.update(
            self.param_groups, self.loss_scale / clip.clamp(max=1.0), torch.maximum(found_inf, self._hold)
        )
        self.skipped_steps += found_inf * (1 - self._hold)
        if self.scale_loss:
            self._adapt_loss_scale(found_inf)

    def gradient_norm(self) -> Tensor:
        """The global norm of the gradients in fp32, the loss scale divided out."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return self._adam.norm(gradients) / self.loss_scale

    @contextmanager
    def held(self) -> Iterator[None]:
        """Replays of a captured `update` set the gradient norm and change nothing else."""
        self._hold.fill_(1)
        try:
            yield
        finally:
            self._hold.fill_(0)

    def _adapt_loss_scale(self, found_inf: Tensor) -> None:
        # arithmetic in place of branches, which would need the values on the host
        good_steps = (self._good_steps + 1) * (1 - found_inf)
        grow = (good_steps >= LOSS_SCALE_GROWTH_STEPS).float()
        self._good_steps.copy_(good_steps * (1 - grow))
        self.loss_scale.copy_((self.loss_scale * (1 - 0.5 * found_inf) * (1 + grow)).clamp(min=1.0))

    @property
    def can_be_captured(self) -> bool:
        """Whether `update` may become part of a CUDA graph: all that changes from step to step is on the device."""
        return isinstance(self._adam, _AdamOnGpu)

    def master_of(self, parameter: nn.Parameter) -> nn.Parameter:
        """The fp32 copy that is optimized; the parameter itself in an fp32 model."""
        return self._master_of[parameter]

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Adam's state of a parameter, fp32: `exp_avg`, `exp_avg_sq` (like the parameter), `step`; zeros at first."""
        return self._adam.state_of(self._master_of[parameter])

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


Groups = list[dict[str, Any]]
MasterOf = dict[nn.Parameter, nn.Parameter]


class _AdamOnGpu:
    """The native op on a GPU: gradients and weights in the model's dtype, rates and counts on the device."""

    def __init__(self, groups: Groups, master_of: MasterOf) -> None:
        self.master_of = master_of
        device = next(iter(master_of)).device
        self._steps = torch.zeros(1, device=device)
        self._rates = torch.zeros(len(groups), device=device)
        self._states = {
            master: {
                "step": self._steps[0],  # one number for all: a step is taken or skipped as a whole
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
            for master in master_of.values()
        }

    def state_of(self, master: nn.Parameter) -> dict[str, Tensor]:
        return self._states[master]

    def norm(self, gradients: list[Tensor]) -> Tensor:
        return _norm(gradients)

    def set_rates(self, groups: Groups) -> None:
        for rate, group in zip(self._rates, groups, strict=True):
            rate.fill_(group["lr"])  # the value travels with the kernel's arguments: no copy, which could wait

    def update(self, groups: Groups, scale: Tensor, found_inf: Tensor) -> None:
        for i, group in enumerate(groups):
            trained = [p for p in group["params"] if p.grad is not None]
            masters = [self.master_of[p] for p in trained]
            states = [self._states[master] for master in masters]
            adamw.adamw_(
                trained,
                [p.grad for p in trained],
                masters,  # type: ignore[arg-type]
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                steps=self._steps,
                lr=self._rates[i : i + 1],
                grad_scale=scale,
                found_inf=found_inf,
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
        self._steps += 1 - found_inf


class _AdamInChunks:
    """PyTorch's fused AdamW on the masters. Below fp32 in chunks of parameters, so that a second, fp32 copy of all
    gradients never exists."""

    def __init__(self, groups: Groups, master_of: MasterOf) -> None:
        self.master_of = master_of
        self._chunks = _chunks(list(master_of))
        # one AdamW per chunk, so that fp32 gradients need to exist for one chunk at a time
        self._adams = [
            torch.optim.AdamW(
                [{**group, "params": [master_of[p] for p in group["params"] if p in chunk]} for group in groups],
                fused=True,
            )
            for chunk in map(set, self._chunks)
        ]
        self._adam_of = {
            master: adam for adam in self._adams for group in adam.param_groups for master in group["params"]
        }

    def state_of(self, master: nn.Parameter) -> dict[str, Tensor]:
        return adam_state(self._adam_of[master], master)

    def norm(self, gradients: list[Tensor]) -> Tensor:
        return _norm(gradients)

    def set_rates(self, groups: Groups) -> None:
        for adam in self._adams:
            for group, inner in zip(groups, adam.param_groups, strict=True):
                inner["lr"] = group["lr"]

    def update(self, groups: Groups, scale: Tensor, found_inf: Tensor) -> None:
        for chunk, adam in zip(self._chunks, self._adams, strict=True):
            pairs = [(p, self.master_of[p]) for p in chunk if p is not self.master_of[p]]
            for parameter, master in pairs:
                master.grad = None if parameter.grad is None else parameter.grad.float()
            # The fused AdamW divides gradients by grad_scale and changes nothing where found_inf is 1, inside its one
            # pass over memory; torch.amp.GradScaler sets the same two attributes.
            adam.grad_scale, adam.found_inf = scale, found_inf  # type: ignore[attr-defined]
            adam.step()
            if pairs:
                torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])
                for _, master in pairs:
                    master.grad = None  # frees the fp32 gradients before those of the next chunk are made


class _AdamOnCpu(_AdamInChunks):
    """The native step of bf16 weights, which needs no chunks. The state is where PyTorch's AdamW has it."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        return adamw.gradient_norm(gradients)

    def update(self, groups: Groups, scale: Tensor, found_inf: Tensor) -> None:
        if found_inf.item():
            return
        for group in groups:
            settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    master = self.master_of[parameter]
                    state = self.state_of(master)
                    adamw.adamw_step_(parameter, parameter.grad, master, state, **settings, scale=scale.item())


def _norm(gradients: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float32)))


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

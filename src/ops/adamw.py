"""AdamW for bf16 weights with fp32 masters, natively on a CPU: one pass over memory (cuda/cpu/adamw.cpp).

Plain PyTorch takes three, and makes an fp32 copy of the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from src.config import PLAIN_KERNELS
from src.ops import build


def fused_adamw(weights: Sequence[Tensor], kernel: str = "auto") -> bool:
    """Whether the functions below serve these weights. Builds and loads the native library on the first call."""
    if kernel in PLAIN_KERNELS or any(w.device.type != "cpu" or w.dtype != torch.bfloat16 for w in weights):
        return False
    try:
        build.load_native()
    except build.BuildError:
        return False
    return True


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all numbers of bf16 gradients, fp32 []."""
    return torch.stack([torch.ops.rwkv7.sum_of_squares(gradient) for gradient in gradients]).sum().sqrt()


def adamw_step_(
    weight: Tensor,
    gradient: Tensor,
    master: Tensor,
    state: dict[str, Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: float,
) -> None:
    """One step on `master` (fp32), which is then rounded to `weight` (bf16). The gradient is divided by `scale`.

    state: `exp_avg`, `exp_avg_sq` (fp32, like master) and `step`, as torch.optim.AdamW has them; they are updated.
    """
    state["step"] += 1
    torch.ops.rwkv7.adamw_step_(
        *(weight, gradient, master, state["exp_avg"], state["exp_avg_sq"]),
        *(lr, *betas, eps, weight_decay, state["step"].item(), scale),
    )

"""AdamW's step natively, in one pass over gradients, moments, fp32 masters and weights: on a GPU, and of bf16 on a CPU.

With g = gradient / scale and t the number of the step:

    m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
    master <- master (1 - lr decay) - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
    weight <- master, rounded

PyTorch's fused AdamW needs fp32 gradients of fp32 weights: of bf16 ones a copy of 4 bytes is made before it, and the
weights are rounded after it. With the gradient norm these take 42 bytes per parameter, one pass and the norm 30.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from src.config import PLAIN_KERNELS
from src.ops import build

# ---- On a CPU: cuda/cpu/adamw.cpp -----------------------------------------------------------------------------------


def fused_adamw(weights: Sequence[Tensor], kernel: str = "auto") -> bool:
    """Whether the functions of this part serve these weights. Builds and loads the native library on the first call."""
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


# ---- On a GPU: cuda/adamw.cu ----------------------------------------------------------------------------------------

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def adamw_on_gpu(parameters: Sequence[Tensor], kernel: str = "auto") -> bool:
    """Whether `adamw_` serves these parameters. Builds and loads the native library on the first call."""
    if kernel in PLAIN_KERNELS:
        return False
    if any(
        p.device.type != "cuda" or p.device != parameters[0].device or p.dtype not in CUDA_DTYPES for p in parameters
    ):
        return False
    try:
        build.load_native(_register)
    except build.BuildError:
        return False
    return build.why_no_cuda() is None


def adamw_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    masters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    steps: Tensor,
    lr: Tensor,
    grad_scale: Tensor,
    found_inf: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step, in place; nothing changes where `found_inf` isn't 0. Lists tensor by tensor, of any of CUDA_DTYPES.

    A parameter's gradient has its dtype, masters and moments are fp32; the master of an fp32 parameter is the
    parameter. steps (done before this one), lr, grad_scale and found_inf are fp32 [1] on the device.
    """
    tensors = list(zip(parameters, gradients, masters, exp_avgs, exp_avg_sqs, strict=True))
    for dtype in CUDA_DTYPES:
        of_dtype = [group for group in tensors if group[0].dtype == dtype]
        if of_dtype:
            lists = (list(column) for column in zip(*of_dtype, strict=True))
            torch.ops.rwkv7.adamw_(*lists, steps, lr, grad_scale, found_inf, *betas, eps, weight_decay)


def _register() -> None:
    if build.why_no_cuda() is None:  # a library for CPUs doesn't have the op
        torch.library.register_fake("rwkv7::adamw_", lambda *_: None)

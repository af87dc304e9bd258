"""Checks the numbers of the recurrence's kernel: one small forward and backward pass, compared with the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from src.config import RunConfig
from src.ops.recurrence import describe_kernel, wkv7
from src.ops.reference import wkv7_reference
from src.training.hardware.selection import Hardware
from src.training.preflight.checklist import Checklist, Finding

# Largest |difference| / |reference| that counts as agreement: a few units in the last place of the inputs' dtype.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# Small, for this runs at every start; longer than one segment between kept states of the CPU kernel (32 tokens).
TRIAL_TOKENS, TRIAL_HEADS = 40, 2


def check_kernel(checks: Checklist, config: RunConfig, hardware: Hardware) -> None:
    """Report which kernel the run uses, and how far it is from the reference."""
    name = checks.attempt(
        "wkv7", lambda: describe_kernel(hardware.device_type, hardware.dtype, config.head_size, config.kernel)
    )
    if name is not None:
        agreement = kernel_agreement(config, hardware, config.head_size)
        checks.add(replace(agreement, detail=f"{name}; {agreement.detail}"))


def kernel_agreement(config: RunConfig, hardware: Hardware, head_size: int) -> Finding:
    """Compare the run's kernel with the reference on one small input."""
    error = kernel_error(hardware.device_type, hardware.dtype, head_size, config.kernel)
    tolerance = TOLERANCE[hardware.dtype]
    detail = f"output and gradients within {error:.1e} of the float64 reference"
    if error <= tolerance:  # false for NaN
        return Finding("wkv7", detail)
    return Finding(
        "wkv7",
        detail,
        f"--kernel {config.kernel} computes wrong numbers: {error:.1e} from the reference, expected at most "
        f"{tolerance:.0e}. Train with another one (--kernel portable, or the slow reference), delete the build cache "
        "~/.cache/rwkv7-native, and report it with the output of --check",
    )


def kernel_error(device: str, dtype: torch.dtype, head_size: int, kernel: str) -> float:
    """The largest |difference| / |reference| over output, state and the seven gradients of one forward and backward
    pass.

    The reference computes in float64 from the same inputs. NaN when the kernel's result isn't finite.
    """
    shape = (1, TRIAL_TOKENS, TRIAL_HEADS, head_size)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for _ in range(5)]
    # a = -k and b = k * sigmoid(...) with normalized k, as in the model: with independent values the state would grow
    # from token to token, and rounding errors with it
    key = torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)
    inputs[4], b = -key, key * torch.sigmoid(inputs[4])
    state = torch.randn(1, TRIAL_HEADS, head_size, head_size, generator=generator)
    operands = [*(x.to(device, dtype) for x in (*inputs, b)), state.to(device)]
    # random weights of the loss, so that errors in different places don't cancel in the gradients
    loss_weights = [torch.randn(shape, generator=generator), torch.randn(state.shape, generator=generator)]

    def results(op: Callable[..., Any], in_float64: bool) -> list[Tensor]:
        # On the CPU: not every device has float64.
        leaves = [(x.cpu().double() if in_float64 else x.clone()).requires_grad_() for x in operands]
        outputs = op(*leaves)
        loss = sum((output * w.to(output)).sum() for output, w in zip(outputs, loss_weights, strict=True))
        gradients = torch.autograd.grad(loss, leaves)  # type: ignore[arg-type]
        return [x.detach().cpu().double() for x in (*outputs, *gradients)]

    computed = results(lambda *leaves: wkv7(*leaves, kernel=kernel), in_float64=False)
    expected = results(wkv7_reference, in_float64=True)
    errors = [float((x - y).norm() / y.norm()) for x, y in zip(computed, expected, strict=True)]
    # max() alone would drop a NaN that doesn't come first
    return float("nan") if any(error != error for error in errors) else max(errors)

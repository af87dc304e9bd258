"""Does the recurrence's kernel give right numbers here: one small forward and backward pass beside the reference."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from src.config import RunConfig
from src.ops.recurrence import describe_kernel, wkv7
from src.ops.reference import wkv7_reference
from src.training.hardware.selection import Hardware
from src.training.preflight.checklist import Checklist, Finding

# |difference| / |reference| that counts as agreement: some units in the last place of the inputs' dtype
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
TRIAL_TOKENS, TRIAL_HEADS = 40, 2


def check_kernel(checks: Checklist, config: RunConfig, hardware: Hardware) -> None:
    """Which kernel the run takes, and how right it is."""
    which = checks.attempt(
        "wkv7", lambda: describe_kernel(hardware.device_type, hardware.dtype, config.head_size, config.kernel)
    )
    if which is not None:
        agreement = kernel_agreement(config, hardware, config.head_size)
        checks.take(replace(agreement, detail=f"{which}; {agreement.detail}"))


def kernel_agreement(config: RunConfig, hardware: Hardware, head_size: int) -> Finding:
    """One step of the recurrence beside the reference."""
    error = kernel_error(hardware.device_type, hardware.dtype, head_size, config.kernel)
    allowed = TOLERANCE[hardware.dtype]
    words = f"output and gradients within {error:.1e} of the float64 reference"
    if error <= allowed:
        return Finding("wkv7", words)
    return Finding(
        "wkv7",
        words,
        f"--kernel {config.kernel} gives wrong numbers here: {error:.1e} from the reference, expected at most {allowed:.0e}. Train with "
        "--kernel reference (slow), delete the build cache ~/.cache/rwkv7-native, and report it with the output of --check",
    )


def kernel_error(device: str, dtype: torch.dtype, head_size: int, kernel: str) -> float:
    """The largest |difference| / |reference| over output, state and the seven gradients of one forward and backward pass.

    The reference computes in float64 from the same inputs. Not a number when the kernel's result isn't finite.
    """
    shape = (1, TRIAL_TOKENS, TRIAL_HEADS, head_size)
    numbers = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=numbers) for _ in range(5)]
    key = torch.nn.functional.normalize(torch.randn(shape, generator=numbers), dim=-1)
    inputs[4], b = -key, key * torch.sigmoid(inputs[4])
    state = torch.randn(1, TRIAL_HEADS, head_size, head_size, generator=numbers)
    given = [*(x.to(device, dtype) for x in (*inputs, b)), state.to(device)]
    weights = [torch.randn(shape, generator=numbers), torch.randn(state.shape, generator=numbers)]

    def outputs(op: object, double: bool) -> list[Tensor]:
        own = [(x.double() if double else x.clone()).requires_grad_() for x in given]
        made = wkv7_reference(*own) if op is wkv7_reference else wkv7(*own, kernel=kernel)
        loss = sum((made_one * w.to(made_one)).sum() for made_one, w in zip(made, weights, strict=True))
        grads = torch.autograd.grad(loss, own)  # type: ignore[arg-type]
        return [x.detach().double() for x in (*made, *grads)]

    pairs = zip(outputs(wkv7, False), outputs(wkv7_reference, True), strict=True)
    errors = [float((got - expected).norm() / expected.norm()) for got, expected in pairs]
    return float("nan") if any(error != error for error in errors) else max(errors)

"""Layer norm together with the residual sum before it.

On a CPU in fp32 and bf16 this is one pass over memory (cuda/cpu/layer_norm.cpp). Elsewhere it is plain PyTorch, which
torch.compile fuses on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from src.config import PLAIN_KERNELS
from src.ops import build, reference

NATIVE_DTYPES = (torch.float32, torch.bfloat16)
WIDEST_VECTOR = 16  # numbers that the native code computes at a time; vec::kLanes in cuda/cpu/vec.h


def add_layer_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float, *, kernel: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(s, (s - mean) / sqrt(variance + eps) weight + bias) of s = x + added (None: x) [..., C]; weight, bias [C]."""
    if (
        kernel not in PLAIN_KERNELS
        and x.device.type == "cpu"
        and x.dtype in NATIVE_DTYPES
        and weight.dtype == x.dtype
        and x.numel() > 0
        and x.shape[-1] % WIDEST_VECTOR == 0
        and _native()
    ):
        total, out = torch.ops.rwkv7.add_layer_norm(x, added, weight, bias, eps)
        return x if added is None else total, out
    return reference.add_layer_norm_reference(x, added, weight, bias, eps)


def _native() -> bool:
    try:
        build.load_native(_register)
    except build.BuildError:
        return False
    return True


# As torch.compiler.assume_constant_result, without importing the compiler (see recurrence.py).
_native._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _register() -> None:
    torch.library.register_fake("rwkv7::add_layer_norm", _shapes)
    torch.library.register_autograd("rwkv7::add_layer_norm", _backward, setup_context=_context)
    torch.library.register_fake(
        "rwkv7::add_layer_norm_backward",
        lambda dsum, dout, total, weight, eps: tuple(x.new_empty(x.shape) for x in (total, weight, weight)),
    )
    torch.library.register_autograd("rwkv7::add_layer_norm_backward", _no_double_backward)


def _shapes(x: Tensor, added: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(0 if added is None else x.shape), x.new_empty(x.shape)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, added, weight, _, ctx.eps = inputs
    ctx.set_materialize_grads(False)  # without `added` nobody uses the sum
    ctx.adds = added is not None
    ctx.save_for_backward(output[0] if ctx.adds else x, weight)


def _backward(ctx: Any, dsum: Tensor | None, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    if dout is None:  # only the sum was used
        return dsum, dsum, None, None, None
    dsum = dsum if ctx.adds else None
    dx, dweight, dbias = torch.ops.rwkv7.add_layer_norm_backward(dsum, dout, total, weight, ctx.eps)
    return dx, dx if ctx.adds else None, dweight, dbias, None


def _no_double_backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    raise RuntimeError("the fused layer norm has no second derivative; use kernel='reference' for it")

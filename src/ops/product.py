"""Products with weights: PyTorch's, but in training in bf16 on a CPU with matrix units (AMX).

The weight's gradient sums over tokens. PyTorch's product then reads an operand across its rows, at half of the rate
that its other products have; cuda/cpu/weight_gradient.cpp packs both operands instead. The other two products, of
64 rows and more and up to 4,096 summands, write large results past the caches and fetch what they read next
(cuda/cpu/product.cpp). Same mathematics: sums in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from src.config import PLAIN_KERNELS
from src.ops import build

MIN_ROWS = 64  # of a product for which packing the weight is worth it
MAX_INNER = 4096  # products that one sum adds up: of a packed weight so long 128 columns stay in the cache


def linear(x: Tensor, weight: Tensor, *, kernel: str = "auto") -> Tensor:
    """x W^T: x [..., in], weight [out, in] -> [..., out]."""
    return _Linear.apply(x, weight) if _fused(x, weight, kernel) else F.linear(x, weight)  # type: ignore[no-any-return]


def weight_gradient(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, the sum over tokens: a [T, M], b [T, N] -> [M, N]."""
    if a.device.type == "cpu" and a.dtype == b.dtype == torch.bfloat16 and a.numel() and b.numel() and _matrix_units():
        return torch.ops.rwkv7.weight_gradient(a, b)  # type: ignore[no-any-return]
    return a.t() @ b


def _fused(x: Tensor, weight: Tensor, kernel: str) -> bool:
    return (
        kernel not in PLAIN_KERNELS
        and x.device.type == "cpu"
        and x.dim() > 1
        and x.dtype == weight.dtype == torch.bfloat16
        and weight.requires_grad
        and torch.is_grad_enabled()
        and _matrix_units()
    )


def _matrix_units() -> bool:
    try:
        build.load_native(_register)
    except build.BuildError:
        return False
    return torch.ops.rwkv7.has_matrix_units(torch.empty(0))  # type: ignore[no-any-return]


# As torch.compiler.assume_constant_result, without importing the compiler (see recurrence.py).
_matrix_units._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _register() -> None:
    torch.library.register_fake("rwkv7::weight_gradient", lambda a, b: a.new_empty(a.shape[1], b.shape[1]))
    torch.library.register_fake(
        "rwkv7::product", lambda x, w, turned: x.new_empty(x.shape[0], w.shape[0 if turned else 1])
    )


def _product(x: Tensor, weight: Tensor, turned: bool) -> Tensor:
    """x W^T of W [out, in] where `turned`, else x W of W [in, out]."""
    if x.numel() < MIN_ROWS * x.shape[-1] or not 0 < x.shape[-1] <= MAX_INNER or not weight.numel():
        return F.linear(x, weight) if turned else x @ weight
    rows = torch.ops.rwkv7.product(x.flatten(0, -2), weight, turned)
    # not a view, which couldn't be changed in place after a function of our own
    return torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], rows.shape[1]])  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, turned=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return (
            _product(grad, weight, turned=False) if ctx.needs_input_grad[0] else None,
            weight_gradient(grad.flatten(0, -2), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None,
        )

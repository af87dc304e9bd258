"""relu(x)^2, the channel mix's activation.

On a CPU, in fp32 and bf16, one pass over memory forward and one backward (cuda/relu_squared.cpp), where plain PyTorch needs five. Elsewhere,
and where the native library can't be built (wkv7 says why), plain PyTorch, which torch.compile fuses.
"""

from typing import Any

import torch
from torch import Tensor

from src.ops import build
from src.ops.reference import relu_squared_reference

_registered = False


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2, elementwise; any shape and floating dtype."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and _native():
        return torch.ops.rwkv7.relu_squared(x)
    return relu_squared_reference(x)


def _native() -> bool:
    global _registered
    if _registered:
        return True
    try:
        build.load_native()
    except build.BuildError:
        return False
    torch.library.register_fake("rwkv7::relu_squared", _like_dense)
    torch.library.register_fake("rwkv7::relu_squared_backward", lambda dy, x: _like_dense(x))
    torch.library.register_autograd("rwkv7::relu_squared", _backward, setup_context=_setup_context)
    torch.library.register_autograd("rwkv7::relu_squared_backward", _second, setup_context=_setup_second)
    _registered = True
    return True


# As torch.compiler.assume_constant_result, without importing the compiler (see wkv7.py).
_native._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _like_dense(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return torch.ops.rwkv7.relu_squared_backward(dy, x)


def _setup_second(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _second(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of 2 relu(x) dy: with respect to dy, and to x (2 dy where x > 0)."""
    dy, x = ctx.saved_tensors
    return 2 * torch.relu(x) * grad, 2 * dy * grad * (x > 0)

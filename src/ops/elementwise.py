"""A block's elementwise work: token shift with mixes, a time mix before and after its recurrence, squared ReLU.

Each is one pass over memory forward and one backward (token_shift, time_mix and relu_squared in cuda/ for a GPU and in
cuda/cpu/), where plain PyTorch needs up to dozens. In other dtypes and sizes, without a native library (wkv7 warns with
the reason) and with the kernels "portable" and "reference" it is plain PyTorch (src/ops/reference.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from src.config import PLAIN_KERNELS
from src.ops import build, reference

NATIVE_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
# On a GPU a head is summed up by the lanes of a warp, four channels each. What isn't listed is plain PyTorch there.
CUDA_HEAD_SIZES = (16, 32, 64, 128)


def token_shift(
    x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None, mixes: tuple[Tensor, ...], *, kernel: str = "auto"
) -> tuple[Tensor, ...]:
    """For each mix [1, 1, C]: x[t] + (x[t-1] - x[t]) * mix, of x [B, T, C].

    `last` [B, C] is x[-1], before the first token (None: zeros); with `cu_seqlens` [D, C] of each document.
    """
    # One for the channel mix, three or six for the time mix: an op for each, as a schema has a fixed number of outputs.
    if len(mixes) in (1, 3, 6) and _fused(x, kernel):
        if len(mixes) == 1:
            return (torch.ops.rwkv7.token_shift_1(x, last, cu_seqlens, *mixes),)
        op = torch.ops.rwkv7.token_shift_3 if len(mixes) == 3 else torch.ops.rwkv7.token_shift_6
        return op(x, last, cu_seqlens, *mixes)
    return reference.token_shift_reference(x, last, cu_seqlens, mixes)  # any number of mixes


def time_mix_inputs(
    k: Tensor,
    v: Tensor,
    a: Tensor,
    v_first: Tensor | None,
    residual: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    a0: Tensor,
    v0: Tensor,
    head_size: int,
    *,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Key, value, removal and replacement vectors for wkv7, all [B, T, C]; per head:

        rate = sigmoid(a0 + a);   kk = k k_k / max(|k k_k|, 1e-12)
        k (1 + (rate - 1) k_a),   v + (v_first - v) sigmoid(v0 + residual),   -kk,   kk rate

    Without v_first (layer 0) values stay as they are.
    """
    if _fused(k, kernel, head_size):
        if v_first is None:
            # The op gives no values here: an output may not be one of its inputs.
            key, _, remove, replace = torch.ops.rwkv7.time_mix_inputs(
                k, v, a, None, None, k_k, k_a, a0, None, head_size
            )
            return key, v, remove, replace
        return torch.ops.rwkv7.time_mix_inputs(k, v, a, v_first, residual, k_k, k_a, a0, v0, head_size)
    return reference.time_mix_inputs_reference(k, v, a, v_first, residual, k_k, k_a, a0, v0, head_size)


def time_mix_output(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    head_size: int,
    *,
    kernel: str = "auto",
) -> Tensor:
    """(group_norm(y) weight + bias + (sum over the head of r k r_k) v) g; y, r, k, v, g [B, T, C], one group a head."""
    if _fused(y, kernel, head_size):
        return torch.ops.rwkv7.time_mix_output(y, r, k, v, g, r_k, weight, bias, eps, head_size)
    return reference.time_mix_output_reference(y, r, k, v, g, r_k, weight, bias, eps, head_size)


def relu_squared(x: Tensor, *, kernel: str = "auto") -> Tensor:
    """max(x, 0)^2, elementwise; any shape. A second derivative only with kernel "reference", as of all here."""
    return torch.ops.rwkv7.relu_squared(x) if _fused(x, kernel) else reference.relu_squared_reference(x)


def _fused(x: Tensor, kernel: str, head_size: int = 64) -> bool:
    device = x.device.type
    if kernel in PLAIN_KERNELS or x.dtype not in NATIVE_DTYPES.get(device, ()):
        return False
    # Empty tensors have no first element for the native code to point at.
    if x.numel() == 0 or (device == "cuda" and head_size not in CUDA_HEAD_SIZES):
        return False
    return _native(device)


def _native(device: str) -> bool:
    try:
        build.load_native(_register)
    except build.BuildError:
        return False
    return device != "cuda" or build.why_no_cuda() is None


# As torch.compiler.assume_constant_result, without importing the compiler (see recurrence.py).
_native._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _register(namespace: str = "rwkv7") -> None:
    # Schemas are in cuda/elementwise.h; here are the shapes that torch.compile and meta tensors need, and gradients.
    for name, shapes, backward in (
        ("token_shift_1", _like_first, _shift_backward),
        ("token_shift_3", lambda x, *_: tuple(_like_first(x) for _ in range(3)), _shift_backward),
        ("token_shift_6", lambda x, *_: tuple(_like_first(x) for _ in range(6)), _shift_backward),
        ("time_mix_inputs", _inputs_shapes, _inputs_backward),
        ("time_mix_output", _like_first, _output_backward),
        ("relu_squared", _like_first, _relu_backward),
    ):
        torch.library.register_fake(f"{namespace}::{name}", shapes)
        torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=_setup_context)
        torch.library.register_autograd(f"{namespace}::{name}_backward", _no_double_backward)
    for name, backward_shapes in (
        ("token_shift_1", lambda d, *inputs: _shift_shapes(*inputs)),
        ("token_shift_3", lambda *args: _shift_shapes(*args[3:])),
        ("token_shift_6", lambda *args: _shift_shapes(*args[6:])),
        ("time_mix_inputs", _inputs_backward_shapes),
        ("time_mix_output", lambda d, *inputs: tuple(_like_first(x) for x in inputs[:8])),
        ("relu_squared", lambda dy, x: _like_first(x)),
    ):
        torch.library.register_fake(f"{namespace}::{name}_backward", backward_shapes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    # Inputs only: what backward needs besides is cheaper to compute again than to keep.
    ctx.save_for_backward(*(x for x in inputs if x is None or isinstance(x, Tensor)))
    ctx.numbers = tuple(x for x in inputs if not (x is None or isinstance(x, Tensor)))


def _no_double_backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    raise RuntimeError("the fused elementwise ops have no second derivative; use kernel='reference' for it")


def _like_first(x: Tensor, *_: Any) -> Tensor:
    # Dense, not empty_like, which would keep the strides of a view: the native code writes dense tensors.
    return x.new_empty(x.shape)


def _shift_shapes(x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None, *mixes: Tensor) -> tuple[Tensor, ...]:
    dlast = x.new_empty(0 if last is None else last.shape[0], x.shape[2])
    return (_like_first(x), dlast, *(_like_first(mix) for mix in mixes))


def _shift_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    x, last, cu_seqlens, *mixes = ctx.saved_tensors
    ops = torch.ops.rwkv7
    op = {1: ops.token_shift_1_backward, 3: ops.token_shift_3_backward, 6: ops.token_shift_6_backward}[len(mixes)]
    dx, dlast, *dmixes = op(*grads, x, last, cu_seqlens, *mixes)
    return (dx, None if last is None else dlast, None, *dmixes)  # integers have no gradient


def _inputs_shapes(k: Tensor, v: Tensor, a: Tensor, v_first: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    value = v.new_empty(0) if v_first is None else _like_first(v)
    return _like_first(k), value, _like_first(k), _like_first(k)


def _inputs_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: under gradient checkpointing a second access raises
    gradients = torch.ops.rwkv7.time_mix_inputs_backward(*grads, *saved, *ctx.numbers)
    dk, dv, da, dv_first, dresidual, dk_k, dk_a, da0, dv0 = gradients
    if saved[3] is None:
        return dk, None, da, None, None, dk_k, dk_a, da0, None, None
    return dk, dv, da, dv_first, dresidual, dk_k, dk_a, da0, dv0, None


def _inputs_backward_shapes(
    dkey: Tensor,
    dvalue: Tensor,
    dremove: Tensor,
    dreplace: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    v_first: Tensor | None,
    residual: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    a0: Tensor,
    v0: Tensor | None,
    head_size: int,
) -> tuple[Tensor, ...]:
    nothing = v.new_empty(0)
    dv, dv_first, dresidual = (nothing if v_first is None else _like_first(v) for _ in range(3))
    dv0 = nothing if v0 is None else _like_first(v0)
    # An empty tensor where there is no such input: a schema has no optional outputs.
    return (_like_first(k), dv, _like_first(a), dv_first, dresidual, *map(_like_first, (k_k, k_a, a0)), dv0)


def _output_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.rwkv7.time_mix_output_backward(dout, *ctx.saved_tensors, *ctx.numbers), None, None)


def _relu_backward(ctx: Any, dy: Tensor) -> Tensor:
    return torch.ops.rwkv7.relu_squared_backward(dy, *ctx.saved_tensors)

"""Cross entropy with L2Wrap: one pass over the logits forward, and a gradient that can overwrite them.

    loss = (1/n) sum over counting tokens of (logsumexp(z) - z[target])           n: the tokens that count
    dz   = g/n * (softmax(z) - onehot(target))  and  + g/n * 1e-4 * z at the largest logit      g: the incoming gradient

Sums and softmax are computed in fp32 (float64 for float64), whatever the logits' dtype. Two native ops do it, each in
one pass (cuda/cross_entropy.h has their schemas); elsewhere plain PyTorch with only `ROWS` rows in fp32 at once.
Plain formula: `src.ops.reference.cross_entropy_l2wrap_reference`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from src.ops import build
from src.ops.product import linear, weight_gradient
from src.ops.reference import L2WRAP

ROWS = 4096  # rows of low-precision logits that plain PyTorch has in fp32 at a time
NATIVE_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}


def cross_entropy_l2wrap(
    logits: Tensor, targets: Tensor, ignore_index: int = -100, *, overwrite: bool = False
) -> Tensor:
    """Mean cross entropy of logits [..., V] against targets int64 [...]; its gradient has the L2Wrap term.

    Tokens whose target is `ignore_index` count for nothing. Returns an fp32 scalar (float64 for float64 logits), 0
    when no token counts. With `overwrite` backward writes the gradient over the logits: for logits that nobody else
    needs, such as a layer's output.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} need targets {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}"
        )
    _check_device(logits, targets)  # the native code reads both as memory of one device
    return _CrossEntropy.apply(logits.flatten(0, -2), targets.flatten().contiguous(), ignore_index, overwrite)


def linear_cross_entropy_l2wrap(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, ignore_index: int = -100
) -> Tensor:
    """`cross_entropy_l2wrap(hidden @ weight.T, targets)` with at most `chunk` rows of logits in memory (0: all).

    hidden [..., C], weight [V, C], targets int64 [...]. Logits have the dtype of hidden; the gradient of weight is
    summed in fp32.
    """
    if chunk < 0:
        raise ValueError(f"--head_chunk must be 0 (off) or a number of token rows, got {chunk}")
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} needs targets {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}"
        )
    _check_device(hidden, targets)
    if chunk == 0:
        # Nobody else has these logits, so their gradient may overwrite them.
        return cross_entropy_l2wrap(linear(hidden, weight), targets, ignore_index, overwrite=True)
    want_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    rows = targets.flatten().contiguous()
    return _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, rows, chunk, ignore_index, want_grad)


def _check_device(x: Tensor, targets: Tensor) -> None:
    if x.device != targets.device:
        raise ValueError(
            f"targets must be on the device of what they are compared with, {x.device}, got {targets.device}"
        )


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _counting(targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows count, how many (at least 1), and targets that are valid in every row."""
    # The number stays a tensor: .item() would wait for the device in every step.
    counts = targets != ignore_index
    return counts, counts.sum().clamp(min=1), targets.masked_fill(~counts, 0)


def _parts(tensor: Tensor, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, tensor.shape[0], max(rows, 1)))


def _native(device: str, dtype: torch.dtype) -> bool:
    """Whether the native ops serve these logits. Builds and loads them on the first call (of a failure wkv7 warns)."""
    if dtype not in NATIVE_DTYPES.get(device, ()):
        return False
    try:
        build.load_native(_register)
    except build.BuildError:
        return False
    return device != "cuda" or build.why_no_cuda() is None


# As torch.compiler.assume_constant_result, without importing the compiler (see recurrence.py).
_native._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _register() -> None:
    torch.library.register_fake("rwkv7::cross_entropy_l2wrap_forward", _forward_shapes)
    torch.library.register_fake("rwkv7::cross_entropy_l2wrap_backward_", lambda *_: None)


class _Softmax(NamedTuple):
    """What the gradient needs of a row besides its logits: softmax(z) = exp(z - largest) / total. All [rows]."""

    largest: Tensor
    total: Tensor
    where: Tensor  # int64: the first index of the largest


def _forward_shapes(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nll, largest, total = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))
    return nll, largest, total, torch.empty_like(targets)


def _forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, _Softmax]:
    """-log softmax(z)[target] per row, 0 where the target is ignore_index, and the softmax (undefined in such rows)."""
    if _native(logits.device.type, logits.dtype):
        nll, *softmax = torch.ops.rwkv7.cross_entropy_l2wrap_forward(logits.contiguous(), targets, ignore_index)
        return nll, _Softmax(*softmax)
    counts, _, safe_targets = _counting(targets, ignore_index)
    dtype = _accumulation_dtype(logits.dtype)
    nll, largest, total = (logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(3))
    where = torch.empty_like(targets)
    for part in _parts(logits, logits.shape[0] if logits.dtype == dtype else ROWS):
        z = logits[part].to(dtype)
        largest[part], where[part] = z.max(-1)
        total[part] = (z - largest[part][:, None]).exp_().sum(-1)
        # The target's logit is taken from z, as its exponential may have underflowed.
        picked = z.gather(-1, safe_targets[part][:, None]).squeeze(-1)
        nll[part] = torch.where(counts[part], total[part].log() - (picked - largest[part]), 0)
    return nll, _Softmax(largest, total, where)


def _gradient_(logits: Tensor, safe_targets: Tensor, softmax: _Softmax, scale: Tensor) -> Tensor:
    """scale * (softmax(z) - onehot(target) + 1e-4 z at the largest z), row by row, in place of z.

    scale [rows] is 0 for ignored rows. Whoever calls this owns the logits.
    """
    if _native(logits.device.type, logits.dtype):
        logits = logits.contiguous()  # a copy only where they are a view: then that is overwritten, and returned
        torch.ops.rwkv7.cross_entropy_l2wrap_backward_(logits, safe_targets, *softmax, scale, L2WRAP)
        return logits
    dtype = _accumulation_dtype(logits.dtype)
    for part in _parts(logits, logits.shape[0] if logits.dtype == dtype else ROWS):
        largest, total, where = (x[part][:, None] for x in softmax)
        factor = scale[part][:, None]
        grad = logits[part].to(dtype).sub_(largest).exp_().mul_(factor / total)
        grad.scatter_add_(-1, safe_targets[part][:, None], -factor)
        grad.scatter_add_(-1, where, largest * factor * L2WRAP)
        grad.masked_fill_(factor == 0, 0)  # an ignored row's logits need not be finite
        if logits.dtype != dtype:
            logits[part] = grad
    return logits


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int, overwrite: bool) -> Tensor:
        counts, count, safe_targets = _counting(targets, ignore_index)
        nll, softmax = _forward(logits, targets, ignore_index)
        ctx.save_for_backward(logits, safe_targets, *softmax, counts / count.to(nll.dtype))
        ctx.overwrite = overwrite
        return nll.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        logits, safe_targets, *softmax, weight = ctx.saved_tensors
        scale = weight * grad_loss
        if ctx.overwrite:
            # A second backward through the same graph finds no logits any more; PyTorch sees it by this and says so.
            torch.autograd.graph.increment_version(logits)
        else:
            logits = logits.clone()
        return _gradient_(logits, safe_targets, _Softmax(*softmax), scale), None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are formed in forward, while a chunk's logits exist; backward only scales them.

    They are kept per token, not yet divided by the count, so that fp16 and bf16 hold them well.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, ignore_index: int, want_grad: bool
    ) -> Tensor:
        counts, count, safe_targets = _counting(targets, ignore_index)
        dtype = _accumulation_dtype(hidden.dtype)
        total = hidden.new_zeros((), dtype=dtype)  # summed over chunks in fp32, divided once
        grad_hidden = torch.empty_like(hidden) if want_grad and ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if want_grad and ctx.needs_input_grad[1] else None
        for part in _parts(hidden, chunk):
            logits = hidden[part] @ weight.t()
            nll, softmax = _forward(logits, targets[part], ignore_index)
            total += nll.sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad_logits = _gradient_(logits, safe_targets[part], softmax, counts[part].to(dtype))
            del logits
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                # In fp32: a bf16 sum over many chunks would drop the small ones.
                grad_weight += weight_gradient(grad_logits, hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight, count)
        ctx.weight_dtype = weight.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, count = ctx.saved_tensors
        scale = grad_loss / count
        # Out of place: backward may run a second time through the same graph.
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * scale).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None

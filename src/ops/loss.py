"""Cross entropy with L2Wrap, lean in memory: the gradient is formed in place of the logits, chunk by chunk.

    loss = (1/n) sum over counting tokens of (logsumexp(z) - z[target])           n: the tokens that count
    dz   = g/n * (softmax(z) - onehot(target))  and  + g/n * 1e-4 * z at the largest logit      g: the incoming gradient

Sums and softmax are computed in fp32 (float64 for float64), whatever the logits' dtype; only `ROWS` rows are in fp32 at once.
Plain formula: `src.ops.reference.cross_entropy_l2wrap_reference`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src.ops.reference import L2WRAP

ROWS = 4096  # rows of low-precision logits that are in fp32 at a time


def cross_entropy_l2wrap(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean cross entropy of logits [..., V] against targets int64 [...]; its gradient has the L2Wrap term.

    Tokens whose target is `ignore_index` count for nothing. Returns an fp32 scalar (float64 for float64 logits), 0 when no token counts.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} need targets {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}"
        )
    return _CrossEntropy.apply(logits.flatten(0, -2), targets.flatten(), ignore_index)


def linear_cross_entropy_l2wrap(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, ignore_index: int = -100
) -> Tensor:
    """`cross_entropy_l2wrap(hidden @ weight.T, targets)` with never more than `chunk` token rows of logits in memory (0: all at once).

    hidden [..., C], weight [V, C], targets int64 [...]. Logits have the dtype of hidden; the gradient of weight is summed in fp32.
    """
    if chunk < 0:
        raise ValueError(f"--head_chunk must be 0 (off) or a number of token rows, got {chunk}")
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} needs targets {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}"
        )
    if chunk == 0:
        return cross_entropy_l2wrap(hidden @ weight.t(), targets, ignore_index)
    want_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), chunk, ignore_index, want_grad)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _counting(targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows count, how many (at least 1, as a tensor: no wait for the device), and targets that are valid everywhere."""
    counts = targets != ignore_index
    return counts, counts.sum().clamp(min=1), targets.masked_fill(~counts, 0)


def _parts(tensor: Tensor, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, tensor.shape[0], max(rows, 1)))


class _Softmax(NamedTuple):
    """The softmax of some rows, not yet divided by its sum, and what loss and gradient need of it."""

    exps: Tensor  # [rows, V] exp(z - largest)
    total: Tensor  # [rows] sum of exps
    largest: Tensor  # [rows, 1]
    where: Tensor  # [rows, 1]


def _softmax(logits: Tensor) -> _Softmax:
    largest, where = logits.max(-1, keepdim=True)
    exps = (logits - largest).exp_()
    return _Softmax(exps, exps.sum(-1), largest, where)


def _negative_log_likelihood(softmax: _Softmax, logits: Tensor, safe_targets: Tensor) -> Tensor:
    """-log softmax(z)[target] per row; the target's logit is taken from z, as its exponential may have underflowed."""
    return softmax.total.log() - (logits.gather(-1, safe_targets[:, None]) - softmax.largest).squeeze(-1)


def _gradient(softmax: _Softmax, safe_targets: Tensor, scale: Tensor) -> Tensor:
    """scale * (softmax(z) - onehot(target) + 1e-4 z at the largest z), row by row, in place of the exponentials.

    scale [rows] is 0 for ignored rows.
    """
    grad = softmax.exps.mul_((scale / softmax.total)[:, None])
    grad.scatter_add_(-1, safe_targets[:, None], -scale[:, None])
    return grad.scatter_add_(-1, softmax.where, softmax.largest * scale[:, None] * L2WRAP)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        counts, count, safe_targets = _counting(targets, ignore_index)
        dtype = _accumulation_dtype(logits.dtype)
        rows = logits.shape[0] if logits.dtype == dtype else ROWS
        total = logits.new_zeros((), dtype=dtype)
        for part in _parts(logits, rows):
            z = logits[part].to(dtype)
            total += torch.where(counts[part], _negative_log_likelihood(_softmax(z), z, safe_targets[part]), 0).sum()
        ctx.save_for_backward(logits, safe_targets, counts / count.to(dtype))
        return total / count

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        logits, safe_targets, weight = ctx.saved_tensors
        scale = weight * grad_loss
        if logits.dtype == scale.dtype:
            return _gradient(_softmax(logits), safe_targets, scale), None, None
        grad = torch.empty_like(logits)
        for part in _parts(logits, ROWS):
            grad[part] = _gradient(_softmax(logits[part].to(scale.dtype)), safe_targets[part], scale[part])
        return grad, None, None


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
        total = hidden.new_zeros((), dtype=dtype)
        grad_hidden = torch.empty_like(hidden) if want_grad and ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if want_grad and ctx.needs_input_grad[1] else None
        for part in _parts(hidden, chunk):
            logits = (hidden[part] @ weight.t()).to(dtype)
            softmax = _softmax(logits)
            total += torch.where(counts[part], _negative_log_likelihood(softmax, logits, safe_targets[part]), 0).sum()
            del logits
            if grad_hidden is None and grad_weight is None:
                continue
            grad_logits = _gradient(softmax, safe_targets[part], counts[part].to(dtype)).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight, count)
        ctx.weight_dtype = weight.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, count = ctx.saved_tensors
        scale = grad_loss / count
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * scale).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None

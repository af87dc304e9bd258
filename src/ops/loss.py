"""Cross entropy with L2Wrap, lean in memory: the gradient is formed in place of the logits, chunk by chunk.

    loss = (1/n) sum over counting tokens of (logsumexp(z) - z[target])           n: the tokens that count
    dz   = g/n * (softmax(z) - onehot(target))  and  + g/n * 1e-4 * z at the largest logit      g: the incoming gradient

Sums and softmax are computed in fp32 (float64 for float64), whatever the logits' dtype; only `ROWS` rows are in fp32 at once.
Plain formula: `src.ops.reference.cross_entropy_l2wrap_reference`.
"""

from typing import Any

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


def _negative_log_likelihood(logits: Tensor, safe_targets: Tensor) -> tuple[Tensor, Tensor]:
    """logsumexp(z) - z[target] and logsumexp(z), per row."""
    log_total = torch.logsumexp(logits, -1)
    return log_total - logits.gather(-1, safe_targets[:, None]).squeeze(-1), log_total


def _gradient(logits: Tensor, log_total: Tensor, safe_targets: Tensor, scale: Tensor) -> Tensor:
    """scale * (softmax(z) - onehot(target) + 1e-4 z at the largest z), row by row; scale [rows] is 0 for ignored rows."""
    largest, where = logits.max(-1, keepdim=True)
    scale = scale[:, None]
    grad = torch.exp(logits - log_total[:, None]).mul_(scale)
    grad.scatter_add_(-1, safe_targets[:, None], -scale)
    return grad.scatter_add_(-1, where, largest * scale * L2WRAP)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        counts, count, safe_targets = _counting(targets, ignore_index)
        dtype = _accumulation_dtype(logits.dtype)
        rows = logits.shape[0] if logits.dtype == dtype else ROWS
        nll, log_total = [], []
        for start in range(0, logits.shape[0], max(rows, 1)):
            part = slice(start, start + rows)
            one_nll, one_total = _negative_log_likelihood(logits[part].to(dtype), safe_targets[part])
            nll.append(one_nll)
            log_total.append(one_total)
        if not nll:
            return logits.new_zeros((), dtype=dtype)
        ctx.save_for_backward(logits, torch.cat(log_total), safe_targets, counts / count.to(dtype))
        return torch.where(counts, torch.cat(nll), 0).sum() / count

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.saved_tensors:
            return None, None, None
        logits, log_total, safe_targets, weight = ctx.saved_tensors
        scale = weight * grad_loss
        if logits.dtype == log_total.dtype:
            return _gradient(logits, log_total, safe_targets, scale), None, None
        grad = torch.empty_like(logits)
        for start in range(0, logits.shape[0], ROWS):
            part = slice(start, start + ROWS)
            grad[part] = _gradient(logits[part].to(log_total.dtype), log_total[part], safe_targets[part], scale[part])
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
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ weight.t()).to(dtype)
            nll, log_total = _negative_log_likelihood(logits, safe_targets[part])
            total += torch.where(counts[part], nll, 0).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad_logits = _gradient(logits, log_total, safe_targets[part], counts[part].to(dtype)).to(hidden.dtype)
            del logits
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

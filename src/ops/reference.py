"""Each op in plain PyTorch: RWKV-7's mathematics, slow, exact and differentiable by autograd."""

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

L2WRAP = 1e-4


def wkv7_decay(w: Tensor) -> Tensor:
    """decay = exp(-exp(-1/2) sigmoid(w)), always above 0.545; fp32 (float64 for float64 input)."""
    return torch.exp(-math.exp(-0.5) * torch.sigmoid(_accumulate(w)))


def wkv7_reference(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-7's recurrence, per head, with S of shape (N_value, N_key):

        S_t = S_{t-1} diag(decay_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T
        y_t = S_t r_t

    Contract: `src.ops.recurrence.wkv7`.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        ys, states = [], []
        for document, (begin, end) in enumerate(pairwise(bounds)):
            start = None if state is None else state[document : document + 1]
            one = (slice(None), slice(begin, end))
            y, final = wkv7_reference(r[one], w[one], k[one], v[one], a[one], b[one], start)
            ys.append(y)
            states.append(final)
        return torch.cat(ys, 1), torch.cat(states)

    dtype = r.dtype
    decay = wkv7_decay(w)
    r, k, v, a, b = (_accumulate(x) for x in (r, k, v, a, b))
    B, T, H, N = r.shape
    # In fp32 whatever the inputs are: rounding S at every token would add up over the sequence.
    S = r.new_zeros(B, H, N, N) if state is None else state.clone()
    ys = []
    for t in range(T):
        # sa before the decay: the removal key reads the state as the token before left it.
        sa = S @ a[:, t, :, :, None]
        S = S * decay[:, t, :, None, :] + sa * b[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
        ys.append(S @ r[:, t, :, :, None])
    if not ys:  # a document without tokens
        return r.new_empty(B, 0, H, N, dtype=dtype), S
    return torch.stack(ys, 1).squeeze(-1).to(dtype), S


def token_shift_reference(
    x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None, mixes: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """x[t] + (x[t-1] - x[t]) * mix for each mix. Contract: `src.ops.elementwise.token_shift`."""
    xx = rows_before(x, last, cu_seqlens) - x
    return tuple(x + xx * mix for mix in mixes)


def rows_before(x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """x[t-1] of x [B, T, C]; before a sequence or document its row of `last`, or zeros."""
    if cu_seqlens is None:
        before = x.new_zeros(x.shape[0], 1, x.shape[2]) if last is None else last.unsqueeze(1)
        return torch.cat([before, x[:, :-1]], dim=1)
    # what an empty document starts from goes to row T, which is dropped
    starts = torch.where(cu_seqlens[1:] > cu_seqlens[:-1], cu_seqlens[:-1], x.shape[1]).long()
    before = x.new_zeros(starts.shape[0], x.shape[2]) if last is None else last
    return F.pad(x, (0, 0, 1, 0)).index_copy(1, starts, before.unsqueeze(0))[:, :-1]


def time_mix_inputs_reference(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Key, value, removal -kk and replacement kk * rate. Contract: `src.ops.elementwise.time_mix_inputs`."""
    if v_first is not None and residual is not None:  # layer 0 has neither: its values are v_first
        v = v + (v_first - v) * torch.sigmoid(v0 + residual)
    rate = torch.sigmoid(a0 + a)  # the paper's in-context learning rate
    kk = F.normalize((k * k_k).unflatten(-1, (-1, head_size)), dim=-1, eps=1e-12).flatten(-2)
    return k * (1 + (rate - 1) * k_a), v, -kk, kk * rate


def time_mix_output_reference(
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
) -> Tensor:
    """(group_norm(y) + (sum over the head of r k r_k) v) g. Contract: `src.ops.elementwise.time_mix_output`."""
    # The bonus: what r reads of this token's own key and value, weighted by r_k.
    r, k, v_heads = (x.unflatten(-1, (-1, head_size)) for x in (r, k, v))
    bonus = ((r * k * r_k).sum(dim=-1, keepdim=True) * v_heads).flatten(-2)
    normal = F.group_norm(y.flatten(0, -2), y.shape[-1] // head_size, weight, bias, eps).view(y.shape)
    return (normal + bonus) * g


def cross_entropy_l2wrap_reference(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean cross entropy over the tokens that count, plus a term of value zero whose gradient is L2Wrap's:
    (1e-4 / count) * z on each counting token's largest logit z.
    """
    logits = _accumulate(logits).flatten(0, -2)
    targets = targets.flatten()
    counts = targets != ignore_index
    count = counts.sum().clamp(min=1).to(logits.dtype)
    nll = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum") / count
    # By argmax and gather: the gradient of amax is spread over equal logits, the kernels give it to the first.
    largest = (
        logits.amax(-1, keepdim=True) if logits.shape[0] == 0 else logits.gather(-1, logits.argmax(-1, keepdim=True))
    )
    half_square = 0.5 * (largest.squeeze(-1) ** 2 * counts).sum() * (L2WRAP / count)
    # Value zero, gradient z: L2Wrap pulls the largest logits towards zero without showing in the loss.
    return nll + (half_square - half_square.detach())


def add_layer_norm_reference(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(s, (s - mean) / sqrt(variance + eps) weight + bias) of s = x + added (None: x)."""
    total = x if added is None else x + added
    return total, torch.nn.functional.layer_norm(total, weight.shape, weight, bias, eps)


def relu_squared_reference(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    return torch.relu(x).square()


def _accumulate(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

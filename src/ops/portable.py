"""wkv7 in plain PyTorch, in chunks of tokens: batched matrix products, forward and backward, on any device.

Within a chunk of L tokens with the state S [N value, N key] before it, P_t the product of its decays up to t, and rows
of a [L, N] matrix for tokens:

    a' = a P_{t-1},  r' = r P_t,  b' = b / P_t,  k' = k / P_t
    [A_ab A_ak; A_rb A_rk] = [a'; r'] [b'; k']^T, of which the rows of a keep what is strictly before them
    U = (I - A_ab)^-1 (a' S^T + A_ak V)                     what the removal keys read of the state, the "sa" of a token
    Y = r' S^T + A_rb U + A_rk V
    S <- (S + [U; V]^T [b'; k']) diag(P_L)

and backward with D the gradient of the state after the chunk, E = D diag(P_L):

    Z = (I - A_ab)^-T (b' E^T + A_rb^T dY)
    dV = k' E^T + A_ak^T Z + A_rk^T dY
    D <- E + [Z; dY]^T [a'; r']                             the same step as S's, with other operands
    Q = [Z; dY] [U; V]^T, masked as above
    [da'; dr'] = [Z; dY] S + Q [b'; k'],   [db'; dk'] = [U; V] E + Q^T [a'; r']

All chunks are computed at once but for the two recurrences over them, S and D. Arithmetic is fp32 whatever the inputs
are. Every operator is one of PyTorch's core ATen set, or the in-place form of one, and no shape depends on values.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from src.ops.portable_layout import CHUNK, Packing, from_chunks, pack, to_chunks
from src.ops.portable_scan import scan
from src.ops.reference import wkv7_reference

LOG_DECAY = -math.exp(-0.5)  # log decay = LOG_DECAY * sigmoid(w)
DECAY_BLOCK = 4  # tokens whose log decays are summed
BLOCK = 8  # of the inverse: within it row by row, beyond it by products


def wkv7_portable(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, final_state). Contract: `src.ops.recurrence.wkv7`; float64 inputs are computed in float64."""
    if r.device.type == "cpu" and cu_seqlens is not None and not torch.compiler.is_compiling():
        bounds = [0, *cu_seqlens.tolist(), r.shape[1]]
        # Elsewhere reading the bounds would wait for the device.
        if bounds != sorted(bounds) or bounds[1] != 0 or bounds[-2] != bounds[-1]:
            raise RuntimeError(f"cu_seqlens must run from 0 to {r.shape[1]} and not decrease, got {bounds[1:-1]}")
    # Decoding: a chunk of one token is the formula itself. Its gradient by autograd has fewer digits for a large w.
    if cu_seqlens is None and r.shape[1] == 1 and not torch.is_grad_enabled():
        return wkv7_reference(r, w, k, v, a, b, state)
    y, final_state = _Chunked.apply(r, w, k, v, a, b, state, cu_seqlens)
    return y, final_state


class _Prepared(NamedTuple):
    """What a chunk needs besides the state; S sequences side by side, rows of a and b before those of r and k."""

    decays: Tensor  # [C, S, 2 L, N]: P_{t-1} for a, then P_t for r
    reads: Tensor  # [C, S, 2 L, N]: [a'; r']
    writes: Tensor  # [C, S, 2 L, N]: [b'; k']
    products: Tensor  # [C, S, 2 L, 2 L]: [A_ab A_ak; A_rb A_rk]
    inverse: Tensor  # [C, S, L, L]: (I - A_ab)^-1

    @property
    def total(self) -> Tensor:
        """P_L, [C, S, 1, N]."""
        return self.decays[:, :, -1:]


def _prepare(r: Tensor, w: Tensor, k: Tensor, a: Tensor, b: Tensor, packing: Packing | None) -> _Prepared:
    rate = torch.sigmoid(_dense(w, packing, padding=-math.inf))
    decays = _decays(rate)
    L = CHUNK
    reads = _pair(a, r, packing) * decays
    writes = (_pair(b, k, packing).unflatten(2, (2, L)) / decays[:, :, None, L:]).flatten(2, 3)
    products = _bmm(reads, _transposed(writes)).mul_(_mask(rate))
    return _Prepared(decays, reads, writes, products, _inverse(products[:, :, :L, :L]))


class _Chunked(torch.autograd.Function):
    """wkv7 with the backward of the module's formulas; keeps its inputs but v, S before each chunk, and [U; V]."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        r, w, k, v, a, b, state, cu_seqlens = inputs
        packing = None if cu_seqlens is None else pack(cu_seqlens, r.shape[1])
        p = _prepare(r, w, k, a, b, packing)
        V = _dense(v, packing)
        start = _zeros(r, cu_seqlens) if state is None else state
        chunks = (p.reads, p.writes, p.inverse, _bmm(p.products[:, :, :CHUNK, CHUNK:], V), V, p.total)
        if packing is None:
            S, UV, y, after = scan(*chunks, start.flatten(0, 1), None, None, False)
            final_state = (after[-1] * p.total[-1]).view(start.shape)
        else:
            S, UV, y, after = scan(*chunks, start, packing.is_first, packing.document, False)
            final_state = after.index_select(0, packing.last) * p.total.index_select(0, packing.last)
        y = y + _bmm(p.products[:, :, CHUNK:], UV)
        ctx.save_for_backward(r, w, k, a, b, state, cu_seqlens, S, UV)
        ctx.set_materialize_grads(False)  # training drops the final state: no zeros are made for its gradient
        return from_chunks(y, r, packing), final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:
        r, w, k, a, b, state, cu_seqlens, S, UV = ctx.saved_tensors
        packing = None if cu_seqlens is None else pack(cu_seqlens, r.shape[1])
        p = _prepare(r, w, k, a, b, packing)
        dY = _dense(torch.full_like(r, 0.0) if dy is None else dy, packing)
        end = _zeros(r, cu_seqlens) if dfinal_state is None else dfinal_state
        inner = _bmm(_transposed(p.products[:, :, CHUNK:, :CHUNK]), dY)  # A_rb^T dY
        chunks = (p.writes, p.reads, _transposed(p.inverse), inner, dY, p.total)
        if packing is None:
            end = end.flatten(0, 1) * p.total[-1]
            E, ZdY, dV, D = scan(*chunks, end, None, None, True)
            dstate = None if state is None else D[0].view(state.shape)
        else:
            end = end * p.total.index_select(0, packing.last)
            E, ZdY, dV, D = scan(*chunks, end, packing.is_last, packing.document, True)
            dstate = None if state is None else D.index_select(0, packing.first)
        dV = dV + _bmm(_transposed(p.products[:, :, :, CHUNK:]), ZdY)
        Q = _bmm(ZdY, _transposed(UV)).mul_(_mask(UV))
        dreads = _bmm(ZdY, S).add_(_bmm(Q, p.writes))
        dwrites = _bmm(UV, E).add_(_bmm(_transposed(Q), p.reads))
        dw = _decay_gradient(dreads * p.reads, dwrites * p.writes, (D * S).sum(2, keepdim=True))
        raw = _dense(w, packing, padding=-math.inf)
        # sigmoid(-w) and not 1 - sigmoid(w), which has no digits left for a large w.
        dw = dw.mul_(torch.sigmoid(raw)).mul_(torch.sigmoid(-raw)).mul_(LOG_DECAY)
        da, dr = dreads.mul_(p.decays).split_with_sizes((CHUNK, CHUNK), 2)
        db, dk = (x / p.decays[:, :, CHUNK:] for x in dwrites.split_with_sizes((CHUNK, CHUNK), 2))
        gradients = (from_chunks(x, r, packing) for x in (dr, dw, dk, dV, da, db))
        return (*gradients, dstate, None)


def _decay_gradient(reads: Tensor, writes: Tensor, through: Tensor) -> Tensor:
    """Gradient of the log decays [C, S, L, N], from gradient times value of reads, writes [C, S, 2 L, N] and state.

    The decay of token t multiplies what the state or a token before t brought, and a token from t on takes: all that
    the state brings (`through`, [C, S, 1, N]) and earlier tokens write, less what was read before. The removal key of a
    token reads before its decay, the receptance after it.
    """
    removed = reads[:, :, :CHUNK]
    difference = writes - reads
    before, _ = _triangles(CHUNK, reads)
    return _times(before, difference[:, :, :CHUNK] + difference[:, :, CHUNK:]).sub_(removed).add_(through)


def _zeros(r: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """States of zeros for these inputs: [B, H, N, N], with cu_seqlens [D, H, N, N]."""
    B, _, H, N = r.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.full((sequences, H, N, N), 0.0, dtype=_accumulate(r[:0]).dtype, device=r.device)


def _decays(rate: Tensor) -> Tensor:
    """[P_{t-1}; P_t] [C, S, 2 L, N] of rate = sigmoid(w) [C, S, L, N].

    exp() of a sum over the whole chunk would have the sum's rounding error as its relative one, a few 1e-7. So only
    sums of a few tokens are exponents, and their exponentials are multiplied.
    """
    blocks, size = CHUNK // DECAY_BLOCK, DECAY_BLOCK
    before, until = _triangles(size, rate)
    rate = rate.unflatten(2, (blocks, size)).flatten(1, 2)
    within = _times(LOG_DECAY * torch.cat([before, until]), rate).exp_().unflatten(1, (-1, blocks))
    total = within[:, :, :, -1:]
    starts = [torch.full_like(total[:, :, 0], 1.0)]
    for block in range(blocks - 1):
        starts.append(starts[-1] * total[:, :, block])
    within = within.mul_(torch.cat(starts, 2).unsqueeze(3)).unflatten(3, (2, size))
    return within.permute(0, 1, 3, 2, 4, 5).flatten(2, 4)


def _inverse(strict: Tensor) -> Tensor:
    """(I - A)^-1 of strictly lower triangular A [C, S, L, L], by blocked forward substitution.

    Not by powers of A, (I + A)(I + A^2)...: for keys that resemble each other they grow far beyond the inverse.
    """
    C, S, L, _ = strict.shape
    A = strict.flatten(0, 1)  # [G, L, L]
    diagonal = _blocks(A, BLOCK)
    # Row t of the inverse is e_t + sum_s A[t, s] row_s: each row in turn is added to all that are below it.
    one = torch.arange(0, BLOCK, 1, device=A.device)
    inverse = (one.unsqueeze(1) == one).to(A.dtype).expand(diagonal.shape).clone()
    for s in range(BLOCK - 1):
        inverse[:, s + 1 :, : s + 1] += diagonal[:, s + 1 :, s : s + 1] * inverse[:, s : s + 1, : s + 1]
    # [T1 0; T2 A21 T1  T2] is the inverse of two blocks that A21 connects.
    size = BLOCK
    while size < L:
        pairs = inverse.unflatten(0, (-1, 2))
        upper, lower = pairs[:, 0], pairs[:, 1]
        connection = _blocks(A, 2 * size)[:, size:, :size]
        corner = torch.bmm(torch.bmm(lower, connection), upper)
        rows = torch.cat([upper, torch.full_like(upper, 0.0)], 2), torch.cat([corner, lower], 2)
        inverse = torch.cat(rows, 1)
        size *= 2
    return inverse.unflatten(0, (C, S))


def _blocks(A: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal of A [G, L, L]: [G * L / size, size, size]."""
    count = A.shape[1] // size
    tiles = A.unflatten(2, (count, size)).unflatten(1, (count, size))  # [G, count, size, count, size]
    return tiles.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).flatten(0, 1)


def _triangles(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Lower triangles of ones, without and with the diagonal: they sum what is before, or up to, each token."""
    t = torch.arange(0, size, 1, device=like.device)
    return (t.unsqueeze(1) > t).to(like.dtype), (t.unsqueeze(1) >= t).to(like.dtype)


def _mask(like: Tensor) -> Tensor:
    """[2 L, 2 L]: 1 where a row of [a'; r'] reads what a row of [b'; k'] wrote."""
    before, until = _triangles(CHUNK, like)
    return torch.cat([torch.cat([before, before], 1), torch.cat([until, until], 1)], 0)


def _dense(x: Tensor, packing: Packing | None, padding: float = 0.0) -> Tensor:
    """[B, T, H, N] -> dense [C, S, L, N] in fp32 (float64 for float64)."""
    return _accumulate(to_chunks(x, packing, padding)).flatten(1, 2).contiguous()


def _pair(x: Tensor, y: Tensor, packing: Packing | None) -> Tensor:
    """x and y [B, T, H, N] -> [C, S, 2 L, N], of their dtype."""
    return torch.cat([to_chunks(x, packing), to_chunks(y, packing)], 3).flatten(1, 2)


def _accumulate(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _transposed(x: Tensor) -> Tensor:
    return x.permute(0, 1, 3, 2)


def _bmm(x: Tensor, y: Tensor) -> Tensor:
    """x @ y for [C, S, ., .]."""
    return torch.bmm(x.flatten(0, 1), y.flatten(0, 1)).unflatten(0, x.shape[:2])


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix [I, L] @ x, for x [C, S, L, N]."""
    return _bmm(matrix.expand(*x.shape[:2], *matrix.shape), x)

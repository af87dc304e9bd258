"""wkv7 in plain PyTorch, in chunks of tokens: batched matrix products, forward and backward, on any device.

Within a chunk of L tokens with the state S [N value, N key] before it, P_t the product of its decays up to t, and rows
of a [L, N] matrix for tokens:

    a' = a P_{t-1},  r' = r P_t,  b' = b / P_t,  k' = k / P_t
    [A_ab A_ak; A_rb A_rk] = [a'; r'] [b'; k']^T, of which the rows of a keep what is strictly before them
    W = (I - A_ab)^-1 a'
    U = W S^T + (I - A_ab)^-1 A_ak V                        what the removal keys read of the state, the "sa" of a token
    Y = r' S^T + A_rb U + A_rk V
    S <- (S + [U; V]^T [b'; k']) diag(P_L)

and backward with D the gradient of the state after the chunk, E = D diag(P_L):

    dU = b' E^T + A_rb^T dY,   Z = (I - A_ab)^-T dU
    dV = k' E^T + A_ak^T Z + A_rk^T dY
    D <- E + dU^T W + dY^T r'                               the same step as S's, with other operands
    Q = [Z; dY] [U; V]^T, masked as above
    [da'; dr'] = [Z; dY] S + Q [b'; k'],   [db'; dk'] = [U; V] E + Q^T [a'; r']

All chunks are computed at once but for the two recurrences over them, S and D. In these U and dU are replaced by their
formulas, so a chunk takes one product of a matrix that is known before (`_through_chunks`): their loop is short, and
everything else is in few large operations. Arithmetic is fp32 whatever the inputs are. Every operator is one of
PyTorch's core ATen set, or the in-place or `out` form of one, and no shape depends on values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from src.ops.portable_layout import CHUNK, Packing, from_chunks, pack, to_chunks, write
from src.ops.portable_scan import scan
from src.ops.reference import wkv7_reference

LOG_DECAY = -math.exp(-0.5)  # log decay = LOG_DECAY * sigmoid(w)
DECAY_BLOCK = 4  # tokens whose decays are multiplied first, side by side with the other blocks
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

    decays: Tensor  # [C, B, H, L + 1, N]: 1, P_1, ..., P_L
    reads: Tensor  # [C, S, 2 L, N]: [a'; r']
    writes: Tensor  # [C, S, 2 L, N]: [b'; k']
    products: Tensor  # [C, S, 2 L, 2 L]: [A_ab A_ak; A_rb A_rk]
    inverse: Tensor  # [C, S, L, L]: (I - A_ab)^-1

    @property
    def total(self) -> Tensor:
        """P_L, [C, S, 1, N]."""
        return self.decays[:, :, :, CHUNK:].flatten(1, 2)

    @property
    def shared(self) -> Tensor:
        """W = (I - A_ab)^-1 a', [C, S, L, N]."""
        return _bmm(self.inverse, self.reads[:, :, :CHUNK])


def _prepare(r: Tensor, w: Tensor, k: Tensor, a: Tensor, b: Tensor, packing: Packing | None) -> _Prepared:
    decays = _decays(to_chunks(w, packing, padding=-math.inf))
    before, until = decays[:, :, :, :CHUNK], decays[:, :, :, 1:]
    reads = _pair(torch.mul, (a, before), (r, until), packing)
    writes = _pair(torch.div, (b, until), (k, until), packing)
    products = _bmm(reads, _transposed(writes)).mul_(_mask(reads))
    return _Prepared(decays, reads, writes, products, _inverse(products[:, :, :CHUNK, :CHUNK]))


class _Chunked(torch.autograd.Function):
    """wkv7 with the backward of the module's formulas; keeps its inputs but v, S before each chunk, and [U; V]."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        r, w, k, v, a, b, state, cu_seqlens = inputs
        packing = None if cu_seqlens is None else pack(cu_seqlens, r.shape[1])
        p = _prepare(r, w, k, a, b, packing)
        UV = _with_room(to_chunks(v, packing))
        U, V = UV[:, :, :CHUNK], UV[:, :, CHUNK:]
        U.copy_(_bmm(p.inverse, _bmm(p.products[:, :, :CHUNK, CHUNK:], V)))
        p.reads[:, :, :CHUNK].copy_(p.shared)  # [W; r']: a' isn't needed any more
        start = _zeros(r, cu_seqlens) if state is None else state
        begin = start.flatten(0, 1) if packing is None else start
        S, after, read = _through_chunks(p.reads, p.writes, UV, p.total, begin, packing, reverse=False)
        U.add_(read[:, :, :CHUNK])
        if packing is None:
            final_state = (after[-1] * p.total[-1]).view(start.shape)
        else:
            final_state = after.index_select(0, packing.last) * p.total.index_select(0, packing.last)
        y = read[:, :, CHUNK:], _bmm(p.products[:, :, CHUNK:], UV)
        ctx.save_for_backward(r, w, k, a, b, state, cu_seqlens, S, UV)
        ctx.set_materialize_grads(False)  # training drops the final state: no zeros are made for its gradient
        return _rows(torch.add, *y, r, packing), final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:
        r, w, k, a, b, state, cu_seqlens, S, UV = ctx.saved_tensors
        packing = None if cu_seqlens is None else pack(cu_seqlens, r.shape[1])
        p = _prepare(r, w, k, a, b, packing)
        ZdY = _with_room(to_chunks(torch.full_like(r, 0.0) if dy is None else dy, packing))
        Z, dY = ZdY[:, :, :CHUNK], ZdY[:, :, CHUNK:]
        Z.copy_(_bmm(_transposed(p.products[:, :, CHUNK:, :CHUNK]), dY))  # A_rb^T dY, of dU
        end = _zeros(r, cu_seqlens) if dfinal_state is None else dfinal_state
        reads = torch.cat([p.shared, p.reads[:, :, CHUNK:]], 2)
        end = end.flatten(0, 1) * p.total[-1] if packing is None else end * p.total.index_select(0, packing.last)
        E, D, written = _through_chunks(p.writes, reads, ZdY, p.total, end, packing, reverse=True)
        Z.copy_(_bmm(_transposed(p.inverse), Z + written[:, :, :CHUNK]))
        dv = written[:, :, CHUNK:], _bmm(_transposed(p.products[:, :, :, CHUNK:]), ZdY)
        dstate = None
        if state is not None:
            dstate = D[0].clone().view(state.shape) if packing is None else D.index_select(0, packing.first)
        Q = _bmm(ZdY, _transposed(UV)).mul_(_mask(UV))
        dreads = _bmm(ZdY, S).add_(_bmm(Q, p.writes))
        dwrites = _bmm(UV, E).add_(_bmm(_transposed(Q), p.reads))
        dw = _decay_gradient(p.reads.mul_(dreads), p.writes.mul_(dwrites), (D * S).sum(2, keepdim=True))
        raw = _accumulate(to_chunks(w, packing, padding=-math.inf))
        # sigmoid(-w) and not 1 - sigmoid(w), which has no digits left for a large w.
        slope = torch.sigmoid(raw).mul_(torch.sigmoid(-raw)).mul_(LOG_DECAY).flatten(1, 2)
        before, until = (p.decays[:, :, :, i : i + CHUNK].flatten(1, 2) for i in range(2))
        da, dr = dreads.split_with_sizes((CHUNK, CHUNK), 2)
        db, dk = dwrites.split_with_sizes((CHUNK, CHUNK), 2)
        gradients = (
            _rows(torch.mul, dr, until, r, packing),
            _rows(torch.mul, dw, slope, r, packing),
            _rows(torch.div, dk, until, r, packing),
            _rows(torch.add, *dv, r, packing),
            _rows(torch.mul, da, before, r, packing),
            _rows(torch.div, db, until, r, packing),
        )
        return (*gradients, dstate, None)


def _through_chunks(
    left: Tensor,
    right: Tensor,
    rows: Tensor,
    total: Tensor,
    start: Tensor,
    packing: Packing | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence of the module's docstring; for the gradient with `reverse`, and a, r in the place of b, k.

    left = [l; m], right = [g; h], rows = [u; x], each [C, S, 2 L, N]. X before and after each chunk [C, S, N, N], with
    X <- X + (u + l X^T)^T g + x^T h = X (I + l^T g) + rows^T right,  and left X^T [C, S, 2 L, N].
    """
    step = _bmm(_transposed(left[:, :, :CHUNK]), right[:, :, :CHUNK])
    step.diagonal(dim1=2, dim2=3).add_(1.0)
    added = _bmm(_transposed(rows), right)
    if packing is None:
        before, after = scan(step, added, total, start, None, None, reverse)
    else:
        is_start = packing.is_last if reverse else packing.is_first
        before, after = scan(step, added, total, start, is_start, packing.document, reverse)
    return before, after, _bmm(left, _transposed(before))


def _decay_gradient(reads: Tensor, writes: Tensor, through: Tensor) -> Tensor:
    """Gradient of the log decays [C, S, L, N], from gradient times value of reads, writes [C, S, 2 L, N] and state.

    The decay of token t multiplies what the state or a token before t brought, and a token from t on takes: all that
    the state brings (`through`, [C, S, 1, N]) and earlier tokens write, less what was read before. The removal key of a
    token reads before its decay, the receptance after it.
    """
    removed = reads[:, :, :CHUNK]
    before, _ = _triangles(CHUNK, reads)
    difference = writes.sub_(reads)
    return _times(before, difference[:, :, :CHUNK] + difference[:, :, CHUNK:]).sub_(removed).add_(through)


def _zeros(r: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """States of zeros for these inputs: [B, H, N, N], with cu_seqlens [D, H, N, N]."""
    B, _, H, N = r.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.full((sequences, H, N, N), 0.0, dtype=_accumulate(r[:0]).dtype, device=r.device)


def _decays(w: Tensor) -> Tensor:
    """[1, P_1, ..., P_L] [C, B, H, L + 1, N] of w [C, B, H, L, N].

    Products of the tokens' decays, of which each has an error of its own; exp() of a sum over the whole chunk would
    have the sum's rounding error as its relative one, a few 1e-7.
    """
    decays = torch.constant_pad_nd(_accumulate(w), (0, 0, 1, 0), -math.inf).sigmoid_().mul_(LOG_DECAY).exp_()
    blocks = decays[:, :, :, 1:].unflatten(3, (-1, DECAY_BLOCK))
    for token in range(1, DECAY_BLOCK):
        blocks[..., token, :].mul_(blocks[..., token - 1, :])
    for block in range(1, CHUNK // DECAY_BLOCK):
        blocks[:, :, :, block].mul_(blocks[:, :, :, block - 1, -1:])
    return decays


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


def _with_room(x: Tensor) -> Tensor:
    """[C, S, 2 L, N] in fp32 (float64 for float64): L rows without values, and below them x [C, B, H, L, N]."""
    rows = _empty_pair(x)
    rows[:, :, :, CHUNK:].copy_(x)
    return rows.flatten(1, 2)


def _pair(
    function: Callable[..., Tensor], upper: tuple[Tensor, Tensor], lower: tuple[Tensor, Tensor], packing: Packing | None
) -> Tensor:
    """function(rows [B, T, H, N], decays [C, B, H, L, N]) of both -> [C, S, 2 L, N]."""
    pair = _empty_pair(upper[1])
    write(pair[:, :, :, :CHUNK], function, to_chunks(upper[0], packing), upper[1])
    write(pair[:, :, :, CHUNK:], function, to_chunks(lower[0], packing), lower[1])
    return pair.flatten(1, 2)


def _empty_pair(like: Tensor) -> Tensor:
    C, B, H, L, N = like.shape
    return torch.empty((C, B, H, 2 * L, N), dtype=_accumulate(like[:0]).dtype, device=like.device)


def _rows(function: Callable[..., Tensor], x: Tensor, y: Tensor, like: Tensor, packing: Packing | None) -> Tensor:
    """function(x, y) of [C, S, L, N] -> [B, T, H, N]."""
    sequences = like.shape[0], like.shape[2]
    return from_chunks(function, x.unflatten(1, sequences), y.unflatten(1, sequences), like, packing)


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

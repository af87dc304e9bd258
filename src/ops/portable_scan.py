"""The recurrence over chunks of src/ops/portable.py: forward for the state, backward for its gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def scan(
    left: Tensor,
    right: Tensor,
    inverse: Tensor,
    inner: Tensor,
    values: Tensor,
    scale: Tensor,
    start: Tensor,
    starts_at: Tensor | None,
    source: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X [S, N, N] from chunk to chunk, forward or in `reverse`:

        Q = left X^T;   u = inverse (Q_upper + inner);   X <- X + [u; values]^T right

    and between two chunks X <- X diag(scale), with the scale of the earlier of the two. left, right [C, S, 2 L, N],
    inverse [C, S, L, L], inner and values [C, S, L, N], scale [C, S, 1, N]. X begins as start [S, N, N]. In a packed
    row start is [D, S, N, N], and X becomes start[source[c]] before each chunk c where starts_at [C] is true.

    Returns X before each chunk [C, S, N, N], [u; values] [C, S, 2 L, N], Q_lower [C, S, L, N], and X after each chunk.
    """
    # A compiled graph has the loop as one operator: it is the same graph for any number of chunks.
    function = torch.ops.rwkv7.portable_scan if torch.compiler.is_compiling() else _scan
    return function(left, right, inverse, inner, values, scale, start, starts_at, source, reverse)  # type: ignore[no-any-return]


def _scan(
    left: Tensor,
    right: Tensor,
    inverse: Tensor,
    inner: Tensor,
    values: Tensor,
    scale: Tensor,
    start: Tensor,
    starts_at: Tensor | None,
    source: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chunks, L = left.shape[0], inverse.shape[-1]
    X = start
    kept: list[tuple[Tensor, ...]] = []
    for step in range(chunks):
        c = chunks - 1 - step if reverse else step
        if step:
            X = X * scale[c if reverse else c - 1]
        if starts_at is not None and source is not None:
            begun = start.index_select(0, source[c : c + 1]).squeeze(0)
            X = begun if step == 0 else torch.where(starts_at[c], begun, X)
        before = X
        Q = torch.bmm(left[c], X.permute(0, 2, 1))
        u = torch.bmm(inverse[c], Q[:, :L] + inner[c])
        both = torch.cat([u, values[c]], 1)
        X = X + torch.bmm(both.permute(0, 2, 1), right[c])
        kept.append((before, both, Q[:, L:], X))
    if reverse:
        kept.reverse()
    before, both, lower, after = (torch.cat([x.unsqueeze(0) for x in column]) for column in zip(*kept, strict=True))
    return before, both, lower, after


# On every device: the operator is made of PyTorch's own.
_operator = torch.library.custom_op("rwkv7::portable_scan", _scan, mutates_args=())


@_operator.register_fake
def _shapes(
    left: Tensor,
    right: Tensor,
    inverse: Tensor,
    inner: Tensor,
    values: Tensor,
    scale: Tensor,
    start: Tensor,
    starts_at: Tensor | None,
    source: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    C, S, _, N = left.shape
    X = left.new_empty(C, S, N, N)
    return X, left.new_empty(left.shape), left.new_empty(values.shape), torch.empty_like(X)

"""The recurrence over chunks of src/ops/portable.py: forward for the state, backward for its gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def scan(
    step: Tensor,
    added: Tensor,
    scale: Tensor,
    start: Tensor,
    starts_at: Tensor | None,
    source: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """X [S, N, N] from chunk to chunk, forward or in `reverse`: X <- X step + added, and between two chunks
    X <- X diag(scale), with the scale of the earlier of the two.

    step and added [C, S, N, N], scale [C, S, 1, N]. X begins as start [S, N, N]. In a packed row start is
    [D, S, N, N], and X becomes start[source[c]] before each chunk c where starts_at [C] is true.

    Returns X before each chunk and X after each chunk, [C, S, N, N]. The latter may be `added`, overwritten.
    """
    # A compiled graph has the loop as one operator: it is the same graph for any number of chunks.
    function = torch.ops.rwkv7.portable_scan if torch.compiler.is_compiling() else _scan
    return function(step, added, scale, start, starts_at, source, reverse)  # type: ignore[no-any-return]


def _scan(
    step: Tensor,
    added: Tensor,
    scale: Tensor,
    start: Tensor,
    starts_at: Tensor | None,
    source: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    chunks = step.shape[0]
    order = list(range(chunks))[:: -1 if reverse else 1]
    before, after = torch.empty(added.shape, dtype=added.dtype, device=added.device), added
    for i, c in enumerate(order):
        X = start if i == 0 else after[order[i - 1]] * scale[min(c, order[i - 1])]
        if starts_at is not None and source is not None:
            begun = start.index_select(0, source[c : c + 1]).squeeze(0)
            X = begun if i == 0 else torch.where(starts_at[c], begun, X)
        before[c].copy_(X)
        after[c].add_(torch.bmm(X, step[c]))
    return before, after


def _scan_of_a_graph(
    step: Tensor,
    added: Tensor,
    scale: Tensor,
    start: Tensor,
    starts_at: Tensor | None,
    source: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    return _scan(step, added.clone(), scale, start, starts_at, source, reverse)


# On every device: the operator is made of PyTorch's own.
_operator = torch.library.custom_op("rwkv7::portable_scan", _scan_of_a_graph, mutates_args=())


@_operator.register_fake
def _shapes(
    step: Tensor,
    added: Tensor,
    scale: Tensor,
    start: Tensor,
    starts_at: Tensor | None,
    source: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(added), torch.empty_like(added)

"""Products of token-shifted inputs with thin matrices, several as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from src.ops.reference import rows_before


def shifted_products(
    x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None, pairs: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, ...]:
    """For each pair of a mix m [1, 1, C] and a matrix W [C, D]: token_shift(x, last, cu_seqlens, (m,)) @ W, [B, T, D].

        (x[t] + (x[t-1] - x[t]) m) W = x[t] ((1 - m) W) + x[t-1] (m W)

    Both terms of all pairs are columns of one product of x, of which those of x[t-1] are then moved down by a row. x is
    read once and no shifted input is written: of some 235 passes over x that a compiled block takes with its gradients,
    about 10 fewer at C = 768 (tests/bench/step_bytes.py counts), for twice the multiplications of thin products.
    """
    before = torch.cat([mix.view(-1, 1) * matrix for mix, matrix in pairs], 1)
    own = torch.cat([(1 - mix.view(-1, 1)) * matrix for mix, matrix in pairs], 1)
    of_own, of_before = (x @ torch.cat([own, before], 1)).chunk(2, -1)
    of_last = None if last is None else last @ before
    mixed = of_own + rows_before(of_before, of_last, cu_seqlens)
    return mixed.split([matrix.shape[1] for _, matrix in pairs], -1)

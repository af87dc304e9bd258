"""Fewer tokens for a medium: the mean over neighbouring positions."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def pool_grid(x: Tensor, rows: int, columns: int, tokens: int) -> Tensor:
    """x [M, rows * columns, D] of pictures -> [M, tokens, D]: adaptive average pooling to a square grid. 0: unchanged.

    As VisualRWKV pools its vision tower's features. `tokens` is a square number (`grid_side`).
    """
    if tokens in (0, rows * columns):
        return x
    side = math.isqrt(tokens)
    grid = x.transpose(1, 2).unflatten(2, (rows, columns))  # [M, D, rows, columns]
    return F.adaptive_avg_pool2d(grid, (side, side)).flatten(2).transpose(1, 2)


def pool_frames(x: Tensor, tokens: int) -> Tensor:
    """x [M, frames, D] of sounds -> [M, tokens, D]: adaptive average pooling along time. 0: unchanged."""
    if tokens in (0, x.shape[1]):
        return x
    return F.adaptive_avg_pool1d(x.transpose(1, 2), tokens).transpose(1, 2)

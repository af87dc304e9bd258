"""What encoders of ours share: over the tokens of a medium, fewer of them by the mean over neighbouring positions, and
what they have in common; the scale of initial weights."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

COMMON_SHARE = 0.9  # is taken away; the rest still tells a red picture from a blue one
# Of initial weights before a norm, which takes their scale away. A step of Adam changes each by the learning rate: with
# small ones and many inputs, a few steps would change everything.
WEIGHT_SCALE = 0.1


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


def less_common(x: Tensor) -> Tensor:
    """x [M, tokens, D] -> [M, tokens, D]: each channel less COMMON_SHARE of its mean over the tokens of its medium.

    A model that can't read its media yet treats them as noise, and makes all rows alike: each step of the optimizer
    moves all rows along the mean of the projector's input, and within a hundred steps nothing else is left of them.
    """
    return x - COMMON_SHARE * x.mean(1, keepdim=True)

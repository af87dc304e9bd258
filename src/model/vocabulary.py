"""Grows or shrinks the vocabulary of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from src.errors import UserError
from src.model.weights import Weights

ROWS = ("emb.weight", "head.weight")  # a row for each token


def resize_vocabulary(weights: Weights, vocab_size: int) -> Weights:
    """`weights` with `vocab_size` rows in emb.weight and head.weight: the first ones are kept, new ones are the mean of
    the old. Raises UserError when they have no such rows."""
    # The mean rather than noise: a new token's logit is then the mean of the others', and its embedding is one that
    # the first layer has learned to read, in length, too.
    return {**weights, **{name: _resized(weights, name, vocab_size) for name in ROWS}}


def _resized(weights: Weights, name: str, rows: int) -> Tensor:
    old = weights.get(name)
    if old is None or old.dim() != 2 or not len(old) or rows < 1:
        raise UserError(f"can't be resized to {rows} rows", given=name, expected="a matrix with a row for each token")
    if rows <= len(old):
        return old[:rows].clone()
    mean = old.mean(dim=0, keepdim=True, dtype=torch.float32).to(old.dtype)
    return torch.cat([old, mean.expand(rows - len(old), -1)])

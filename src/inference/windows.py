"""Windows of held-out data: independent stretches of tokens that overlap by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from src.errors import UserError

Tokens = npt.NDArray[Any]


def windows(n_tokens: int, ctx_len: int, max_windows: int | None = None, flag: str = "data") -> Iterator[slice]:
    """Windows of ctx_len + 1 tokens that overlap by one; with `max_windows`, so many of them, evenly spaced.

    A shorter remainder is left out, unless there are no more tokens than that. Raises UserError, about `flag`, for less
    than two tokens.
    """
    if n_tokens < 2:
        raise UserError(
            f"the data has {n_tokens} tokens", flag=flag, expected="at least 2: one to read and one to predict"
        )
    # The overlap of one token makes every token but the first a target exactly once.
    ctx_len = min(ctx_len, n_tokens - 1)
    count = (n_tokens - 1) // ctx_len
    # Evenly spaced rather than the first ones: a file may be sorted.
    selected = count if max_windows is None else min(count, max_windows)
    for i in range(selected):
        start = i * count // selected * ctx_len
        yield slice(start, start + ctx_len + 1)


def stack_windows(tokens: Tokens, selected: Iterable[slice], vocab_size: int) -> Tensor:
    """These windows of `tokens`, int64 [B, T + 1]. Raises UserError for ids outside the model's vocabulary."""
    # int64 before the comparison: an unsigned dtype of a file can't hold a negative id, a flat array can.
    batch = np.stack([tokens[window] for window in selected]).astype(np.int64)
    if batch.min() < 0 or batch.max() >= vocab_size:
        raise UserError(
            f"the data has token id {batch.min() if batch.min() < 0 else batch.max()}",
            flag="data",
            expected=f"ids below the model's vocabulary size of {vocab_size}",
            advice="use the tokenizer that the model was trained with",
        )
    return torch.from_numpy(batch)

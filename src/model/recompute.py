"""Gradient checkpointing (`--grad_cp 1`) that recomputes what is cheap: backward never runs the recurrence's forward again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from src.ops.recurrence import Remember

Result = TypeVar("Result")


def recomputed(function: Callable[..., Result], *args: Any) -> Result:
    """function(*args), of which only `args` and what wkv7's native op gave are kept; backward computes everything else again.

    What the op gave is its output, and the states and sums that its own gradients start from. Kernel "reference" has no such op: all is
    computed again. The function must draw no random numbers. Gradients have the bits of function's own.

    PyTorch's selective checkpointing says the same to the compiler. Without one it takes every op through Python, twice, which
    doubles the time that the host takes for a block; so there wkv7 remembers by itself.
    """
    contexts = _tags if torch.compiler.is_compiling() else _memories
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)  # type: ignore[no-any-return]


def _memories() -> tuple[Remember, Remember]:
    outputs: list[tuple[torch.Tensor, ...]] = []
    return Remember(outputs, again=False), Remember(outputs, again=True)


def _tags() -> Any:
    return create_selective_checkpoint_contexts(_policy)


_tags.cache_hash = "wkv7_forward is kept"  # type: ignore[attr-defined]  # what the compiler's cache knows it by between runs


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # by name: the native library that defines it need not be there
    keep = op.name() == "rwkv7::wkv7_forward"
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

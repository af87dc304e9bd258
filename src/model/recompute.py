"""Gradient checkpointing (`--grad_cp 1`) of everything but the recurrence, whose forward runs once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from src.ops.recurrence_op import OutputCache

Result = TypeVar("Result")


def recomputed(function: Callable[..., Result], *args: Any, random: bool = False) -> Result:
    """function(*args), keeping for backward only `args` and the outputs of wkv7's native op.

    Everything else is computed again. The op's outputs are y, the final state, and the states and sums that its own
    backward starts from. Kernel "reference" has no such op: nothing is kept. A function that draws random numbers needs
    `random`: it is then recomputed with the same ones. Gradients have the bits of function's own.

    Under torch.compile PyTorch's selective checkpointing does this. In eager mode it would take every op through a
    Python dispatch mode, twice, which doubles the host's time for a block; there an OutputCache records and replays
    the op's outputs.
    """
    contexts = _selective_contexts if torch.compiler.is_compiling() else _cache_contexts
    # Where none are drawn, saving the generators' states at every block would be for nothing.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=random, context_fn=contexts)  # type: ignore[no-any-return]


def _cache_contexts() -> tuple[OutputCache, OutputCache]:
    outputs: list[tuple[torch.Tensor, ...]] = []
    return OutputCache(outputs, replay=False), OutputCache(outputs, replay=True)


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


# The compiler's on-disk cache can't hash a Python function; this names the policy instead. Change it with the policy.
_selective_contexts.cache_hash = "wkv7_forward is kept"  # type: ignore[attr-defined]


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # by name: without the native library the op doesn't exist
    keep = op.name() == "rwkv7::wkv7_forward"
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

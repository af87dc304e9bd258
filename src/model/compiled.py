"""torch.compile for a model's blocks, which run uncompiled where that fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

RECOMPILATIONS_PER_BLOCK = 16


def compile_with_fallback(blocks: Sequence[nn.Module], **options: Any) -> None:
    """block.compile(**options) for each block; all but the first share their compiled code.

    The first failure to compile, of a forward or a backward graph, gives one warning, and all blocks run uncompiled
    from then on. Compiled code is kept on disk between runs by PyTorch (TORCHINDUCTOR_CACHE_DIR, by default under
    /tmp).
    """
    import torch._dynamo  # with the compiler this takes seconds: only where something is compiled
    import torch._functorch.config
    from torch._dynamo.exc import TorchDynamoException

    # Beyond its limit the compiler silently runs plain PyTorch. Kinds of call: rows or any number of documents, with
    # gradients or without, the first block or another; where ZeRO puts hooks on modules, each block.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILATIONS_PER_BLOCK * len(blocks))
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, config.recompile_limit)
    # The backward graph is compiled together with the forward one. By default it waits for the first backward pass,
    # where a failure could no longer fall back: the forward pass has been done, and autograd has the graph.
    if hasattr(torch._functorch.config, "force_non_lazy_backward_lowering"):
        torch._functorch.config.force_non_lazy_backward_lowering = True
    for block in blocks:
        block.compile(**options)
        assert block._compiled_call_impl is not None
        block._compiled_call_impl = _with_fallback(block, block._compiled_call_impl, blocks, TorchDynamoException)


def _with_fallback(
    block: nn.Module, compiled: Callable[..., Any], blocks: Sequence[nn.Module], failure: type[Exception]
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except failure as error:
            for other in blocks:
                other._compiled_call_impl = None  # nn.Module's own switch: None calls forward as it is
            reason = " ".join(str(error).split("\n", 2)[:2])  # "backend='inductor' raised:" and what; then pages follow
            warnings.warn(
                f"torch.compile failed ({reason}): the model runs uncompiled, which is slower; "
                "--compile 0 skips the attempt",
                stacklevel=2,
            )
        return block._call_impl(
            *args, **kwargs
        )  # an error in the call itself is raised again here, as without compilation

    return call

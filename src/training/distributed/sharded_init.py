"""Builds a model that no rank holds whole (ZeRO stage 3): parameter by parameter, each partitioned at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from src.config import ModelConfig
from src.model import Block
from src.model.init import initialise
from src.model.layers import LAYER_NORM_EPS
from src.training.distributed.zero import import_deepspeed

NamedTensors = Iterator[tuple[str, Tensor]]


@torch.no_grad()
def initial_values(config: ModelConfig) -> NamedTensors:
    """(name, tensor) of each parameter of `RWKV7(config)`: bit for bit its values from the same seed, with only one
    block in memory at a time."""

    def named(prefix: str, module: nn.Module) -> NamedTensors:
        yield from ((f"{prefix}.{name}", parameter.detach()) for name, parameter in module.named_parameters())

    # The random generator is read in the order of RWKV7.__init__: constructors of the other layers draw numbers too,
    # which `initialise` replaces after all blocks. Another order would give other weights from the same --random_seed.
    emb = nn.Embedding(config.vocab_size, config.n_embd)
    for layer in range(config.n_layer):
        yield from named(f"blocks.{layer}", Block(config, layer))
    ln_out = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
    head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
    for name, module in (("emb", emb), ("ln_out", ln_out), ("head", head)):
        initialise(module, config, prefix=f"{name}.")
        yield from named(name, module)


@torch.no_grad()
def partition(
    model: nn.Module, values: NamedTensors, settings: dict[str, Any], accelerator: str, dtype: torch.dtype
) -> None:
    """Give a model on the meta device its values, each parameter partitioned over the ranks before the next one is
    read.

    `values` yields every (name, tensor) on rank 0, in any order; those of other ranks are not used. No rank ever holds
    more than one whole parameter on its device. `settings` are DeepSpeed's; parameters get `dtype`.
    """
    deepspeed = import_deepspeed(accelerator)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("nccl" if accelerator == "gpu" else "gloo")
    device = torch.device("cuda", torch.cuda.current_device()) if accelerator == "gpu" else torch.device("cpu")
    remaining = dict(model.named_parameters())
    iterator = iter(values) if dist.get_rank() == 0 else None
    while remaining:
        name, tensor = next(iterator) if iterator is not None else ("", None)
        # only rank 0 reads the values, so only it knows which parameter comes next
        announced = [name]
        dist.broadcast_object_list(announced, src=0)
        name = announced[0]
        old = remaining.pop(name)
        whole = torch.empty(old.shape, dtype=dtype, device=device) if tensor is None else tensor.to(device, dtype)
        # deepspeed.zero.Init broadcasts rank 0's values and partitions them. It works on modules, so each parameter
        # gets one: on the whole model it would need all values at once.
        holder = nn.Module()
        holder.whole = nn.Parameter(whole, requires_grad=old.requires_grad)
        deepspeed.zero.Init(module=holder, config_dict_or_path=settings, dtype=dtype)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, holder.whole)


def gathered(parameter: nn.Parameter, modified_by: int | None = None) -> Any:
    """A context in which a partitioned parameter is whole on every rank. Changes are kept only with `modified_by`, the
    rank whose changes reach all."""
    import deepspeed  # imported already: a partitioned parameter comes from its engine

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=modified_by)

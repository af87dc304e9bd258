"""A model that no process holds whole (ZeRO stage 3): initial values drawn or read one by one, partitioned as they
come."""

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
    """(name, tensor) of each parameter of `RWKV7(config)`, the same numbers from the same seed, with one block in
    memory at a time.

    Random numbers are drawn in the order in which RWKV7 draws them; a test compares the two bit by bit.
    """

    def named(prefix: str, module: nn.Module) -> NamedTensors:
        yield from ((f"{prefix}.{name}", parameter.detach()) for name, parameter in module.named_parameters())

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
    """Give a model on the meta device its values, each parameter partitioned over the processes as soon as it is there.

    `values` yields every (name, tensor) on rank 0, in any order; those of other ranks are not used. No process ever
    holds more than one whole parameter on its device.
    """
    deepspeed = import_deepspeed(accelerator)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("nccl" if accelerator == "gpu" else "gloo")
    device = torch.device("cuda", torch.cuda.current_device()) if accelerator == "gpu" else torch.device("cpu")
    remaining = dict(model.named_parameters())
    iterator = iter(values) if dist.get_rank() == 0 else None
    while remaining:
        name, tensor = next(iterator) if iterator is not None else ("", None)
        announced = [name]  # only rank 0 knows which parameter comes next
        dist.broadcast_object_list(announced, src=0)
        name = announced[0]
        old = remaining.pop(name)
        whole = torch.empty(old.shape, dtype=dtype, device=device) if tensor is None else tensor.to(device, dtype)
        # deepspeed.zero.Init broadcasts rank 0's numbers and partitions; it works on modules, so each parameter gets
        # one
        holder = nn.Module()
        holder.whole = nn.Parameter(whole, requires_grad=old.requires_grad)
        deepspeed.zero.Init(module=holder, config_dict_or_path=settings, dtype=dtype)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, holder.whole)


def gathered(parameter: nn.Parameter, modified_by: int | None = None) -> Any:
    """A context in which a partitioned parameter is whole on every rank; with `modified_by`, that rank's changes reach
    all."""
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=modified_by)

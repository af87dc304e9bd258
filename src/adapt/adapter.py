"""Adapters in a model: added beside frozen weights, and read out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from src.adapt.config import AdapterConfig
from src.adapt.lora import MIXINS, Adapted, Dora, Pissa
from src.adapt.state_tuning import add_time_state
from src.config import ModelConfig
from src.model import RWKV7
from src.model.init import ParameterInfo, row_of
from src.model.weights import IDLE_IN_LAYER_0

# by entry of AdapterConfig.train: the parameters that are trained in full beside the adapter
WHOLE = {
    "ln": re.compile(r".*\bln(0|1|2|_x|_out)\.(weight|bias)"),
    "vectors": re.compile(r".*\.(x_[rwkvag]|[wav]0|k_k|k_a|r_k)"),
}


def add_adapter(model: RWKV7, config: AdapterConfig, draw: bool = True) -> None:
    """Freeze `model`, but for what `config.train` names, and add the adapter: fp32, on the devices of the weights.

    Without `draw` its numbers are left open, for a caller who loads them; on the meta device in any case. The adapted
    model begins as the base: its outputs are the same. Names: `blocks.N.att.key.lora_A` [r, in], `.lora_B` [out, r],
    `.lora_magnitude` [out] (DoRA), `.miss_block` [r, out]; `blocks.N.att.time_state` [H, N value, N key].
    """
    for name, parameter in model.named_parameters():
        is_trained = any(WHOLE[part].fullmatch(name) for part in config.train) and name not in IDLE_IN_LAYER_0
        parameter.requires_grad_(is_trained)
    model.frozen_base = frozenset(name for name, p in model.named_parameters() if not p.requires_grad)
    if config.kind == "state":
        add_time_state(model)
        return
    for name, module in target_modules(model, config):
        _adapt(module, config)
        if next(module.parameters()).is_meta:
            continue
        if isinstance(module, Dora):  # with `draw` or without: no file and no state has it
            module.measure(module.weight)  # type: ignore[arg-type]
        if draw:
            _set_values(model, module, name)
    if config.lora_dropout:
        for block in model.blocks:
            block.draws_random_numbers = True  # type: ignore[assignment]


def target_modules(model: RWKV7, config: AdapterConfig) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of each matrix that the adapter changes."""
    for i, block in enumerate(model.blocks):
        for target in config.targets:
            yield f"blocks.{i}.{target}", block.get_submodule(target)


def _adapt(module: nn.Module, config: AdapterConfig) -> None:
    mixin, base = MIXINS[config.kind], type(module)
    module.__class__ = type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})
    assert isinstance(module, Adapted)
    module.adapt(config)


def _set_values(model: RWKV7, module: nn.Module, prefix: str) -> None:
    """The initial values of a module's adapter, by the rows of the init table and from the base's matrix."""
    for name, parameter in module.named_parameters():
        full_name = f"{prefix}.{name}"
        if full_name in model.frozen_base:
            continue
        info = ParameterInfo(model.config, 0, parameter.shape)
        value = row_of(full_name).value(info)
        with torch.no_grad():
            parameter.copy_(value) if isinstance(value, Tensor) else parameter.fill_(value)
    if isinstance(module, Pissa):
        module.decompose(module.weight)  # type: ignore[arg-type]
    if isinstance(module, Dora):
        with torch.no_grad():
            module.lora_magnitude.copy_(module.squared_norms.sqrt())


def adapter_tensors(model: RWKV7) -> dict[str, Tensor]:
    """What an adapted model has beside its frozen base, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if name not in model.frozen_base}


def adapter_parameter_count(sizes: ModelConfig, config: AdapterConfig) -> int:
    """The number of parameters that an adapter adds to or trains in a model of these sizes."""
    with torch.device("meta"):
        model = RWKV7(sizes)
        add_adapter(model, config)
    return sum(tensor.numel() for tensor in adapter_tensors(model).values())


def portable(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The same change of the base in a form that others read: PiSSA becomes LoRA of rank 2 r, with s = 1.

    B A - B0 A0 = [B, -B0] [A; A0].
    """
    if config.kind != "pissa":
        return config, dict(tensors)
    joined = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_A"):
            joined[name] = torch.cat([tensor, tensors[f"{name}_init"]])
        elif name.endswith(".lora_B"):
            joined[name] = torch.cat([tensor, -tensors[f"{name}_init"]], dim=1)
        elif not name.endswith("_init"):
            joined[name] = tensor
    return replace(config, kind="lora", r=2 * config.r, lora_alpha=2.0 * config.r, use_rslora=False), joined

"""An adapter without trivial numbers, for any model."""

import torch

from src.adapt.adapter_files import Adapter
from src.adapt.base_hash import base_sha256


def random_adapter(model, config, seed=1, whole=()):
    """An adapter of `config` whose tensors are all random."""
    numbers = torch.Generator().manual_seed(seed)
    weights = model.state_dict()
    tensors = {}
    for layer in range(model.config.n_layer):
        for target in config.target_modules:
            stem, (out, width) = f"blocks.{layer}.{target}", weights[f"blocks.{layer}.{target}.weight"].shape
            shapes = {"lora_A": (config.r, width), "lora_B": (out, config.r)}
            if config.kind == "dora":
                shapes["lora_magnitude"] = (out,)
            if config.kind == "miss":
                shapes = {"miss_block": (config.r, out)}
            for part, shape in shapes.items():
                tensors[f"{stem}.{part}"] = 0.1 * torch.randn(shape, generator=numbers) + (part == "lora_magnitude")
        if config.kind == "state":
            heads = weights[f"blocks.{layer}.att.r_k"].shape
            tensors[f"blocks.{layer}.att.time_state"] = torch.randn(*heads, heads[1], generator=numbers)
    for name in whole:
        tensors[name] = weights[name] + 0.1 * torch.randn(weights[name].shape, generator=numbers)
    return Adapter(config, tensors, base_sha256(weights), "base.pth")

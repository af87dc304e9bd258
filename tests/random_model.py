"""A model without trivial parameters: those that are initialised to zero would hide mistakes."""

import torch

from src.model import RWKV7, ModelConfig


def random_model(seed: int = 0, **sizes: int) -> RWKV7:
    """An fp32 model on the CPU, without gradients; each parameter is its initial value plus noise."""
    config = ModelConfig(**({"n_layer": 3, "n_embd": 128, "vocab_size": 97} | sizes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = RWKV7(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(
                torch.randn_like(parameter)
                * (0.3 if parameter.squeeze().dim() < 2 else 0.5 * parameter.shape[-1] ** -0.5)
            )
    return model

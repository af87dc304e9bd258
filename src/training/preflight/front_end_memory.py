"""What an encoder and a projector add to the memory of a run: their weights, and of what is trained gradients and
optimizer. What they keep for backward isn't counted: of a frozen encoder that is nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch

from src.config import RunConfig, adapter_kind, trained_parts
from src.multimodal.config import media_of
from src.multimodal.hf_encoder import HfEncoder
from src.multimodal.projector import PROJECTORS


class FrontEndSize(NamedTuple):
    """Numbers of parameters."""

    trained: int
    frozen: int


def front_end_size(config: RunConfig, n_embd: int) -> FrontEndSize:
    """Of the encoder and the projector of a run; zeros where it has none. Raises UserError when the encoder can't be
    read."""
    media = media_of(config)
    if media is None:
        return FrontEndSize(0, 0)
    spec = media.spec
    with torch.device("meta"):
        encoder = spec.skeleton() if isinstance(spec, HfEncoder) else spec.build()
        parts = {"encoder": encoder, "projector": PROJECTORS[media.projector](spec.width, n_embd)}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    trained = sum(count for name, count in counts.items() if name in trained_parts(config))
    return FrontEndSize(trained, sum(counts.values()) - trained)


def front_end_bytes(config: RunConfig, n_embd: int, dtype_bytes: int) -> tuple[float, float, float]:
    """Weights, gradients and optimizer. ZeRO's share of the optimizer is left out: the whole is little beside a
    model."""
    size = front_end_size(config, n_embd)
    # beside an adapter what is trained is fp32; elsewhere it has fp32 masters, as the model
    trained_bytes = 4 if adapter_kind(config) else dtype_bytes
    optimizer = (12 if trained_bytes < 4 else 8) * size.trained
    return trained_bytes * size.trained + dtype_bytes * size.frozen, trained_bytes * size.trained, optimizer

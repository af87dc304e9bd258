"""A hash of the weights that an adapter was trained beside: it tells one base from another."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from src.model.weights import IDLE_IN_LAYER_0, Weights


def base_sha256(weights: Weights) -> str:
    """A hash of a model's weights: the same in every format and in every dtype that holds the numbers exactly."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        # not in every format, and no result depends on them; the initial state is no part of what an adapter changes
        if name in IDLE_IN_LAYER_0 or name.endswith("att.time_state"):
            continue
        digest.update(name.encode())
        for piece in weights[name].detach().flatten().split(1 << 22):  # pieces bound the memory of the copies
            digest.update(b"".join(_halves(piece.cpu())))
    return digest.hexdigest()


def _halves(numbers: Tensor) -> list[bytes]:
    """The upper 16 bits of each number in fp32, which are its bf16, and the lower ones unless all are 0."""
    # So that bf16, in which models are released, is hashed as it is: fp32 has twice the bytes.
    if numbers.dtype == torch.bfloat16:
        return [numbers.contiguous().view(torch.int16).numpy().tobytes()]
    bits = numbers.float().contiguous().view(torch.int32)
    upper, lower = (bits >> 16).to(torch.int16), (bits & 0xFFFF).to(torch.int16)
    return [half.numpy().tobytes() for half in (upper, *([lower] if bool(lower.any()) else []))]

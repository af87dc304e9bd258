"""State tuning: the recurrence's initial state is trained, one per block, and nothing else.

    S_0 = time_state [H, N value, N key] for every sequence, and for every document of a packed row

The gradient of time_state is the sum of those of S_0 over the sequences. Token-shift states begin at zero as ever.
"""

from __future__ import annotations

import torch
from torch import nn

from src.model import RWKV7, TimeMix


def add_time_state(model: RWKV7) -> None:
    """Give each block a tuned initial state of zeros, fp32: the model computes what it did before."""
    for block in model.blocks:
        att = block.att
        assert isinstance(att, TimeMix)
        att.time_state = nn.Parameter(torch.zeros(att.n_head, att.head_size, att.head_size, device=att.r_k.device))

"""What RWKV-7 remembers between two calls: constant in size, whatever the length of the text before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from src.config import ModelConfig


class LayerState(NamedTuple):
    """One block's memory for B sequences (or D packed documents)."""

    att_shift: Tensor  # [B, C]: the last input of the time mix
    wkv: Tensor  # [B, H, N, N] fp32: value index, then key index
    ffn_shift: Tensor  # [B, C]: the last input of the channel mix


@dataclass
class State:
    """The memory of a whole model: one `LayerState` a block. Gradients pass through it unless it is detached."""

    layers: list[LayerState]

    @classmethod
    def zeros(
        cls, config: ModelConfig, batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """The state before any token; `dtype` is that of the activations (the recurrence keeps fp32)."""
        n = config.head_size
        return cls(
            [
                LayerState(
                    torch.zeros(batch, config.n_embd, device=device, dtype=dtype),
                    torch.zeros(batch, config.n_head, n, n, device=device, dtype=torch.float32),
                    torch.zeros(batch, config.n_embd, device=device, dtype=dtype),
                )
                for _ in range(config.n_layer)
            ]
        )

    def detach(self) -> State:
        return State([LayerState(*(t.detach() for t in layer)) for layer in self.layers])

    def clone(self) -> State:
        return State([LayerState(*(t.clone() for t in layer)) for layer in self.layers])

    def select(self, rows: Tensor) -> State:
        """The states of some of the sequences: `rows` int64, in any order, repeats allowed."""
        return State([LayerState(*(t.index_select(0, rows) for t in layer)) for layer in self.layers])

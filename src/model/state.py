"""The recurrent state of RWKV-7: what one call passes to the next, of constant size for a text of any length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from src.config import ModelConfig
from src.errors import UserError


def refuse_attention(config: ModelConfig) -> None:
    """Raises UserError for a model with blocks of attention."""
    if "attention" in config.blocks:
        raise UserError(
            "blocks of attention have no state of constant size",
            expected="a model of RWKV blocks alone",
            advice="call the model itself, first without a state (docs/layers.md)",
        )


class LayerState(NamedTuple):
    """The state of one block for B sequences (or D packed documents)."""

    att_shift: Tensor  # [B, C]: the last token's input of the time mix
    # [B, H, N, N], value index, then key index; always fp32: rounding errors would add up over the sequence. Of a block
    # of attention: keys and values [B, H, T, 2 N] of all T tokens so far, in the dtype of its inputs.
    wkv: Tensor
    ffn_shift: Tensor  # [B, C]: the last token's input of the channel mix


@dataclass
class State:
    """The state of a whole model: one `LayerState` per block. Gradients flow through it unless it is detached."""

    layers: list[LayerState]

    @classmethod
    def zeros(
        cls, config: ModelConfig, batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """The state before the first token. `dtype` is that of the activations; `wkv` is fp32 in any case.

        Raises UserError for a model with blocks of attention, which has no state of constant size.
        """
        refuse_attention(config)
        # A model called without a state computes the same; a decoder needs these, to overwrite them.
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

    def tensors(self) -> list[Tensor]:
        """All tensors, layer by layer, in the order of `LayerState`."""
        return [tensor for layer in self.layers for tensor in layer]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> State:
        """The state whose `tensors()` these are."""
        return cls([LayerState(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)])

    def last(self) -> State:
        """The state of the last sequence or document: tensors [1, ...]."""
        return State([LayerState(*(t[-1:].clone() for t in layer)) for layer in self.layers])

    def followed_by(self, other: State) -> State:
        """The states of these sequences and, after them, of those of `other`."""
        pairs = zip(self.layers, other.layers, strict=True)
        return State([LayerState(*(torch.cat(both) for both in zip(*pair, strict=True))) for pair in pairs])

    def detach(self) -> State:
        """The same tensors, cut off from the graph that computed them."""
        return State([LayerState(*(t.detach() for t in layer)) for layer in self.layers])

    def clone(self) -> State:
        """A copy whose tensors share no memory with this one's."""
        return State([LayerState(*(t.clone() for t in layer)) for layer in self.layers])

    def select(self, rows: Tensor) -> State:
        """The states of the sequences `rows` (int64 [K], in any order, repeats allowed): tensors [K, ...]."""
        return State([LayerState(*(t.index_select(0, rows) for t in layer)) for layer in self.layers])

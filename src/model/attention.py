"""Causal attention in the place of a time mix: what a block of the kind "attention" has as its `att`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.config import ModelConfig
from src.model.init import initialise


class Attention(nn.Module):
    """output(softmax(q k^T / sqrt(N)) v) of each head over a token and those before it, called as a TimeMix is.

    Without positions: the time mixes of earlier blocks have mixed neighbours. Its state is in `wkv`, [B, H, T, 2 N]:
    the keys and values of all T tokens so far.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.n_head, self.head_size = config.n_head, config.head_size
        self.query = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.key = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.value = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.output = nn.Linear(config.n_embd, config.n_embd, bias=False)
        initialise(self, config, layer, prefix="att.")

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None = None,
        shift: Tensor | None = None,
        wkv: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """x [B, T, C] -> out [B, T, C], v_first as it was given, a shift [B, 0] and the new wkv.

        Raises ValueError with `cu_seqlens`: the states of documents would be of different lengths.
        """
        if cu_seqlens is not None:
            raise ValueError("a block of attention takes rows of one sequence each, not cu_seqlens")
        B, T, _ = x.shape
        heads = (B, T, self.n_head, self.head_size)
        q, k, v = (linear(x).view(heads).transpose(1, 2) for linear in (self.query, self.key, self.value))
        mask = None
        if wkv is not None:
            earlier = wkv.split(self.head_size, dim=3)
            k, v = (torch.cat(pair, 2) for pair in zip(earlier, (k, v), strict=True))
            mask = torch.ones(T, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - T)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        out = self.output(y.transpose(1, 2).reshape(x.shape))
        return out, v_first, x.new_empty(B, 0), torch.cat([k, v], 3)

"""RWKV-7: what is unusual about it, and the whole model.

- No attention and no positions: each block carries a matrix state per head, so a token costs the same however long the text is.
- The same call trains on whole sequences, continues from a state and decodes one token.
- The embedding is normalised once (ln0); layer 0's values are mixed into the values of every later layer.
- Embedding and head are separate matrices; no bias in any large matrix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.config import ModelConfig
from src.model.compiled import compile_with_fallback
from src.model.init import initialise
from src.model.layers import LAYER_NORM_EPS, Block
from src.model.state import State
from src.model.weights import Weights, config_from_weights, fit_weights, read_weights


class RWKV7(nn.Module):
    """logits [B, T, V], state = RWKV7(config)(tokens int64 [B, T], state=None, cu_seqlens=None).

    `state` continues where an earlier call ended (None: from nothing). With `cu_seqlens` (int32 [D+1], first 0, last T) the row
    (B = 1) holds D documents that don't see each other; the state is then one per document.
    Parameter names and shapes are a public interface.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name in ("emb", "ln_out", "head"):  # the blocks' parts have done theirs
            initialise(getattr(self, name), config, prefix=f"{name}.")

    def hidden(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The last layer's normalised output [B, T, C], before the head, and the new state."""
        x = self.emb(tokens)
        v_first, layers = None, []
        for i, block in enumerate(self.blocks):
            before = state.layers[i] if state is not None else None
            x, v_first, after = block(x, v_first, before, cu_seqlens)
            layers.append(after)
        return self.ln_out(x), State(layers)

    def forward(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.hidden(tokens, state, cu_seqlens)
        return self.head(x), state

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile for the blocks, with its `options`. A failure to compile gives one warning, and the blocks run uncompiled."""
        compile_with_fallback(list(self.blocks), **options)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        kernel: str = "auto",
    ) -> RWKV7:
        """The model in a weights file (.pth or .safetensors), its sizes read from the tensors.

        `dtype` None keeps that of the file. Raises ValueError when the file can't be read or holds no RWKV-7 weights.
        """
        return cls.from_weights(read_weights(path), str(path), dtype, device, kernel)

    @classmethod
    def from_weights(
        cls,
        weights: Weights,
        source: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        kernel: str = "auto",
    ) -> RWKV7:
        """The model that a state dict describes; `source` names it in errors. ValueError when it is no RWKV-7 model's."""
        config = config_from_weights(weights, source, kernel=kernel)
        with torch.device("meta"):
            model = cls(config)
        fitted = fit_weights(weights, model, source)
        model.load_state_dict({n: t.to(device=device, dtype=dtype or t.dtype) for n, t in fitted.items()}, assign=True)
        return model

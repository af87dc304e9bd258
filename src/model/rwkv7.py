"""The RWKV-7 model. What is unusual about the architecture:

- No attention and no positional encoding: each block has a matrix-valued state per head, so the cost of a token doesn't
  depend on how many precede it.
- The same call trains on whole sequences, continues from a state and decodes a single token.
- The embedding is normalised once (ln0), and layer 0's values are interpolated into the values of every later layer.
- Embedding and head are separate matrices; no large matrix has a bias.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.config import PLACEHOLDER, ModelConfig
from src.errors import UserError
from src.model.compiled import compile_with_fallback
from src.model.init import initialise
from src.model.layers import Block, LayerNorm, Linear, SequenceContext, TimeMix
from src.model.state import LayerState, State, refuse_attention
from src.model.weights import Weights, config_from_weights, fit_weights, read_weights, split_states


class Embedding(nn.Embedding):
    """nn.Embedding, without PyTorch's default initialisation on the meta device."""

    def reset_parameters(self) -> None:
        # normal_ on a meta tensor imports torch._dynamo: a second of every program that loads a model. On a real device
        # it is called, although `initialise` overwrites its values: it advances the random number generator.
        if not self.weight.is_meta:
            super().reset_parameters()


class RWKV7(nn.Module):
    """logits [B, T, V], state = RWKV7(config)(tokens int64 [B, T], state=None, cu_seqlens=None, embeds=None).

    `state` continues from the end of an earlier call (None: zeros). With `cu_seqlens` (int32 [D+1], first 0, last T)
    the row (B = 1) holds D independent documents, and the state has one entry per document. `embeds` [K, C] takes the
    places of the K tokens that are PLACEHOLDER, row by row, as if the embedding had these rows for them.
    """

    # Parameter names and shapes are a public interface: official weights are read, and other programs read ours.
    media: nn.Module | None  # what turns pictures or sounds into `embeds` (src/multimodal)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # names of the parameters that an adapter leaves as they are in the base's file (src/adapt); none without one
        self.frozen_base: frozenset[str] = frozenset()
        self.register_module("media", None)
        self.emb = Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_out = LayerNorm(config.n_embd, config.kernel)
        self.head = Linear(config.n_embd, config.vocab_size, config.kernel)
        for name in ("emb", "ln_out", "head"):  # TimeMix and ChannelMix have initialised their own parameters
            initialise(getattr(self, name), config, prefix=f"{name}.")

    def hidden(
        self,
        tokens: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        embeds: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """The final hidden vectors ln_out(x), [B, T, C], and the new state: `forward` without the head."""
        x = self.emb(tokens) if embeds is None else self._embed_with(tokens, embeds)  # [B, T] -> [B, T, C]
        v_first, layers = None, []  # block 0 sets v_first, the others use it
        for i, block in enumerate(self.blocks):
            layer_state = state.layers[i] if state is not None else None
            x, v_first, new_layer_state = block(x, v_first, layer_state, cu_seqlens)
            layers.append(new_layer_state)
        return self.ln_out(x), State(layers)

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        embeds: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        x, state = self.hidden(tokens, state, cu_seqlens, embeds)
        return self.head(x), state  # [B, T, C] -> [B, T, V]

    def _embed_with(self, tokens: Tensor, embeds: Tensor) -> Tensor:
        """The embeddings of `tokens` [B, T, C], with the rows of `embeds` [K, C] in the places of PLACEHOLDER."""
        places = tokens == PLACEHOLDER
        if tokens.device.type == "cpu":  # on a GPU, counting would wait for the device
            assert int(places.sum()) == len(embeds), f"{len(embeds)} rows of embeddings for {int(places.sum())} places"
        x = self.emb(tokens.masked_fill(places, 0))
        return x.masked_scatter(places.unsqueeze(-1), embeds.to(x.dtype))

    def initial_state(self, sequences: int) -> State:
        """What a call without a state begins from, as a state: token shifts of zeros, tuned initial states or zeros.

        Raises UserError for a model with blocks of attention, which has no state of constant size.
        """
        refuse_attention(self.config)
        layers = []
        for block in self.blocks:
            att = block.get_submodule("att")
            assert isinstance(att, TimeMix)
            shift = self.emb.weight.new_zeros(sequences, self.config.n_embd)
            layers.append(LayerState(shift, att.initial_wkv(sequences, shift.dtype), shift.clone()))
        return State(layers)

    def set_context(self, context: SequenceContext | None) -> None:
        """From now on compute parts of sequences, of which `context` knows the others; None: whole ones."""
        for block in self.blocks:
            block.att.context = block.ffn.context = context  # type: ignore[union-attr,assignment]

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile for the blocks, with its `options`. A failure to compile gives one warning, and the blocks run
        uncompiled."""
        compile_with_fallback(list(self.blocks), **options)

    def set_initial_states(self, states: Weights, source: str = "the state") -> None:
        """Begin from `states` (blocks.N.att.time_state [H, N value, N key]) instead of zeros; {}: from zeros.

        Raises UserError unless there is one for each block, of its shape, and for a model with blocks of attention.
        """
        refuse_attention(self.config)
        for i, block in enumerate(self.blocks):
            att, name = block.get_submodule("att"), f"blocks.{i}.att.time_state"
            assert isinstance(att, TimeMix)
            if not states:
                att.time_state = None
                continue
            expected = [att.n_head, att.head_size, att.head_size]
            given = list(states[name].shape) if name in states else None
            if given != expected:
                problem = f"{name} is {given}" if given else f"{name} is missing"
                raise UserError(problem, given=source, expected=f"{expected} for each of {len(self.blocks)} blocks")
            att.time_state = nn.Parameter(states[name].to(att.r_k.device, torch.float32), requires_grad=False)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        kernel: str = "auto",
    ) -> RWKV7:
        """The model in a weights file (.pth or .safetensors); its sizes are read from the tensors.

        `dtype` None keeps that of the file. Raises UserError when the file can't be read or doesn't contain RWKV-7
        weights.
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
        """The model of a state dict, with tuned initial states if it has some (blocks.N.att.time_state beside the
        weights, fp32 in any case); `source` names it in errors. Raises UserError when it isn't an RWKV-7 model's."""
        weights, states = split_states(weights)
        config = config_from_weights(weights, source, kernel=kernel)
        # On the meta device nothing is allocated or drawn; the file's tensors become the parameters (assign).
        with torch.device("meta"):
            model = cls(config)
        fitted = fit_weights(weights, model, source)
        model.load_state_dict({n: t.to(device=device, dtype=dtype or t.dtype) for n, t in fitted.items()}, assign=True)
        model.set_initial_states(states, source)
        return model

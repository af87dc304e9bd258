"""Recurrent decoding: prompts as whole sequences by the training kernel, then one token per step in constant memory.

A step is bound by memory bandwidth: it reads every weight once and computes little. On a CPU it is one native call
(ops/decode.py), on a GPU one captured CUDA graph (step.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from src.config import PLACEHOLDER, PLAIN_KERNELS
from src.errors import UserError
from src.inference.step import CudaGraphStep, TorchStep, overwrite
from src.model import RWKV7, LayerState, State
from src.ops.decode import MOST_SEQUENCES, DecodeWeights, can_decode, decode_step

# Steps after which packing the weights pays: for L12-D768 on two cores it takes 0.3 s and saves 2 ms per token.
PACK_TOKENS = 200
# Tokens of all sequences together that are prefilled at once: bounds the memory of activations without a loss of speed.
PREFILL_TOKENS = 1024


def initial_state(model: RWKV7, batch: int) -> State:
    """What a call without a state begins from: zeros, and the tuned initial states where the model has some."""
    weight = model.emb.weight
    state = State.zeros(model.config, batch, weight.device, weight.dtype)
    for layer, block in zip(state.layers, model.blocks, strict=True):
        time_state = block.get_submodule("att").time_state
        if isinstance(time_state, Tensor):
            layer.wkv.copy_(time_state.detach())
    return state


class Decoder:
    """B sequences with their states: logits [B, V] = prefill(prompts), then logits = step(tokens) repeatedly.

    No gradients. Steps read copies of some of the weights (see DecodeWeights): after the model's weights have changed,
    create a new Decoder.
    """

    def __init__(self, model: RWKV7, batch: int = 1, pack: bool = True) -> None:
        """`pack`: compress the weights while there is one sequence, which pays after about PACK_TOKENS steps."""
        self.model, self.config, self.pack = model, model.config, pack
        weight = model.emb.weight
        self.device, self.dtype = weight.device, weight.dtype
        self._allocate(initial_state(model, batch))

    def _allocate(self, state: State) -> None:
        """Copy `state` to memory that steps overwrite, and set the batch size to its."""
        att_shift, wkv, ffn_shift = (torch.stack(kind) for kind in zip(*state.layers, strict=True))
        self._stacked = att_shift, wkv, ffn_shift  # [L, B, ...]: the native step takes all layers in one tensor
        # Views of these, layer by layer, for the other kinds of steps.
        self._state = State([LayerState(*layer) for layer in zip(att_shift, wkv, ffn_shift, strict=True)])
        self.batch = wkv.shape[1]
        self._graph: CudaGraphStep | None = None  # captured for these addresses and this batch size

    # ---- the state -------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """A copy of the sequences' states. Assign it (or that of a Decoder of equal batch size) to continue from it."""
        return self._state.clone()

    @state.setter
    def state(self, state: State) -> None:
        overwrite(self._state, state)

    def reset(self) -> None:
        """Set all states to the initial one: the next prompt starts new texts."""
        overwrite(self._state, initial_state(self.model, self.batch))

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with the sequences `rows` only, in this order; a row that is repeated is copied."""
        if self.batch == 1 and len(rows) > 1:
            # Packed weights are slow for several sequences: the next step lays them out again.
            self.__dict__.pop("native_weights", None)
        self._allocate(self._state.select(torch.tensor(rows, device=self.device)))

    # ---- prompts ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], embeds: Sequence[Tensor | None] | None = None) -> Tensor:
        """Process a prompt for each sequence, continuing from its state; logits fp32 [B, V] after the last tokens.

        Prompts may differ in length: they are packed into one row. `embeds`: for each prompt the rows [K, C] in the
        places of its tokens PLACEHOLDER, None where it has none. Raises UserError for an empty prompt or an id outside
        the vocabulary.
        """
        rows_of: list[Tensor | None] = list(embeds) if embeds is not None else [None] * len(prompts)
        assert len(prompts) == self.batch, f"{len(prompts)} prompts for {self.batch} sequences"
        for row, prompt in enumerate(prompts):
            text = prompt if rows_of[row] is None else [token for token in prompt if token != PLACEHOLDER] or [0]
            check_tokens(text, self.config.vocab_size, f"prompt {row}" if self.batch > 1 else "the prompt")
        length = max(1, PREFILL_TOKENS // self.batch)
        last = torch.empty(self.batch, self.config.n_embd, device=self.device, dtype=self.dtype)
        for start in range(0, max(map(len, prompts)), length):
            chunks = {row: prompt[start : start + length] for row, prompt in enumerate(prompts) if len(prompt) > start}
            rows = []
            for row, chunk in chunks.items():
                if (media := rows_of[row]) is not None:
                    count = chunk.count(PLACEHOLDER)
                    rows.append(media[:count])
                    rows_of[row] = media[count:]
            last[list(chunks)] = self._advance(chunks, torch.cat(rows) if rows else None)
        return self.model.head(last).float()  # the head for last tokens only: [B, C] -> [B, V]

    def _advance(self, chunks: dict[int, Sequence[int]], embeds: Tensor | None) -> Tensor:
        """Process tokens of some of the sequences, by row; their last hidden vectors [len(chunks), C]."""
        rows = torch.tensor(list(chunks), device=self.device)
        packed = torch.tensor([[token for chunk in chunks.values() for token in chunk]], device=self.device)
        bounds = torch.tensor([0, *map(len, chunks.values())]).cumsum(0).to(self.device)
        cu_seqlens = bounds.int() if len(chunks) > 1 else None  # a single sequence needs no bounds
        hidden, state = self.model.hidden(packed, self._state.select(rows), cu_seqlens, embeds)
        for layer, new_layer in zip(self._state.layers, state.layers, strict=True):
            for tensor, values in zip(layer, new_layer, strict=True):
                tensor[rows] = values
        return hidden[0, bounds[1:] - 1]

    # ---- one token -------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Process one token for each sequence; logits fp32 [B, V]. On a GPU the next step overwrites them.

        Raises UserError for an id outside the vocabulary.
        """
        assert len(tokens) == self.batch, f"{len(tokens)} tokens for {self.batch} sequences"
        check_tokens(tokens, self.config.vocab_size, "the step's input")
        if self.batch <= MOST_SEQUENCES and self.native:
            return decode_step(torch.tensor(tokens), self.native_weights, *self._stacked)
        if self.device.type != "cuda":
            return self.torch_step(torch.tensor(tokens, device=self.device), self._state)
        if self._graph is None:  # captured at the first step and not before: a decoder may only prefill
            self._graph = CudaGraphStep(self.torch_step, self._state)
        return self._graph(tokens)

    @cached_property
    def native(self) -> bool:
        """Whether steps of up to MOST_SEQUENCES sequences are native calls."""
        config = self.config
        # These ask for plain PyTorch everywhere.
        return config.kernel not in PLAIN_KERNELS and can_decode(
            self.device, self.dtype, config.head_size, config.dim_ffn
        )

    @cached_property
    def torch_step(self) -> TorchStep:
        return TorchStep(self.model)

    @cached_property
    def native_weights(self) -> DecodeWeights:
        """The weights in the layout of the native step, packed if the batch size is 1 when they are first used."""
        model = self.model
        blocks = [dict(block.named_parameters()) for block in model.blocks]
        ends = (blocks[0]["ln0.weight"], blocks[0]["ln0.bias"], model.ln_out.weight, model.ln_out.bias)
        return DecodeWeights.of(model.emb.weight, model.head.weight, ends, blocks, pack=self.pack and self.batch == 1)


def check_tokens(tokens: Sequence[int], vocab_size: int, what: str) -> None:
    """Raises UserError, about `what`, when `tokens` is empty or has an id outside the vocabulary."""
    if not len(tokens):
        raise UserError(f"{what} is empty", expected="at least one token (0, the end of a document, starts a new text)")
    lowest, highest = min(tokens), max(tokens)
    if lowest < 0 or highest >= vocab_size:
        raise UserError(
            f"{what} has token id {lowest if lowest < 0 else highest}",
            expected=f"ids below the model's vocabulary size of {vocab_size}",
            advice="use the tokenizer that the model was trained with",
        )

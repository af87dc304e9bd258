"""Recurrent decoding: prompts as whole sequences through the training kernel, then one token a step in constant memory.

A step reads every weight once and does hardly anything else, so its speed is that of memory. On a CPU it is one native call, on a GPU one
captured CUDA graph (step.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from src.errors import UserError
from src.inference.step import CudaGraphStep, TorchStep, overwrite
from src.model import RWKV7, LayerState, State
from src.ops.decode import MOST_SEQUENCES, DecodeWeights, can_decode, decode_step

PACK_TOKENS = 200  # L12-D768 on two cores: 0.3 s of packing, 2 ms less for every token
PREFILL_TOKENS = 1024  # of all sequences together that a prompt is read by: bounds memory, loses no speed


class Decoder:
    """B sequences and where they are: logits [B, V] = prefill(prompts), then step(tokens) after step(tokens).

    Steps read the model's own weights, apart from those that are laid out anew (see DecodeWeights): after a change of the model's weights
    make a new Decoder. No gradients.
    """

    def __init__(self, model: RWKV7, batch: int = 1, pack: bool = True) -> None:
        """`pack`: read packed weights while there is one sequence. Packing pays after about PACK_TOKENS steps."""
        self.model, self.config, self.pack = model, model.config, pack
        weight = model.emb.weight
        self.device, self.dtype = weight.device, weight.dtype
        self._place(State.zeros(model.config, batch, self.device, self.dtype))

    def _place(self, state: State) -> None:
        """Copy `state` to memory that steps overwrite, and with it take the number of sequences."""
        att_shift, wkv, ffn_shift = (torch.stack(kind) for kind in zip(*state.layers, strict=True))
        self._stacked = att_shift, wkv, ffn_shift  # all layers together, as the native step wants them
        self._state = State([LayerState(*layer) for layer in zip(att_shift, wkv, ffn_shift, strict=True)])
        self.batch = wkv.shape[1]
        self._graph: CudaGraphStep | None = None

    # ---- the state ----------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """A copy of where the sequences are; assign it to go back there (of another Decoder with as many sequences, too)."""
        return self._state.clone()

    @state.setter
    def state(self, state: State) -> None:
        overwrite(self._state, state)

    def reset(self) -> None:
        """Forget everything."""
        for layer in self._state.layers:
            for kept in layer:
                kept.zero_()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these of the sequences only (or with copies of them), in this order."""
        if self.batch == 1 and len(rows) > 1:
            self.__dict__.pop("native_weights", None)  # packed, which is slow for several
        self._place(self._state.select(torch.tensor(rows, device=self.device)))

    # ---- prompts ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read a prompt of its own length into each sequence; logits fp32 [B, V] after the last token of each.

        The prompts are packed into one row and read from where the sequences are. ValueError for an empty prompt or an id outside the
        vocabulary.
        """
        assert len(prompts) == self.batch, f"{len(prompts)} prompts for {self.batch} sequences"
        for row, prompt in enumerate(prompts):
            check_tokens(prompt, self.config.vocab_size, f"prompt {row}" if self.batch > 1 else "the prompt")
        at_once = max(1, PREFILL_TOKENS // self.batch)
        last = torch.empty(self.batch, self.config.n_embd, device=self.device, dtype=self.dtype)
        for start in range(0, max(map(len, prompts)), at_once):
            parts = {row: prompt[start : start + at_once] for row, prompt in enumerate(prompts) if len(prompt) > start}
            last[list(parts)] = self._read(parts)
        return self.model.head(last).float()

    def _read(self, parts: dict[int, Sequence[int]]) -> Tensor:
        """Advance the sequences `parts` (by row) and give their last hidden vectors [len(parts), C]."""
        rows = torch.tensor(list(parts), device=self.device)
        packed = torch.tensor([[token for part in parts.values() for token in part]], device=self.device)
        bounds = torch.tensor([0, *map(len, parts.values())]).cumsum(0).to(self.device)
        one = len(parts) == 1
        hidden, after = self.model.hidden(packed, self._state.select(rows), None if one else bounds.int())
        for mine, new in zip(self._state.layers, after.layers, strict=True):
            for kept, values in zip(mine, new, strict=True):
                kept[rows] = values
        return hidden[0, bounds[1:] - 1]

    # ---- one token ----------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Feed one token to each sequence; logits fp32 [B, V] for the next ones. On a GPU they are overwritten by the next step."""
        assert len(tokens) == self.batch, f"{len(tokens)} tokens for {self.batch} sequences"
        check_tokens(tokens, self.config.vocab_size, "the step")
        if self.batch <= MOST_SEQUENCES and self.native:
            return decode_step(torch.tensor(tokens), self.native_weights, *self._stacked)
        if self.device.type != "cuda":
            return self._torch_step(torch.tensor(tokens, device=self.device), self._state)
        if self._graph is None:
            self._graph = CudaGraphStep(self._torch_step, self._state)
        return self._graph(tokens)

    @cached_property
    def native(self) -> bool:
        """Whether steps of a few sequences are native calls."""
        config = self.config
        return config.kernel != "reference" and can_decode(self.device, self.dtype, config.head_size, config.dim_ffn)

    @cached_property
    def _torch_step(self) -> TorchStep:
        return TorchStep(self.model)

    @cached_property
    def native_weights(self) -> DecodeWeights:
        """The model's weights as native steps read them: for one sequence, or for as many as there were first."""
        model = self.model
        blocks = [dict(block.named_parameters()) for block in model.blocks]
        ends = (blocks[0]["ln0.weight"], blocks[0]["ln0.bias"], model.ln_out.weight, model.ln_out.bias)
        return DecodeWeights.of(model.emb.weight, model.head.weight, ends, blocks, pack=self.pack and self.batch == 1)


def check_tokens(tokens: Sequence[int], vocab_size: int, what: str) -> None:
    """ValueError when there is no token, or one outside the vocabulary."""
    if not len(tokens):
        raise UserError(f"{what} is empty: expected at least one token (0, the end of a document, starts a new text)")
    least, most = min(tokens), max(tokens)
    if least < 0 or most >= vocab_size:
        raise UserError(
            f"{what} has token id {least if least < 0 else most}, the model has {vocab_size} rows: it was made with another tokenizer"
        )

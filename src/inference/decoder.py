"""Recurrent decoding: prompts as whole sequences through the training kernel, then one token a step in constant memory.

A step reads every weight once and does hardly anything else, so its speed is that of memory. What is in the way is the time
between the products: therefore small weights that are used together are laid together once, states are overwritten in place, and
on a GPU the whole step is one captured CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from src.model import RWKV7, Block, LayerState, State, TimeMix
from src.model.layers import GROUP_NORM_EPS
from src.ops import wkv7

PREFILL_TOKENS = 1024  # of all sequences together that a prompt is read by: bounds memory, loses no speed


class _TimeMixWeights(NamedTuple):
    """A TimeMix's weights laid out for one token; D are the low-rank sizes, w, a, v, g in this order (layer 0: no v)."""

    mix: Tensor  # [3, 1, C]: of r, k, v
    inner: Tensor  # [sum D, 2C]: first low-rank products for (x, xx) side by side: (x + xx * m) @ D1 = [x, xx] @ [D1; m * D1]
    sizes: list[int]
    k_a_rest: Tensor  # 1 - k_a


def _lay_out(att: TimeMix) -> _TimeMixWeights:
    pairs = [(att.x_w, att.w1), (att.x_a, att.a1), (att.x_g, att.g1)]
    if att.layer > 0:
        pairs.append((att.x_v, att.v1))
    inner = torch.cat([torch.cat([first, mix.view(-1, 1) * first]).t() for mix, first in pairs])
    return _TimeMixWeights(
        mix=torch.cat([att.x_r, att.x_k, att.x_v]).contiguous(),
        inner=inner.contiguous(),
        sizes=[first.shape[1] for _, first in pairs],
        k_a_rest=(1 - att.k_a).view(-1),
    )


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T for weight [out, in] and x [B, in], or x [in]: a single row on a CPU goes without the dimension of the batch, because
    matrix-vector products read memory faster than BLAS's general ones."""
    return torch.mv(weight, x) if x.dim() == 1 else F.linear(x, weight)


def _affine(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """bias + x @ weight for bias [1, 1, out], weight [in, out] and x [B, in] or [in]."""
    bias = bias.view(-1)
    return torch.addmv(bias, weight.t(), x) if x.dim() == 1 else torch.addmm(bias, x, weight)


class Decoder:
    """B sequences and where they are: logits [B, V] = prefill(prompts), then step(tokens) after step(tokens).

    The weights are the model's own, apart from a few per cent that are laid out anew: changing the model's weights afterwards needs
    a new Decoder. No gradients.
    """

    def __init__(self, model: RWKV7, batch: int = 1) -> None:
        self.model, self.config = model, model.config
        weight = model.emb.weight
        self.device, self.dtype = weight.device, weight.dtype
        self._blocks = cast(list[Block], list(model.blocks))
        with torch.no_grad():
            self._layers = [_lay_out(block.att) for block in self._blocks]
        self._place(State.zeros(model.config, batch, self.device, self.dtype))

    def _place(self, state: State) -> None:
        """Take `state` as the memory that steps overwrite, and with it the number of sequences."""
        self._state, self.batch = state, state.layers[0].wkv.shape[0]
        self._graph: _Graph | None = None
        single = self.batch == 1 and self.device.type == "cpu"
        # the same memory as the step sees it: a single row on a CPU as vectors
        self._rows = [LayerState(s.att_shift[0], s.wkv, s.ffn_shift[0]) if single else s for s in state.layers]
        self._single = single

    # ---- the state ----------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """A copy of where the sequences are; assign it to go back there (of another Decoder with as many sequences, too)."""
        return self._state.clone()

    @state.setter
    def state(self, state: State) -> None:
        for mine, given in zip(self._state.layers, state.layers, strict=True):
            for kept, new in zip(mine, given, strict=True):
                kept.copy_(new)

    def reset(self) -> None:
        """Forget everything."""
        for layer in self._state.layers:
            for kept in layer:
                kept.zero_()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these of the sequences only (or with copies of them), in this order."""
        self._place(self._state.select(torch.tensor(rows, device=self.device)))

    # ---- prompts ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read a prompt of its own length into each sequence; logits [B, V] after the last token of each.

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
        return self.model.head(last)

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
        """Feed one token to each sequence; logits [B, V] for the next ones. On a GPU they are overwritten by the next step."""
        if self.device.type != "cuda":
            return self._advance(torch.tensor(tokens[0] if self._single else tokens)).view(self.batch, -1)
        if self._graph is None:
            self._graph = _Graph(self)
        return self._graph(tokens)

    def _advance(self, tokens: Tensor) -> Tensor:
        """Logits after tokens [B] (or one, without dimensions); the state moves on in place."""
        model = self.model
        x = self._blocks[0].ln0(F.embedding(tokens, model.emb.weight))
        v_first: Tensor | None = None
        for layer, state in enumerate(self._rows):
            out, v_first = self._time_mix(layer, x, v_first, state)
            x = x + out
            x = x + self._channel_mix(layer, x, state)
        return _product(model.ln_out(x), model.head.weight)

    def _time_mix(self, layer: int, x: Tensor, v_first: Tensor | None, state: LayerState) -> tuple[Tensor, Tensor]:
        """TimeMix.forward for one token; x [B, C] or [C]."""
        block, ours = self._blocks[layer], self._layers[layer]
        att = block.att
        x = block.ln1(x)
        xx = state.att_shift - x
        state.att_shift.copy_(x)
        xr, xk, xv = torch.addcmul(x, xx, ours.mix.view(3, -1) if self._single else ours.mix).unbind(0)
        r, k, v = _product(xr, att.receptance.weight), _product(xk, att.key.weight), _product(xv, att.value.weight)
        inner = _product(torch.cat([x, xx], dim=-1), ours.inner).split(ours.sizes, dim=-1)
        w = _affine(att.w0, torch.tanh(inner[0]), att.w2)
        a = _affine(att.a0, inner[1], att.a2).sigmoid_()
        g = torch.sigmoid(inner[2]) @ att.g2
        if v_first is None:
            v_first = v
        else:
            v = torch.lerp(v, v_first, _affine(att.v0, inner[3], att.v2).sigmoid_())

        heads = (self.batch, 1, att.n_head, att.head_size)
        kk = (k * att.k_k.view(-1)).view(heads)
        kk = kk.div_(torch.linalg.vector_norm(kk, dim=-1, keepdim=True).clamp_min_(1e-12))
        k = k * torch.addcmul(ours.k_a_rest, a, att.k_a.view(-1))
        r, k, v_heads = r.view(heads), k.view(heads), v.view(heads)
        y, wkv = wkv7(r, w.view(heads), k, v_heads, -kk, kk * a.view(heads), state.wkv, kernel=att.kernel)
        state.wkv.copy_(wkv)

        y = F.group_norm(y.view(self.batch, -1), att.n_head, att.ln_x.weight, att.ln_x.bias, GROUP_NORM_EPS)
        bonus = (r * k * att.r_k).sum(dim=-1, keepdim=True)
        y = torch.addcmul(y.view(heads), bonus, v_heads).view_as(g)
        return _product(y * g, att.output.weight), v_first

    def _channel_mix(self, layer: int, x: Tensor, state: LayerState) -> Tensor:
        """ChannelMix.forward for one token; x [B, C] or [C]."""
        block = self._blocks[layer]
        ffn = block.ffn
        x = block.ln2(x)
        xx = state.ffn_shift - x
        state.ffn_shift.copy_(x)
        k = _product(torch.addcmul(x, xx, ffn.x_k.view(-1)), ffn.key.weight).relu_()
        return _product(k.mul_(k), ffn.value.weight)


class _Graph:
    """One step of a Decoder captured as a CUDA graph: a single launch instead of hundreds."""

    def __init__(self, decoder: Decoder) -> None:
        before = decoder.state  # warming up and capturing must not count as steps
        self.tokens = torch.zeros(decoder.batch, dtype=torch.int64, device=decoder.device)
        side = torch.cuda.Stream(decoder.device)
        side.wait_stream(torch.cuda.current_stream(decoder.device))
        with torch.cuda.stream(side):  # what is set up on first use (cuBLAS, kernels) can't be captured
            for _ in range(3):
                decoder._advance(self.tokens)
        torch.cuda.current_stream(decoder.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = decoder._advance(self.tokens)
        decoder.state = before

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        self.tokens.copy_(torch.tensor(tokens))
        self.graph.replay()
        return self.logits


def check_tokens(tokens: Sequence[int], vocab_size: int, what: str) -> None:
    """ValueError when there is no token, or one outside the vocabulary."""
    if not len(tokens):
        raise ValueError(f"{what} is empty: expected at least one token (0, the end of a document, starts a new text)")
    least, most = min(tokens), max(tokens)
    if least < 0 or most >= vocab_size:
        raise ValueError(
            f"{what} has token id {least if least < 0 else most}, the model has {vocab_size} rows: it was made with another tokenizer"
        )

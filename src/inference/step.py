"""One decoding step in plain PyTorch, for GPUs (captured as one CUDA graph) and for CPUs without the native step.

The mathematics is that of TimeMix and ChannelMix at T = 1. The number of small operations determines the speed, so
weights that are used together are concatenated once. States are overwritten in place, as a captured graph requires.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from src.config import PLAIN_KERNELS
from src.model import RWKV7, Block, LayerState, State, TimeMix
from src.model.layers import GROUP_NORM_EPS
from src.ops import wkv7
from src.ops.build import BuildError
from src.ops.recurrence import describe_kernel


class _TimeMixWeights(NamedTuple):
    """A TimeMix's weights laid out for one token; D are the low-rank sizes of w, a, g, v (layer 0: w, a, g)."""

    mix: Tensor  # [3, 1, C]: of r, k, v
    # [sum D, 2 C]: the first matrices of all low-rank pairs, for [x, xx]. (x + xx * m) @ W = [x, xx] @ [W; m * W] turns
    # four token shifts and four products into one.
    inner: Tensor
    sizes: list[int]  # D
    one_minus_k_a: Tensor  # [C]


def _lay_out(att: TimeMix) -> _TimeMixWeights:
    pairs = [(att.x_w, att.w1), (att.x_a, att.a1), (att.x_g, att.g1)]
    if not att.first:
        pairs.append((att.x_v, att.v1))
    inner = torch.cat([torch.cat([first, mix.view(-1, 1) * first]).t() for mix, first in pairs])
    return _TimeMixWeights(
        mix=torch.cat([att.x_r, att.x_k, att.x_v]).contiguous(),
        inner=inner.contiguous(),
        sizes=[first.shape[1] for _, first in pairs],
        one_minus_k_a=(1 - att.k_a).view(-1),
    )


def _affine(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """bias + x @ weight for bias [1, 1, out], x [B, in], weight [in, out]."""
    return torch.addmm(bias.view(-1), x, weight)


def _exact_kernel(model: RWKV7) -> str:
    """The name of the sequential kernel where it is available: a chunked one has nothing to gain at a single token."""
    weight, config = model.emb.weight, model.config
    if config.kernel in PLAIN_KERNELS:
        return config.kernel
    try:
        describe_kernel(weight.device.type, weight.dtype, config.head_size, "recurrent")
    except BuildError:
        return config.kernel
    return "recurrent"


class TorchStep:
    """logits fp32 [B, V] = step(tokens int64 [B], state), with the state updated in place. No gradients."""

    def __init__(self, model: RWKV7) -> None:
        self.model, self._kernel = model, _exact_kernel(model)
        self._blocks = cast(list[Block], list(model.blocks))
        with torch.no_grad():
            self._layers = [_lay_out(block.att) for block in self._blocks]

    def __call__(self, tokens: Tensor, state: State) -> Tensor:
        model = self.model
        x = self._blocks[0].ln0(F.embedding(tokens, model.emb.weight))
        v_first: Tensor | None = None
        for layer, layer_state in enumerate(state.layers):
            out, v_first = self._time_mix(layer, x, v_first, layer_state)
            x, normed = self._blocks[layer].ln2(x, out)
            x = x + self._channel_mix(layer, normed, layer_state)
        return model.head(model.ln_out(x)).float()

    def _time_mix(self, layer: int, x: Tensor, v_first: Tensor | None, state: LayerState) -> tuple[Tensor, Tensor]:
        """TimeMix.forward after ln1, for one token: x [B, C] -> out [B, C], v_first [B, C]. Updates `state`."""
        block, weights = self._blocks[layer], self._layers[layer]
        att = block.att
        x = block.ln1(x)
        xx = state.att_shift - x
        state.att_shift.copy_(x)
        xr, xk, xv = torch.addcmul(x, xx, weights.mix).unbind(0)
        r, k, v = att.receptance(xr), att.key(xk), att.value(xv)
        # [B, 2 C] -> [B, sum D], split into w, a, g, v
        inner = F.linear(torch.cat([x, xx], dim=-1), weights.inner).split(weights.sizes, dim=-1)
        w = _affine(att.w0, torch.tanh(inner[0]), att.w2)
        a = _affine(att.a0, inner[1], att.a2).sigmoid_()
        g = torch.sigmoid(inner[2]) @ att.g2
        if v_first is None:
            v_first = v
        else:
            v = torch.lerp(v, v_first, _affine(att.v0, inner[3], att.v2).sigmoid_())

        heads = (x.shape[0], 1, att.n_head, att.head_size)  # [B, T = 1, H, N], as wkv7 takes it
        kk = (k * att.k_k.view(-1)).view(heads)
        kk = kk.div_(torch.linalg.vector_norm(kk, dim=-1, keepdim=True).clamp_min_(1e-12))
        k = k * torch.addcmul(weights.one_minus_k_a, a, att.k_a.view(-1))  # k (1 + (a - 1) k_a)
        r, k, v_heads = r.view(heads), k.view(heads), v.view(heads)
        y, wkv = wkv7(r, w.view(heads), k, v_heads, -kk, kk * a.view(heads), state.wkv, kernel=self._kernel)
        state.wkv.copy_(wkv)

        y = F.group_norm(y.view_as(x), att.n_head, att.ln_x.weight, att.ln_x.bias, GROUP_NORM_EPS)
        bonus = (r * k * att.r_k).sum(dim=-1, keepdim=True)
        y = torch.addcmul(y.view(heads), bonus, v_heads).view_as(x)
        return att.output(y * g), v_first

    def _channel_mix(self, layer: int, x: Tensor, state: LayerState) -> Tensor:
        """ChannelMix.forward for one token: x [B, C] -> out [B, C]. Updates `state`."""
        ffn = self._blocks[layer].ffn
        xx = state.ffn_shift - x
        state.ffn_shift.copy_(x)
        k = ffn.key(torch.addcmul(x, xx, ffn.x_k.view(-1))).relu_()
        return ffn.value(k.mul_(k))


def overwrite(state: State, values: State) -> None:
    """Copy `values` into the memory of `state`."""
    for layer, new_layer in zip(state.layers, values.layers, strict=True):
        for tensor, new in zip(layer, new_layer, strict=True):
            tensor.copy_(new)


class CudaGraphStep:
    """A TorchStep on one state, captured as a CUDA graph: one launch instead of hundreds. Overwrites its logits."""

    def __init__(self, step: TorchStep, state: State) -> None:
        self._device = state.layers[0].wkv.device
        before = state.clone()  # warm-up steps change the state; it is restored below
        self._tokens = torch.zeros(state.layers[0].wkv.shape[0], dtype=torch.int64, device=self._device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):  # a stream of another device would capture nothing
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # initialisation on first use (cuBLAS, kernels) can't be captured
                for _ in range(3):  # as many as PyTorch's documentation of CUDA graphs uses
                    step(self._tokens, state)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self._graph):
                self._logits = step(self._tokens, state)
        overwrite(state, before)

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        self._tokens.copy_(torch.tensor(tokens))
        with torch.cuda.device(self._device):
            self._graph.replay()
        return self._logits

"""The two halves of an RWKV-7 block, usable alone, and the block.

`TimeMix` mixes along the sequence: a linear recurrence whose state is a matrix per head, updated by a generalised delta rule
with a decay of its own for each channel. `ChannelMix` mixes along the channels. Both look one token back ("token shift"), so both
carry a little state. Shapes: x [B, T, C]; H heads of width N = C / H. With `cu_seqlens` (int32 [D+1]) a row of B = 1 holds D
documents one after another, each with its own state: what is [B, ...] in a state is then [D, ...].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.config import ModelConfig
from src.model.init import initialise
from src.model.state import LayerState
from src.ops import relu_squared, wkv7

GROUP_NORM_EPS = 64e-5  # for every head size
LAYER_NORM_EPS = 1e-5


def token_shift(x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """x[t-1] - x[t] for every t, and the input that the next call starts from.

    `last` [B, C] stands before the first token (None: zeros); with `cu_seqlens` before the first of each document.
    """
    if cu_seqlens is None:
        before = x.new_zeros(x.shape[0], 1, x.shape[2]) if last is None else last.unsqueeze(1)
        return torch.cat([before, x[:, :-1]], dim=1) - x, x[:, -1]
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    before = x.new_zeros(starts.shape[0], x.shape[2]) if last is None else last
    previous = F.pad(x, (0, 0, 1, 0))[:, :-1].index_copy(1, starts, before.unsqueeze(0))
    return previous - x, x[0, ends - 1]


class TimeMix(nn.Module):
    """Time mixing ("att"): y = WKV7 over token-shifted receptance, decay, key, value, removal and replacement vectors.

    Layer 0's values are handed to the later layers (`v_first`), which mix them into their own; a TimeMix with `layer` 0 therefore
    stands alone. Its own v0, v1, v2 exist for the file format, do nothing and are never trained.
    """

    x_r: Tensor  # [1, 1, C]: the six mixes with the token before
    x_w: Tensor
    x_k: Tensor
    x_v: Tensor
    x_a: Tensor
    x_g: Tensor
    w0: Tensor  # [1, 1, C]; w1 [C, D], w2 [D, C]: raw decay
    w1: Tensor
    w2: Tensor
    a0: Tensor  # in-context learning rate
    a1: Tensor
    a2: Tensor
    v0: Tensor  # how much of layer 0's values
    v1: Tensor
    v2: Tensor
    g1: Tensor  # gate
    g2: Tensor
    k_k: Tensor  # [1, 1, C]
    k_a: Tensor

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.n_head, self.head_size, self.kernel = layer, config.n_head, config.head_size, config.kernel
        width = config.n_embd
        for mix in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a"):
            self.register_parameter(mix, nn.Parameter(torch.empty(1, 1, width)))
        sizes = {
            "w": config.d_decay_lora,
            "a": config.d_aaa_lora,
            "v": config.d_mv_lora,
            "g": config.d_gate_lora,
        }
        for name, rank in sizes.items():
            self.register_parameter(f"{name}1", nn.Parameter(torch.empty(width, rank)))
            self.register_parameter(f"{name}2", nn.Parameter(torch.empty(rank, width)))
        self.r_k = nn.Parameter(torch.empty(self.n_head, self.head_size))
        self.receptance = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.ln_x = nn.GroupNorm(self.n_head, width, eps=GROUP_NORM_EPS)
        if layer == 0:
            for parameter in (self.v0, self.v1, self.v2):
                parameter.requires_grad_(False)
        initialise(self, config, layer, prefix="att.")

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None = None,
        shift: Tensor | None = None,
        wkv: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, T, C], state (shift [B, C], wkv [B, H, N, N]) or None for zeros -> out [B, T, C], v_first, new shift, new wkv."""
        batch, length, width = x.shape
        heads = (batch, length, self.n_head, self.head_size)
        xx, shift = token_shift(x, shift, cu_seqlens)
        xr, xw, xk = x + xx * self.x_r, x + xx * self.x_w, x + xx * self.x_k
        xv, xa, xg = x + xx * self.x_v, x + xx * self.x_a, x + xx * self.x_g

        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w = self.w0 + torch.tanh(xw @ self.w1) @ self.w2
        if self.layer == 0:
            v_first = v
        else:
            assert v_first is not None, "a TimeMix of layer > 0 needs v_first, the values of layer 0"
            v = v + (v_first - v) * torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2)
        a = torch.sigmoid(self.a0 + (xa @ self.a1) @ self.a2)
        g = torch.sigmoid(xg @ self.g1) @ self.g2

        kk = F.normalize((k * self.k_k).view(heads), dim=-1, eps=1e-12)
        k = k * (1 + (a - 1) * self.k_a)
        r, k, v = r.view(heads), k.view(heads), v.view(heads)
        y, wkv = wkv7(r, w.view(heads), k, v, -kk, kk * a.view(heads), wkv, cu_seqlens, kernel=self.kernel)

        y = self.ln_x(y.reshape(batch * length, width)).view(batch, length, width)
        bonus = (r * k * self.r_k).sum(dim=-1, keepdim=True) * v
        return self.output((y + bonus.view(batch, length, width)) * g), v_first, shift, wkv


class ChannelMix(nn.Module):
    """Channel mixing ("ffn"): value(relu(key(token-shifted x))^2)."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.key = nn.Linear(config.n_embd, config.dim_ffn, bias=False)
        self.value = nn.Linear(config.dim_ffn, config.n_embd, bias=False)
        initialise(self, config, layer, prefix="ffn.")

    def forward(
        self, x: Tensor, shift: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, C], shift [B, C] or None for zeros -> out [B, T, C], new shift."""
        xx, shift = token_shift(x, shift, cu_seqlens)
        return self.value(relu_squared(self.key(x + xx * self.x_k))), shift


class Block(nn.Module):
    """x + att(ln1(x)), then x + ffn(ln2(x)); block 0 first normalises the embedding (ln0)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.ln1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.ln2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config, layer)
        self.layer = layer

    def forward(
        self, x: Tensor, v_first: Tensor | None, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, LayerState]:
        att_shift, wkv, ffn_shift = state if state is not None else (None, None, None)
        if self.layer == 0:
            x = self.ln0(x)
        out, v_first, att_shift, wkv = self.att(self.ln1(x), v_first, att_shift, wkv, cu_seqlens)
        x = x + out
        out, ffn_shift = self.ffn(self.ln2(x), ffn_shift, cu_seqlens)
        return x + out, v_first, LayerState(att_shift, wkv, ffn_shift)

"""The two halves of an RWKV-7 block, each usable as a layer of another network, and the block.

`TimeMix` mixes along the sequence: a linear recurrence whose state is a matrix per head, updated by a generalised delta
rule with a separate decay for each channel. `ChannelMix` mixes along the channels. Both also read the previous token
("token shift"), so both have a state that holds it. Shapes: x [B, T, C]; H heads of size N = C / H. With `cu_seqlens`
(int32 [D+1]) a row of B = 1 holds D documents one after another, each with its own state: what is [B, ...] in a state
is then [D, ...].
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from src.config import ModelConfig
from src.model.attention import Attention
from src.model.init import initialise
from src.model.recompute import recomputed
from src.model.state import LayerState
from src.ops import (
    add_layer_norm,
    linear,
    relu_squared,
    shifted_products,
    time_mix_inputs,
    time_mix_output,
    token_shift,
    wkv7,
)

# The official code's 1e-5 * head_size_divisor^2 with its divisor of 8: the same for every head size.
GROUP_NORM_EPS = 64e-5
LAYER_NORM_EPS = 1e-5


class SequenceContext(Protocol):
    """Gives a layer that holds a part of a sequence what lies before it (src/training/distributed/context_parallel.py).

    The state is then that of the whole sequence, not of the part.
    """

    def rows(self, x: Tensor, shift: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Token-shift rows before the part and at the end of the sequence."""
        ...

    def wkv7(
        self,
        r: Tensor,
        w: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        *,
        kernel: str,
    ) -> tuple[Tensor, Tensor]:
        """y of the part, and the state at the end of the sequence."""
        ...


def last_tokens(x: Tensor, shift: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The token-shift state after a call, [B, C]: x[:, -1]. With `cu_seqlens` the last token of each document, [D, C].

    A document without tokens keeps the state it began with, `shift` (None: zeros).
    """
    if cu_seqlens is None:
        return x[:, -1].clone()  # a view would keep all of x alive as long as the state
    # An empty document's last token is that of the document before it (-1: of none); replaced below.
    last = x[0, (cu_seqlens[1:].long() - 1).clamp(min=0)]
    empty = (cu_seqlens[1:] == cu_seqlens[:-1]).unsqueeze(1)
    return torch.where(empty, torch.zeros_like(last) if shift is None else shift, last)


def shift_states(
    x: Tensor, shift: Tensor | None, cu_seqlens: Tensor | None, context: SequenceContext | None
) -> tuple[Tensor | None, Tensor]:
    """The token-shift state before x, and the one after it."""
    if context is None:
        return shift, last_tokens(x, shift, cu_seqlens)
    assert shift is not None, "a part of a sequence is computed from a given state"
    return context.rows(x, shift, cu_seqlens)


class Linear(nn.Linear):
    """nn.Linear without a bias; the product is `src.ops.linear`."""

    def __init__(self, in_features: int, out_features: int, kernel: str) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.kernel = kernel

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, kernel=self.kernel)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the channels; computed by `src.ops.add_layer_norm`."""

    def __init__(self, width: int, kernel: str) -> None:
        super().__init__(width, eps=LAYER_NORM_EPS)
        self.kernel = kernel

    def forward(self, input: Tensor) -> Tensor:
        return add_layer_norm(input, None, self.weight, self.bias, self.eps, kernel=self.kernel)[1]


class ResidualNorm(LayerNorm):
    """(x + out, layer norm of that): a residual connection and the norm after it."""

    def forward(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """x, out [B, T, C]."""
        return add_layer_norm(x, out, self.weight, self.bias, self.eps, kernel=self.kernel)


class HeadNorm(nn.GroupNorm):
    """Group norm of the recurrence's output (one group per head), plus the bonus r k r_k v, times the gate."""

    # A module rather than a function: ZeRO stage 3 gathers a module's parameters for its forward pass.

    def forward(  # type: ignore[override]
        self, y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, r_k: Tensor, kernel: str = "auto"
    ) -> Tensor:
        """y, r, k, v, g [B, T, C], r_k [H, N]; formula: `src.ops.time_mix_output`."""
        head_size = self.num_channels // self.num_groups
        return time_mix_output(y, r, k, v, g, r_k, self.weight, self.bias, self.eps, head_size, kernel=kernel)


class TimeMix(nn.Module):
    """Time mixing ("att"): output(group_norm(WKV7(r, w, k, v, -kk, kk a)) * gate), of token-shifted inputs.

    Layer 0 returns its values as `v_first`, and the later layers interpolate theirs with them; a single TimeMix in
    another network therefore has `layer` 0. Layer 0's own v0, v1, v2 exist for the file format only: they are not used
    and never trained.
    """

    # Declared for the type checker; registered by name in __init__. D is the low-rank size of the letter.
    x_r: Tensor  # [1, 1, C]: share of the previous token in the input of r, w, k, v, a, g
    x_w: Tensor
    x_k: Tensor
    x_v: Tensor
    x_a: Tensor
    x_g: Tensor
    w0: Tensor  # [1, 1, C], with w1 [C, D] and w2 [D, C]: raw decay
    w1: Tensor
    w2: Tensor
    a0: Tensor  # in-context learning rate, shapes as for w
    a1: Tensor
    a2: Tensor
    v0: Tensor  # share of layer 0's values
    v1: Tensor
    v2: Tensor
    g1: Tensor  # output gate
    g2: Tensor
    k_k: Tensor  # [1, 1, C]: scale of the key before it is normalised to kk
    k_a: Tensor  # [1, 1, C]: how much a scales the key that is written to the state
    time_state: Tensor | None  # fp32 [H, N, N]: a tuned initial state (src/adapt/state_tuning.py); None: zeros

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        # A bool rather than the layer's number: torch.compile specialises on it, and shares one graph between equal
        # blocks.
        self.first = layer == 0
        self.n_head, self.head_size, self.kernel = config.n_head, config.head_size, config.kernel
        width = config.n_embd
        for vector in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a"):
            self.register_parameter(vector, nn.Parameter(torch.empty(1, 1, width)))
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
        self.receptance = Linear(width, width, self.kernel)
        self.key = Linear(width, width, self.kernel)
        self.value = Linear(width, width, self.kernel)
        self.output = Linear(width, width, self.kernel)
        self.ln_x = HeadNorm(self.n_head, width, eps=GROUP_NORM_EPS)
        self.register_parameter("time_state", None)
        self.context: SequenceContext | None = None
        if layer == 0:  # unused, and DDP would wait for their gradients
            for parameter in (self.v0, self.v1, self.v2):
                parameter.requires_grad_(False)
        initialise(self, config, layer, prefix="att.")

    def initial_wkv(self, sequences: int, dtype: torch.dtype) -> Tensor:
        """The recurrence's state before the first token, [sequences, H, N, N]: `time_state` or zeros.

        fp32 whatever a parameter became under an engine; for activations in float64, the reference's alone, float64.
        """
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        shape = (sequences, self.n_head, self.head_size, self.head_size)
        if self.time_state is None:
            return self.r_k.new_zeros(shape, dtype=dtype)
        return self.time_state.to(dtype).expand(shape).contiguous()

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None = None,
        shift: Tensor | None = None,
        wkv: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, T, C] -> out [B, T, C], v_first, new shift, new wkv.

        The state is shift [B, C] and wkv fp32 [B, H, N, N]; None: zeros, of wkv `time_state` where there is one.
        v_first [B, T, C] are layer 0's values.
        """
        if wkv is None and self.time_state is not None:
            wkv = self.initial_wkv(x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, x.dtype)
        shift, last = shift_states(x, shift, cu_seqlens, self.context)
        (xr, xk, xv), thin_w, thin_a, thin_g, thin_v = self._shifted(x, shift, cu_seqlens)

        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w = self.w0 + torch.tanh(thin_w) @ self.w2  # raw: the kernel computes decay = exp(-exp(-0.5) sigmoid(w))
        a = thin_a @ self.a2  # a0 and the sigmoid are applied in time_mix_inputs, as v0 is for the residual
        g = torch.sigmoid(thin_g) @ self.g2
        residual = None
        if self.first:
            v_first = v
        else:
            assert v_first is not None, "a TimeMix of layer > 0 needs v_first, the values of layer 0"
            residual = thin_v @ self.v2

        k, v, remove, replace = time_mix_inputs(
            *(k, v, a, None if self.first else v_first, residual),
            *(self.k_k, self.k_a, self.a0, self.v0, self.head_size),
            kernel=self.kernel,
        )
        heads = (*x.shape[:2], self.n_head, self.head_size)  # [B, T, C] -> [B, T, H, N]
        y, wkv = (wkv7 if self.context is None else self.context.wkv7)(
            *(r.view(heads), w.view(heads), k.view(heads), v.view(heads), remove.view(heads), replace.view(heads)),
            wkv,
            cu_seqlens,
            kernel=self.kernel,
        )
        out = self.ln_x(y.view(x.shape), r, k, v, g, self.r_k, self.kernel)
        return self.output(out), v_first, last, wkv

    def _shifted(
        self, x: Tensor, shift: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor, Tensor]:
        """Inputs of r, k, v [B, T, C], and those of w, a, g, v after their first low-rank factor [B, T, D].

        Layer 0 has no low-rank values; what stands for them isn't used.
        """
        if gathers_products(x):
            wide = token_shift(x, shift, cu_seqlens, (self.x_r, self.x_k, self.x_v), kernel=self.kernel)
            pairs = [(self.x_w, self.w1), (self.x_a, self.a1), (self.x_g, self.g1)]
            if not self.first:
                pairs.append((self.x_v, self.v1))
            thin = shifted_products(x, shift, cu_seqlens, pairs)
            return wide, thin[0], thin[1], thin[2], thin[-1]
        mixes = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        xr, xw, xk, xv, xa, xg = token_shift(x, shift, cu_seqlens, mixes, kernel=self.kernel)
        thin_g = xg @ self.g1
        return (xr, xk, xv), xw @ self.w1, xa @ self.a1, thin_g, thin_g if self.first else xv @ self.v1


def gathers_products(x: Tensor) -> bool:
    """Whether the first low-rank factors are one product: in compiled code of a GPU, where memory is what a step waits
    for, and where the small operations around the product become two kernels."""
    return x.device.type == "cuda" and torch.compiler.is_compiling()


class ChannelMix(nn.Module):
    """Channel mixing ("ffn"): value(relu(key(x'))^2) with x' = x shifted by x_k towards the previous token."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.kernel = config.kernel
        self.context: SequenceContext | None = None
        self.x_k = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.key = Linear(config.n_embd, config.dim_ffn, self.kernel)
        self.value = Linear(config.dim_ffn, config.n_embd, self.kernel)
        initialise(self, config, layer, prefix="ffn.")

    def forward(
        self, x: Tensor, shift: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, C], shift [B, C] (None: zeros) -> out [B, T, C], new shift [B, C]."""
        shift, last = shift_states(x, shift, cu_seqlens, self.context)
        (xk,) = token_shift(x, shift, cu_seqlens, (self.x_k,), kernel=self.kernel)
        hidden = relu_squared(self.key(xk), kernel=self.kernel)  # [B, T, dim_ffn]
        return self.value(hidden), last


class Block(nn.Module):
    """x + att(ln1(x)), then x + ffn(ln2(x)); block 0 first normalises the embedding (ln0).

    `att` is a TimeMix or, where `config.blocks` says "attention", an Attention.
    With `grad_cp` only its inputs and the recurrence's outputs are kept for backward, which recomputes the rest.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = LayerNorm(config.n_embd, config.kernel)
        self.ln1 = LayerNorm(config.n_embd, config.kernel)
        self.ln2 = ResidualNorm(config.n_embd, config.kernel)
        self.att: TimeMix
        if config.block_kind(layer) == "attention":
            self.att = Attention(config, layer)  # type: ignore[assignment] # it is called as a TimeMix is
        else:
            self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config, layer)
        self.first, self.grad_cp = layer == 0, config.grad_cp
        self.draws_random_numbers = False  # with dropout in an adapter: the recomputation has to draw them again

    def forward(
        self, x: Tensor, v_first: Tensor | None, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, LayerState]:
        # Checkpointing is applied inside of the block and not around it, so that a compiled block includes it.
        if self.grad_cp and torch.is_grad_enabled():
            return recomputed(self._halves, x, v_first, state, cu_seqlens, random=self.draws_random_numbers)
        return self._halves(x, v_first, state, cu_seqlens)

    def _halves(
        self, x: Tensor, v_first: Tensor | None, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, LayerState]:
        att_shift, wkv, ffn_shift = state if state is not None else (None, None, None)
        if self.first:
            x = self.ln0(x)
        out, v_first, att_shift, wkv = self.att(self.ln1(x), v_first, att_shift, wkv, cu_seqlens)
        x, normed = self.ln2(x, out)
        out, ffn_shift = self.ffn(normed, ffn_shift, cu_seqlens)
        return x + out, v_first, LayerState(att_shift, wkv, ffn_shift)

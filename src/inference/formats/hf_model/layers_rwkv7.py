"""The layers of RWKV-7 in plain PyTorch, with the names of flash-linear-attention. The mathematics, per head, with S of
shape [N value, N key]:

    S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        y_t = S_t r_t

Shapes: x [B, T, C]; H heads of size N = C / H. Initial values are not those of RWKV-7: this is for trained weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_rwkv7 import RWKV7Config

# Tokens that are processed together. A decay is above 0.545 per token, so that the products of 16 and their inverses
# stay far from the bounds of fp32.
CHUNK = 16
# Of a layer: the last inputs of attention and feed-forward [B, C], and the matrices S [B, H, N, N] in fp32.
LayerState = tuple[Tensor, Tensor, Tensor]


def recurrence(inputs: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, T, H, N] and the state after it, of r, log d, k, v, a, b [B, T, H, N] and `state` [B, H, N, N].

    Within a chunk, with P_t the product of the decays up to t, r' = r_t P_t, a' = a_t P_{t-1}, b' = b_s / P_s,
    k' = k_s / P_s and S the state before the chunk, the vectors u_t = S_{t-1} a_t solve a triangular system:

        (I - tril(a' b'^T, -1)) U = a' S^T + tril(a' k'^T, -1) V
        Y = r' S^T + tril(r' b'^T) U + tril(r' k'^T) V          S <- (S + U^T b' + V^T k') diag(P_L)
    """
    B, T, H, N = inputs[0].shape
    size = min(CHUNK, T)
    padding = -T % size  # zeros: a decay of 1, and nothing is written

    def chunks(x: Tensor) -> Tensor:  # [B, T, H, N] -> [B, H, chunks, size, N]
        return F.pad(x, (0, 0, 0, 0, 0, padding)).view(B, -1, size, H, N).permute(0, 3, 1, 2, 4)

    r, log_decay, k, v, a, b = (chunks(x) for x in inputs)
    total = log_decay.cumsum(-2)
    r, a = r * total.exp(), a * (total - log_decay).exp()
    k, b = k * (-total).exp(), b * (-total).exp()
    end = total[..., -1:, :].exp()
    # What doesn't depend on the state, for all chunks at once.
    system = torch.eye(size, dtype=r.dtype, device=r.device) - (a @ b.mT).tril(-1)
    known = torch.cat([a, (a @ k.mT).tril(-1) @ v], dim=-1)
    a, u = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True).split(N, dim=-1)
    read_u, y = (r @ b.mT).tril(), (r @ k.mT).tril() @ v
    ys = []
    for i in range(r.shape[2]):
        transposed = state.mT
        u_i = u[:, :, i] + a[:, :, i] @ transposed
        ys.append(y[:, :, i] + read_u[:, :, i] @ u_i + r[:, :, i] @ transposed)
        state = (state + u_i.mT @ b[:, :, i] + v[:, :, i].mT @ k[:, :, i]) * end[:, :, i]
    return torch.stack(ys, 2).permute(0, 2, 3, 1, 4).reshape(B, -1, H, N)[:, :T], state


def last_real_token(attention_mask: Tensor) -> Tensor:
    """[B, T + 1]: for each position and for the end, 1 + the index of the last token before it that is no padding.

    0 where there is none: what came before this call.
    """
    positions = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    return F.pad((positions * attention_mask.bool()).cummax(1).values, (1, 0))


def shift(x: Tensor, last: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """The token before each one of x [B, T, C], and the last one [B, C]; `last` precedes x. `before`: see above."""
    padded = torch.cat([last.unsqueeze(1), x], dim=1)
    if before is not None:
        padded = padded.gather(1, before.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return padded[:, :-1], padded[:, -1]


class LowRank(nn.Module):
    """x -> activation(x A) B + bias."""

    def __init__(self, width: int, rank: int, activation: nn.Module, bias: bool) -> None:
        super().__init__()
        self.lora = nn.Sequential(nn.Linear(width, rank, bias=False), activation, nn.Linear(rank, width, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)


class RWKV7Attention(nn.Module):
    """Time mixing. Layer 0's values are `v_first`, with which later layers interpolate theirs."""

    # [1, 1, C]: share of the previous token in the input of r, w, k, v, a, g
    x_r: Tensor
    x_w: Tensor
    x_k: Tensor
    x_v: Tensor
    x_a: Tensor
    x_g: Tensor

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        width, self.heads, self.head_dim = config.hidden_size, config.num_heads, config.head_dim
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"):
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, width)))
        self.k_k = nn.Parameter(torch.ones(width))
        self.k_a = nn.Parameter(torch.ones(width))
        self.r_k = nn.Parameter(torch.zeros(self.heads, self.head_dim))
        self.r_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.w_lora = LowRank(width, config.decay_low_rank_dim, nn.Tanh(), bias=True)
        self.a_lora = LowRank(width, config.a_low_rank_dim, nn.Identity(), bias=True)
        self.v_lora = LowRank(width, config.v_low_rank_dim, nn.Identity(), bias=True) if layer else None
        self.g_lora = LowRank(width, config.gate_low_rank_dim, nn.Sigmoid(), bias=False)
        self.g_norm = nn.GroupNorm(self.heads, width, eps=config.group_norm_eps)

    def forward(
        self, x: Tensor, v_first: Tensor | None, last: Tensor, state: Tensor, before: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, T, C], `last` [B, C], `state` [B, H, N, N] -> out, v_first, the new `last` and the new `state`."""
        previous, last = shift(x, last, before)
        delta = previous - x
        r = self.r_proj(x + delta * self.x_r)
        k = self.k_proj(x + delta * self.x_k)
        xv = x + delta * self.x_v
        v = self.v_proj(xv)
        log_decay = -math.exp(-0.5) * self.w_lora(x + delta * self.x_w).float().sigmoid()
        a = self.a_lora(x + delta * self.x_a).sigmoid()  # the in-context learning rate
        g = self.g_lora(x + delta * self.x_g)
        if v_first is None or self.v_lora is None:
            v_first = v
        else:
            v = v + (v_first - v) * self.v_lora(xv).sigmoid()
        heads = (self.heads, self.head_dim)
        kk = F.normalize((k * self.k_k).unflatten(-1, heads), dim=-1, eps=1e-12)
        k = (k * (1 + (a - 1) * self.k_a)).unflatten(-1, heads)
        r, v, a, log_decay = (t.unflatten(-1, heads) for t in (r, v, a, log_decay))
        # fp32 whatever the weights are, in autocast too: rounding the state at every token would add up
        inputs = [t.to(state.dtype) for t in (r, log_decay, k, v, -kk, kk * a)]
        if mask is not None:  # padding leaves the state as it is
            inputs = [t * mask[:, :, None, None] for t in inputs]
        with torch.autocast(x.device.type, enabled=False):
            y, state = recurrence(inputs, state)
        y = self.g_norm(y.flatten(0, 1).flatten(1).to(x.dtype)).view_as(x)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        return self.o_proj((y + bonus.flatten(2)) * g), v_first, last, state


class RWKV7FeedForward(nn.Module):
    """Channel mixing: value(relu(key(x'))^2) with x' = x shifted by x_k towards the previous token."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.zeros(config.hidden_size))
        self.key = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.value = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, last: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        previous, last = shift(x, last, before)
        return self.value(self.key(x + (previous - x) * self.x_k).relu().square()), last


class RWKV7Block(nn.Module):
    """x + attn(attn_norm(x)), then x + ffn(ffn_norm(x)); block 0 first normalises the embedding."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)

        self.pre_norm = norm() if layer == 0 else None
        self.attn_norm, self.ffn_norm = norm(), norm()
        self.attn = RWKV7Attention(config, layer)
        self.ffn = RWKV7FeedForward(config)

    def forward(
        self, x: Tensor, v_first: Tensor | None, state: LayerState, before: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, LayerState]:
        att_last, ffn_last, wkv = state
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        out, v_first, att_last, wkv = self.attn(self.attn_norm(x), v_first, att_last, wkv, before, mask)
        x = x + out
        out, ffn_last = self.ffn(self.ffn_norm(x), ffn_last, before)
        return x + out, v_first, (att_last, ffn_last, wkv)

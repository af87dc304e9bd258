"""RWKV-7 for transformers in plain PyTorch: forward, state, generation, gradients.

Parameters have the names of flash-linear-attention. The mathematics, per head, with S of shape [N value, N key]:

    S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        y_t = S_t r_t

Shapes: x [B, T, C]; H heads of size N = C / H. Initial values are not those of RWKV-7: the file is for trained weights.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_rwkv7 import RWKV7Config

# Tokens that are processed together. A decay is above 0.545 per token, so that the products of 16 and their inverses
# stay far from the bounds of fp32.
CHUNK = 16
# The name of the state in the outputs, by the version of transformers.
_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
STATE = "cache" if "cache" in _FIELDS else "past_key_values"

# Of a layer: the last inputs of attention and feed-forward [B, C], and the matrices S [B, H, N, N] in fp32.
LayerState = tuple[Tensor, Tensor, Tensor]


class RWKV7Cache:
    """The recurrent state, of constant size for a text of any length; `forward` replaces its contents."""

    # What `generate` asks a cache for: nothing here can be compiled, cut back, or belongs to attention.
    is_compileable = is_croppable = False
    is_linear = (True,)

    def __init__(self) -> None:
        self.layers: list[LayerState] = []
        self.seen_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens that it has seen, padding included."""
        return self.seen_tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The rows `beam_idx` of the batch, for beam search."""
        self.layers = [
            (att.index_select(0, beam_idx), ffn.index_select(0, beam_idx), wkv.index_select(0, beam_idx))
            for att, ffn, wkv in self.layers
        ]


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


class RWKV7PreTrainedModel(PreTrainedModel):
    config_class = RWKV7Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RWKV7Block"]  # noqa: RUF012 (the attribute that transformers reads)
    _is_stateful = True  # a state can't be cut back to an earlier token: no assisted generation

    def _init_weights(self, module: nn.Module) -> None:
        # torch's own functions: later versions of transformers keep them from touching weights that were loaded
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            nn.init.ones_(module.weight)
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.GroupNorm)) and module.bias is not None:
            nn.init.zeros_(module.bias)


class RWKV7Model(RWKV7PreTrainedModel):
    """Token ids [B, T] -> hidden vectors [B, T, C]."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(config)
        self.embeddings: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(RWKV7Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def _new_state(self, x: Tensor) -> LayerState:
        heads, size = self.config.num_heads, self.config.head_dim
        last = x.new_zeros(x.shape[0], x.shape[2])
        wkv = x.new_zeros(x.shape[0], heads, size, size, dtype=torch.promote_types(x.dtype, torch.float32))
        return last, last, wkv

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: RWKV7Cache | None = None,
        cache: RWKV7Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """`attention_mask` [B, T]: 0 marks padding, anywhere. `past_key_values`, in later versions of transformers
        `cache`: the state to continue from; it is updated."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        state = past_key_values if cache is None else cache
        if state is not None and not isinstance(state, RWKV7Cache):
            raise TypeError(f"the state of an RWKV-7 model is an RWKV7Cache, got a {type(state).__name__}")
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        before = mask = None
        if attention_mask is not None and not bool(attention_mask[:, -x.shape[1] :].all()):
            mask = attention_mask[:, -x.shape[1] :].to(x.device)
            before = last_real_token(mask)
        hidden_states: tuple[Tensor, ...] = ()
        v_first, new_layers = None, []
        for i, block in enumerate(self.layers):
            hidden_states += (x,)
            layer_state = state.layers[i] if state is not None and state.layers else self._new_state(x)
            arguments = (x, v_first, layer_state, before, mask)
            if self.gradient_checkpointing and self.training:
                x, v_first, layer_state = self._gradient_checkpointing_func(block.__call__, *arguments)
            else:
                x, v_first, layer_state = block(*arguments)
            new_layers.append(layer_state)
        x = self.norm(x)
        if use_cache:
            state = RWKV7Cache() if state is None else state
            state.layers, state.seen_tokens = new_layers, state.seen_tokens + x.shape[1]
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            **{STATE: state if use_cache else None},
        )
        return output.to_tuple() if return_dict is False else output


class RWKV7ForCausalLM(RWKV7PreTrainedModel, GenerationMixin):
    """Token ids [B, T] -> logits [B, T, V] of the next tokens, and with `labels` the loss."""

    accepts_loss_kwargs = True  # Trainer then passes num_items_in_batch

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(config)
        self.model = RWKV7Model(config)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: RWKV7Cache | None = None,
        cache: RWKV7Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        """As `RWKV7Model`. `labels` [B, T]: the input's own ids, -100 where they don't count; token t + 1 is the target
        of t. `logits_to_keep`: of the last so many positions (0: all) or of these indices."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        x = output[0]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept])
        loss = None
        if labels is not None:
            if logits.shape[1] != labels.shape[1]:
                raise ValueError("labels need the logits of all tokens: leave logits_to_keep at 0")
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(),
                labels[:, 1:].flatten().to(logits.device),
                reduction="mean" if num_items_in_batch is None else "sum",
            )
            if num_items_in_batch is not None:
                loss = loss / num_items_in_batch
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            **{STATE: getattr(output, STATE)},
        )
        return result.to_tuple() if return_dict is False else result

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: RWKV7Cache | None = None,
        cache: RWKV7Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = True,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `forward` gets in a step of `generate`: the tokens that the state hasn't seen."""
        state = past_key_values if cache is None else cache
        seen = state.get_seq_length() if state is not None else 0
        inputs: dict[str, Any] = {"past_key_values": state, "use_cache": use_cache, "logits_to_keep": logits_to_keep}
        inputs["attention_mask"] = attention_mask
        if inputs_embeds is not None and not seen:
            inputs["inputs_embeds"] = inputs_embeds
        else:  # after inputs_embeds the ids are only those that were generated, fewer than the state has seen
            inputs["input_ids"] = input_ids[:, seen:] if input_ids.shape[1] > seen else input_ids[:, -1:]
        return inputs

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the cache is made by the first `forward`

    def _reorder_cache(self, past_key_values: RWKV7Cache, beam_idx: Tensor) -> RWKV7Cache:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values

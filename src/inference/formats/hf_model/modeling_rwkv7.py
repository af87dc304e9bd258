"""RWKV-7 for transformers in plain PyTorch: forward, state, generation, gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_rwkv7 import RWKV7Config
from .layers_rwkv7 import LayerState, RWKV7Block, last_real_token

# The name of the state in the outputs, by the version of transformers.
_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
STATE = "cache" if "cache" in _FIELDS else "past_key_values"


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
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """`attention_mask` [B, T]: 0 marks padding, anywhere. `past_key_values`, in later versions of transformers
        `cache`: the state to continue from; it is updated."""
        if output_attentions:
            raise ValueError("RWKV-7 has no attention weights: leave output_attentions out")
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
        output_attentions: bool | None = None,
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
            output_attentions=output_attentions,
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

"""The configuration of an RWKV-7 model for transformers: its sizes, under the names of flash-linear-attention."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class RWKV7Config(PretrainedConfig):
    """Sizes of an RWKV-7 model.

    hidden_size         C, the width;  head_dim: N, channels of a head;  intermediate_size: width of the feed-forward
    *_low_rank_dim      inner sizes of the low-rank matrices: w decay, a in-context learning rate, v residual, g gate
    norm_eps            of the layer norms;  group_norm_eps: of the norm of the heads (default: head_dim * norm_eps)
    """

    model_type = "rwkv7"
    keys_to_ignore_at_inference = ("past_key_values", "cache")  # the second is its name in later transformers
    attribute_map = {"num_attention_heads": "num_heads"}  # noqa: RUF012 (the attribute that transformers reads)

    def __init__(
        self,
        vocab_size: int = 65536,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        head_dim: int = 64,
        intermediate_size: int | None = None,
        decay_low_rank_dim: int = 64,
        a_low_rank_dim: int = 64,
        v_low_rank_dim: int = 32,
        gate_low_rank_dim: int = 128,
        norm_eps: float = 1e-5,
        group_norm_eps: float | None = None,
        norm_bias: bool = True,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        if hidden_size % head_dim:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of head_dim {head_dim}")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.head_dim = head_dim
        self.num_heads = hidden_size // head_dim
        self.intermediate_size = intermediate_size or 4 * hidden_size
        self.decay_low_rank_dim = decay_low_rank_dim
        self.a_low_rank_dim = a_low_rank_dim
        self.v_low_rank_dim = v_low_rank_dim
        self.gate_low_rank_dim = gate_low_rank_dim
        self.norm_eps = norm_eps
        self.group_norm_eps = head_dim * norm_eps if group_norm_eps is None else group_norm_eps
        self.norm_bias = norm_bias
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        kwargs.pop("num_heads", None)  # follows from the two sizes above
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

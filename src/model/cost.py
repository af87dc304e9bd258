"""Size and compute of an RWKV-7 model, from its configuration alone: formulas, no tensors."""

from __future__ import annotations

from src.config import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """The number of parameters of `RWKV7(config)`, layer 0's unused v0, v1, v2 included.

    With width C, layers L, vocabulary V, hidden width F = dim_ffn and D the sum of the four low-rank sizes:

        2 V C                       embedding and head
        L (14 C + 2 C D + 4 C^2)    time mix
        L (C + 2 C F)               channel mix
        L 4 C + 4 C                 layer norms: ln1 and ln2 of each block, ln0 and ln_out
    """
    width = config.n_embd
    low_rank = config.d_decay_lora + config.d_aaa_lora + config.d_mv_lora + config.d_gate_lora
    # x_r, x_w, x_k, x_v, x_a, x_g; w0, a0, v0; k_k, k_a; r_k ([H, N], so C values); ln_x's weight and bias
    vectors = 6 + 3 + 2 + 1 + 2
    # Each low-rank pair is [C, D] and [D, C]; receptance, key, value and output are [C, C].
    time_mix = vectors * width + 2 * width * low_rank + 4 * width * width
    channel_mix = width + 2 * width * config.dim_ffn
    layer_norms = 4 * width
    ends = 2 * config.vocab_size * width + 4 * width
    return ends + config.n_layer * (time_mix + channel_mix + layer_norms)


def training_flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations of forward and backward for one token: 6 (P - V C) + 24 L C N.

    P is `parameter_count`. Recomputation (`--grad_cp`) isn't counted: this is the numerator of model FLOPs utilization
    (MFU), which asks what the model needs and not what the hardware executes.
    """
    # 2 FLOPs a weight forward (multiply, add), and backward twice that: for the input's and for the weight's gradient.
    # The embedding is a table look-up and costs nothing. Vectors, below 0.1 % of P, are counted as matrices.
    matrix_products = 6 * (parameter_count(config) - config.vocab_size * config.n_embd)
    # A row of S has N numbers, one row per channel. Each takes a multiply and an add in S a, in the two rank-one
    # updates and in S r; the decay's single multiplication is left out. Backward takes twice as much, too.
    recurrence = 3 * 8 * config.n_layer * config.n_embd * config.head_size
    return matrix_products + recurrence

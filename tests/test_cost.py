"""Parameters and FLOPs of a model: equal to what PyTorch counts on the model itself."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from src.model import RWKV7, ModelConfig
from src.model.cost import parameter_count, training_flops_per_token

CONFIGS = {
    "default-sizes": ModelConfig(3, 128, 97),
    "one-layer": ModelConfig(1, 64, 1000),
    "explicit-sizes": ModelConfig(
        2, 96, 50, 32, dim_ffn=100, d_decay_lora=8, d_aaa_lora=16, d_mv_lora=24, d_gate_lora=40
    ),
}
# Explicit, as the default sizes grow with the head size.
LOW_RANK = {"d_decay_lora": 32, "d_aaa_lora": 32, "d_mv_lora": 32, "d_gate_lora": 32}


def model_on_meta(config: ModelConfig) -> RWKV7:
    with torch.device("meta"):
        return RWKV7(config)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameter_count_is_that_of_the_model(config):
    assert parameter_count(config) == sum(parameter.numel() for parameter in model_on_meta(config).parameters())


@pytest.mark.parametrize(
    ("config", "published"),
    [(ModelConfig(8, 512, 6400), 34_158_592), (ModelConfig(12, 768, 65536), 191_084_544)],
    ids=["L8-D512", "L12-D768"],
)
def test_parameter_counts_of_published_models(config, published):
    assert parameter_count(config) == published


def test_matrix_products_are_those_that_pytorch_counts():
    """Apart from the recurrence and the vectors (counted as matrices), within 1 %."""
    config = ModelConfig(4, 256, 1000, kernel="reference")
    model = model_on_meta(config)
    for name in ("v0", "v1", "v2"):
        assert not getattr(model.blocks[0].att, name).requires_grad
    tokens = torch.zeros(1, 16, dtype=torch.int64, device="meta")
    # Only matrix products with weights: the reference recurrence's own products are batched ones.
    with FlopCounterMode(display=False) as counter:
        model(tokens)[0].sum().backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in counted.items() if "bmm" not in str(op)) / 16
    recurrence = 24 * config.n_layer * config.n_embd * config.head_size
    assert training_flops_per_token(config) - recurrence == pytest.approx(products, rel=0.01)


def test_the_recurrence_adds_24_flops_per_state_element():
    narrow, wide = (ModelConfig(2, 256, 100, head_size, **LOW_RANK) for head_size in (32, 64))
    difference = training_flops_per_token(wide) - training_flops_per_token(narrow)
    assert difference == 24 * 2 * 256 * (64 - 32)

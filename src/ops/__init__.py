"""The functions that must be fast: `wkv7`, the loss, products and elementwise work; each has a plain PyTorch form."""

from src.ops.elementwise import relu_squared, time_mix_inputs, time_mix_output, token_shift
from src.ops.loss import cross_entropy_l2wrap, linear_cross_entropy_l2wrap
from src.ops.norm import add_layer_norm
from src.ops.product import linear
from src.ops.recurrence import wkv7
from src.ops.shifted_products import shifted_products

__all__ = [
    "add_layer_norm",
    "cross_entropy_l2wrap",
    "linear",
    "linear_cross_entropy_l2wrap",
    "relu_squared",
    "shifted_products",
    "time_mix_inputs",
    "time_mix_output",
    "token_shift",
    "wkv7",
]

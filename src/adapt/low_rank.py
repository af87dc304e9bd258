"""x W^T + s dropout(x) A^T B^T with few passes over memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from src.adapt.lora import Adapted


def add_low_rank(module: Adapted, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
    """x [rows, in] -> [rows, out], with the module's own x W^T, A [r, in], B [out, r]."""
    dropped = F.dropout(x, dropout, module.training) if dropout else x
    low = F.linear(dropped, a.to(x.dtype))
    # In place of the base's product, which nothing else needs: a sum would take two more passes over [rows, out].
    return module.base_product(x).addmm_(low, b.to(x.dtype).t(), alpha=scale)

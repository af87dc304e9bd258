"""Projectors: from an encoder's width D to the model's C, row by row.

linear   W x
mlp      y + LayerNorm(y),  y = W2 relu(W1 x + b1) + b2                      (WorldRWKV)
gated    LayerNorm(O z),    z = x sigmoid(G x), without biases               (VisualRWKV)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

HIDDEN_FACTOR = 4  # of the mlp, times C


class Linear(nn.Module):
    def __init__(self, width: int, n_embd: int) -> None:
        super().__init__()
        self.output = nn.Linear(width, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[K, D] -> [K, C]."""
        return self.output(x)


class Mlp(nn.Module):
    def __init__(self, width: int, n_embd: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, HIDDEN_FACTOR * n_embd)
        self.output = nn.Linear(HIDDEN_FACTOR * n_embd, n_embd)
        self.norm = nn.LayerNorm(n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """[K, D] -> [K, C]."""
        y = self.output(torch.relu(self.hidden(x)))
        return y + self.norm(y)


class Gated(nn.Module):
    def __init__(self, width: int, n_embd: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, n_embd, bias=False)
        self.norm = nn.LayerNorm(n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """[K, D] -> [K, C]."""
        return self.norm(self.output(x * torch.sigmoid(self.gate(x))))


PROJECTORS: dict[str, type[Linear] | type[Mlp] | type[Gated]] = {"linear": Linear, "mlp": Mlp, "gated": Gated}

"""From hidden states to a loss: the head and cross entropy with L2Wrap, in chunks of rows where memory is short."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from src.ops.loss import cross_entropy_l2wrap, linear_cross_entropy_l2wrap

# Rows of a micro batch in which the largest logit is searched: enough to see logits grow, at a small fraction of a
# step's time.
LARGEST_LOGIT_ROWS = 1024


class HeadLoss(nn.Module):
    """The last step, hidden [B, T, C] to loss, as a module of its own: ZeRO's stage 3 gathers parameters around module
    calls.

    It uses the model's head without owning it, so that the head's weight has one name in the state dict.
    """

    def __init__(self, head: nn.Linear, chunk: int) -> None:
        super().__init__()
        self.head, self.chunk = (head,), chunk  # the tuple keeps nn.Module from registering the head
        self.measures_largest_logit = False  # whether the next call sets `largest_logit`
        self.largest_logit = torch.full((), math.nan)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy over the targets int64 [B, T] that count (>= 0), with the gradient of L2Wrap.

        With `chunk`, at most so many rows of logits exist at a time.
        """
        (head,) = self.head
        if self.measures_largest_logit:
            with torch.no_grad():
                rows = hidden.flatten(0, 1)[:LARGEST_LOGIT_ROWS].split(self.chunk or LARGEST_LOGIT_ROWS)
                self.largest_logit = torch.stack([(part @ head.weight.t()).amax() for part in rows]).amax()
        if self.chunk:
            return linear_cross_entropy_l2wrap(hidden, head.weight, targets, self.chunk)
        return cross_entropy_l2wrap(head(hidden), targets, overwrite=True)

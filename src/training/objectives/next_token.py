"""Cross entropy of the next token with L2Wrap: the objective of pretraining and of supervised fine-tuning."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from src.model import RWKV7
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


class NextToken(nn.Module):
    """(model, batch) -> (loss, metrics): mean cross entropy of the next token, with L2Wrap.

    A batch is (tokens, targets), int64 [B, T] each, or a packed row with (cu_seqlens int32 [D + 1], weight): the bounds
    of its documents, and its weight in the step, since rows hold different numbers of tokens that count.
    """

    def __init__(self, head: nn.Linear, head_chunk: int) -> None:
        super().__init__()
        self.head_loss = HeadLoss(head, head_chunk)

    def forward(self, model: RWKV7, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        _, _, *packed = batch
        loss = self._mean_loss(model, batch)
        if packed:
            loss = loss * packed[1]
        return loss, {"loss": loss.detach()}

    def evaluate(self, model: RWKV7, batch: tuple[Tensor, ...]) -> Tensor:
        """Loss summed over the tokens that count, and their number: float64 [2]."""
        _, targets, *_ = batch
        counted = (targets >= 0).sum().double()
        return torch.stack([self._mean_loss(model, batch).double() * counted, counted])

    def _mean_loss(self, model: RWKV7, batch: tuple[Tensor, ...]) -> Tensor:
        tokens, targets, *packed = batch
        hidden, _ = model.hidden(tokens, cu_seqlens=packed[0] if packed else None)
        return self.head_loss(hidden, targets)

"""Cross entropy of the next token with L2Wrap: the objective of pretraining and of supervised fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from src.model import RWKV7
from src.ops.devices import sum_dtype
from src.training.objectives.objective import Objective


class NextToken(Objective):
    """(model, batch) -> (loss, metrics): mean cross entropy of the next token, with L2Wrap.

    A batch is (tokens, targets), int64 [B, T] each, or a packed row with (cu_seqlens int32 [D + 1], weight): the bounds
    of its documents, and its weight in the step, since rows hold different numbers of tokens that count. For a model
    with a front end the input of that follows, (media, lengths).
    """

    def forward(self, model: RWKV7, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        _, _, *packed = batch
        loss = self._mean_loss(model, batch)
        if packed:
            loss = loss * packed[1]
        return loss, {"loss": loss.detach()}

    def evaluate(self, model: RWKV7, batch: tuple[Tensor, ...]) -> Tensor:
        """Loss summed over the tokens that count, and their number: float64 [2]."""
        _, targets, *_ = batch
        counted = (targets >= 0).sum().to(sum_dtype(targets.device))
        loss = self._mean_loss(model, batch).to(counted) * counted
        if (context := self.segments.context) is not None:  # shared by its processes, over which both are summed
            loss, counted = loss / context.size, counted * (context.rank == 0)
        return torch.stack([loss, counted])

    def _mean_loss(self, model: RWKV7, batch: tuple[Tensor, ...]) -> Tensor:
        embeds = model.media(*batch[-2:]) if model.media is not None else None
        if self.segments.cuts(batch):
            return self.segments.loss(model, self.head_loss, batch, embeds)
        tokens, targets, *packed = batch
        hidden, _ = model.hidden(tokens, cu_seqlens=packed[0] if packed else None, embeds=embeds)
        return self.head_loss(hidden, targets)

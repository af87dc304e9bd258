"""The interface of an objective."""

from __future__ import annotations

from torch import Tensor, nn

from src.model import RWKV7
from src.training.objectives.head_loss import HeadLoss
from src.training.objectives.segments import WHOLE_SAMPLES, Segments


class Objective(nn.Module):
    """What a run minimises: a module that maps (model, batch) to a loss for backward and named metrics for people.

    segments   how samples are cut in pieces
    metrics    holds at least "loss", a scalar without gradient: its mean over micro steps and ranks is reported
    head_loss  the module that turns hidden states into a loss: ZeRO's stage 3 gathers the head's weight around its
               call, and
               the reporter reads the largest logit from it
    """

    head_loss: HeadLoss

    def __init__(self, head: nn.Linear, head_chunk: int, segments: Segments = WHOLE_SAMPLES) -> None:
        super().__init__()
        self.head_loss = HeadLoss(head, head_chunk)
        self.segments = segments

    def forward(self, model: RWKV7, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of a training batch."""
        raise NotImplementedError

    def evaluate(self, model: RWKV7, batch: tuple[Tensor, ...]) -> Tensor:
        """Loss summed over the tokens of a held-out batch that count, and their number: float64 [2]."""
        raise NotImplementedError

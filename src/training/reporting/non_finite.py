"""Counts skipped steps (loss or gradient not finite), and requests a roll-back when too many come in a row."""

from __future__ import annotations

import math

from src.training.console import log
from src.training.control import ROLL_BACK, RunControl
from src.training.optim import LOSS_SCALE_POWER
from src.training.reporting.sink import Sink, StepReport


class NonFiniteMonitor(Sink):
    """Runs on every rank, and all see the same numbers. `failed_steps` is set when `limit` steps in a row were skipped.

    With loss scaling (fp16) an overflow of the gradient alone is how the scale is found. It does not count, unless so
    many follow each other that the scale has reached its minimum.
    """

    def __init__(self, control: RunControl, limit: int, scale_loss: bool) -> None:
        self.control, self.limit, self.scale_loss = control, limit, scale_loss
        self.good = 0  # steps that changed the weights
        self.skipped = 0  # in total
        self.skipped_in_row = 0
        self.failed_steps: range | None = None
        self._first_in_row, self._overflows = 0, 0

    def step(self, report: StepReport) -> None:
        if math.isfinite(report.loss) and math.isfinite(report.grad_norm):
            self.good += 1
            self.skipped_in_row = self._overflows = 0
            return
        # after LOSS_SCALE_POWER halvings the scale is 1: a gradient that still overflows has another cause
        if self.scale_loss and math.isfinite(report.loss) and self._overflows < LOSS_SCALE_POWER:
            self._overflows += 1
            self.skipped_in_row = 0
            return
        if self.skipped_in_row == 0:
            self._first_in_row = report.step
        self.skipped_in_row += 1
        self.skipped += 1
        log(
            f"step {report.step + 1} skipped: loss {report.loss:g}, gradient norm {report.grad_norm:g} "
            f"({self.skipped_in_row} in a row, {self.skipped} in total)"
        )
        if self.skipped_in_row >= self.limit:
            self.failed_steps = range(self._first_in_row, report.step + 1)
            self.control.request(ROLL_BACK)

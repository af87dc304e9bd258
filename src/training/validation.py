"""The loss on held-out data during a run: the same samples each time, shared by the ranks; the best weights are
kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from src.config import VAL_EVERY
from src.ops.devices import sum_dtype
from src.run_folder import VALIDATION
from src.run_log import read_columns
from src.training.checkpoint.results import Results
from src.training.control import ROLL_BACK, STOP, GracefulStop, RunControl, StepCallback
from src.training.data import HeldOut
from src.training.distributed.context_parallel import data_parallel
from src.training.distributed.process_group import PendingFlags, ProcessGroup
from src.training.module import TrainingModule
from src.training.reporting.reporter import Reporter
from src.training.reporting.sink import ValidationReport
from src.training.schedule import RunLength

PURPOSE = "validation"  # of the seconds that a time limit reserves for it


def mean_loss(
    trainer: pl.Trainer,
    module: TrainingModule,
    held_out: HeldOut,
    process_group: ProcessGroup,
    must_stop: Callable[[], bool],
) -> tuple[float, int] | None:
    """Mean loss in nats over the tokens that count, and their number: equal on every rank, and up to rounding for any
    number of them.

    None, on every rank, when one of them `must_stop` between two batches. Leaves weights, gradients and random numbers
    as they are. Every rank takes part.
    """
    sums = torch.zeros(2, dtype=sum_dtype(module.device), device=module.device)
    stop: PendingFlags | None = None
    module.eval()
    try:
        with torch.no_grad():
            shared_by = held_out.config.context_parallel
            ranks = data_parallel(process_group.rank, process_group.world_size, shared_by)
            for batch in held_out.batches(*ranks):
                if stop is not None and any(stop.wait()):
                    return None
                loss_and_count = trainer.strategy.validation_step(tuple(part.to(module.device) for part in batch), 0)
                assert isinstance(loss_and_count, Tensor)
                sums += loss_and_count
                stop = process_group.any_rank([must_stop()])  # read after the next batch, so that ranks don't wait here
        if stop is not None:
            stop.wait()
    finally:
        module.train()
    # float64 sums, so that the mean doesn't depend on how many ranks shared the samples
    if trainer.world_size > 1:
        dist.all_reduce(sums)
    total, counted = sums.tolist()
    return total / counted if counted else math.nan, int(counted)


class Validation(StepCallback):
    """Measures the held-out loss as --val_every says, and keeps the weights of the lowest one as rwkv-best.pth (of
    an adapter, adapter-best).

    `at_start` measures before the first step too. A stop that is requested meanwhile cuts a measurement off, and
    nothing of it is kept; the start that resumes from there makes up for it.
    """

    def __init__(
        self,
        control: RunControl,
        *,
        held_out: HeldOut,
        reporter: Reporter,
        graceful_stop: GracefulStop,
        process_group: ProcessGroup,
        length: RunLength,
        val_every: str,
        proj_dir: Path,
        best_loss: float,
        at_start: bool,
        results: Results,
    ) -> None:
        super().__init__(control)
        self.held_out, self.reporter, self.length, self.proj_dir = held_out, reporter, length, proj_dir
        self.graceful_stop, self.process_group = graceful_stop, process_group
        self.is_due = _schedule(val_every, length)
        self.best_loss, self.at_start, self.results = best_loss, at_start, results
        self._last_seconds = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After on_train_start of all callbacks: signal handlers are installed, so that a stop cuts this measurement
        too."""
        if self.at_start:
            self._measure(trainer, pl_module, self.control.step)

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        if self.is_due(step) and not self.control.is_agreed(STOP, ROLL_BACK):
            self._measure(trainer, pl_module, step + 1)
            trainer.should_stop = trainer.should_stop or self.control.is_agreed(STOP)  # cut off: no further step
        # a stop that is requested during the next step takes effect after it, and may meet the validation of the one
        # that follows
        is_near = any(self.is_due(step + ahead) for ahead in (1, 2, 3))
        self.control.reserved_seconds[PURPOSE] = self._last_seconds if is_near else 0.0

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, steps: int) -> None:
        assert isinstance(pl_module, TrainingModule)
        self.reporter.flush()  # else the step before would be reported after this validation, with its time
        with self.control.paused():
            begin = time.monotonic()
            measured = mean_loss(trainer, pl_module, self.held_out, self.process_group, self._must_stop)
            if measured is None:
                self.control.agree(STOP)
                return
            loss, counted = measured
            self._last_seconds = time.monotonic() - begin
            is_best = loss < self.best_loss  # false for NaN
            report = ValidationReport(steps, self.length.tokens(steps), loss, counted, self._last_seconds, is_best)
            # Before the weights: val.csv must know every loss that rwkv-best.pth ever had, or worse weights would
            # replace it after a power cut.
            self.reporter.report_validation(report)
            if is_best:
                self.best_loss = loss
                self.results.write(pl_module, self.proj_dir / self.results.names.best)

    def _must_stop(self) -> bool:
        return self.graceful_stop.must_stop(excluding=PURPOSE)


def _schedule(val_every: str, length: RunLength) -> Callable[[int], bool]:
    """Whether to measure after a step, in the notation of --val_every; after the last one always."""
    match = VAL_EVERY.fullmatch(val_every)
    assert match is not None, "checked with the flags"
    every, in_steps = int(match[1]), bool(match[2])

    def is_due(step: int) -> bool:
        if step == length.steps - 1 or every == 0:
            return step == length.steps - 1
        if in_steps:
            return (step + 1) % every == 0
        return length.ends_mini_epoch(step) and (length.mini_epoch(step) + 1) % every == 0

    return is_due


def was_omitted(proj_dir: Path, val_every: str, length: RunLength, first_step: int) -> bool:
    """Whether the measurement that is due before `first_step` isn't in val.csv: the run was stopped instead, or resumes
    from weights that were saved before it, or --val_every changed."""
    measured = read_columns(proj_dir / VALIDATION).get("steps", [])
    return first_step > 0 and _schedule(val_every, length)(first_step - 1) and first_step not in measured


def best_loss_before(proj_dir: Path, step: int) -> float:
    """The lowest held-out loss up to and including `step` in val.csv, which holds losses on the same samples only;
    infinite where there is none."""
    columns = read_columns(proj_dir / VALIDATION)
    rows = zip(columns.get("steps", []), columns.get("loss", []), strict=True)
    return min((loss for steps, loss in rows if steps <= step and math.isfinite(loss)), default=math.inf)

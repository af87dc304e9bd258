"""Reads the results of each step once and passes them to every sink.

The values of a step are read one step late, when the device has finished it, so that nothing waits for the device.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from src.training.control import RunControl
from src.training.module import TrainingModule
from src.training.reporting.device_values import PendingValues
from src.training.reporting.sink import (
    UPDATE_GROUPS,
    GeneratedSample,
    MiniEpochReport,
    Sink,
    StepReport,
    ValidationReport,
)
from src.training.reporting.update_ratio import update_ratios
from src.training.schedule import RunLength

SPEED_WINDOW_STEPS = 20  # over which tokens per second are averaged: a single step is too noisy to compare
# Steps between two measurements of the values that take time: update ratios read all weights and moments once.
MEASURE_EVERY_STEPS = 50


class Reporter(pl.Callback):
    """Passes a `StepReport` of each step to every sink, and a `MiniEpochReport` at the end of a mini-epoch.

    `peak_tokens_per_second` is what all devices would reach at their peak FLOP/s (NaN: unknown); `mini_epoch_losses`
    are those of the current mini-epoch before this start.
    """

    def __init__(
        self,
        control: RunControl,
        length: RunLength,
        sinks: list[Sink],
        mini_epoch_losses: list[float],
        peak_tokens_per_second: float = math.nan,
    ) -> None:
        self.control, self.length, self.sinks = control, length, list(sinks)
        self.peak_tokens_per_second = peak_tokens_per_second
        # of the current mini-epoch's steps, as far as they have been read; a saved state keeps them
        self.mini_epoch_losses = list(mini_epoch_losses)
        self._micro_losses: list[Tensor] = []  # of the micro steps of one optimizer step, on the device
        self._pending: _PendingStep | None = None
        self._step_times: deque[float] = deque(maxlen=SPEED_WINDOW_STEPS + 1)
        self._began = 0.0
        self._memory_gib = math.nan

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.monotonic() - self.control.paused_seconds
        self._step_times.append(self._training_seconds())

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        pl_module.objective.head_loss.measures_largest_logit = self._is_measured(self.control.step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        self._micro_losses.append(outputs["metrics"]["loss"])
        if not self.control.step_ended:
            return
        self.flush()
        step = self.control.step - 1
        self._pending = self._start_reading(trainer, pl_module, step)
        if self.length.ends_mini_epoch(step):
            self.flush()  # the mean must be complete before weights or a state of this mini-epoch are saved

    def _start_reading(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> _PendingStep:
        loss = torch.stack(self._micro_losses).mean().float().reshape(1)
        self._micro_losses = []
        if trainer.world_size > 1:
            reduced = trainer.strategy.reduce(loss, reduce_op="mean")
            assert isinstance(reduced, Tensor)
            loss = reduced
        # one tensor, so that a single copy brings all values to the host
        values = [loss, module.grad_norm.to(loss).reshape(1)]
        if math.isnan(self._memory_gib) or self._is_measured(step):
            self._memory_gib = peak_memory_gib(module.device)
        if self._is_measured(step):
            values.append(self._measure(trainer, module).to(loss))
        # the learning rate of the schedule, without the group's own scale
        group = trainer.optimizers[0].param_groups[0]
        return _PendingStep(step, group["lr"] / group["lr_scale"], PendingValues(torch.cat(values)))

    def flush(self) -> None:
        """Read and report the newest step now, waiting for the device if necessary."""
        if self._pending is None:
            return
        step, lr, values = self._pending
        self._pending = None
        loss, grad_norm, *measured = values.read()
        self._step_times.append(self._training_seconds())
        # not 0, where the clock is too coarse for a step
        elapsed = max(1e-9, self._step_times[-1] - self._step_times[0])
        tokens_per_second = (len(self._step_times) - 1) * self.length.tokens_per_step / elapsed
        report = StepReport(
            step=step,
            tokens=self.length.tokens(step + 1),
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_second=tokens_per_second,
            seconds=self._step_times[-1],
            memory_gib=self._memory_gib,
            mfu=tokens_per_second / self.peak_tokens_per_second,
            largest_logit=measured[0] if measured else math.nan,
            update_ratios=dict(zip(UPDATE_GROUPS, measured[1:], strict=True)) if measured else {},
        )
        if math.isfinite(loss):  # a skipped step does not count in the mean
            self.mini_epoch_losses.append(loss)
        for sink in self.sinks:
            sink.step(report)
        if self.length.ends_mini_epoch(step):
            self._report_mini_epoch(report)

    def _report_mini_epoch(self, last: StepReport) -> None:
        losses, self.mini_epoch_losses = self.mini_epoch_losses, []
        mean = sum(losses) / len(losses) if losses else math.nan
        report = MiniEpochReport(self.length.mini_epoch(last.step), mean, last)
        for sink in self.sinks:
            sink.mini_epoch(report)

    def sync(self) -> dict[str, list[str]]:
        """Report what is pending and bring the logs to the disk; returns the lines of theirs that a state keeps."""
        self.flush()
        lines: dict[str, list[str]] = {}
        for sink in self.sinks:
            sink.sync()
            lines |= sink.lines_for_state()
        return lines

    def report_validation(self, report: ValidationReport) -> None:
        for sink in self.sinks:
            sink.validation(report)

    def report_samples(self, samples: list[GeneratedSample]) -> None:
        for sink in self.sinks:
            sink.samples(samples)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.flush()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close_sinks()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close_sinks()

    def _close_sinks(self) -> None:
        # From the last: the progress bar is opened last and closed first, since loggers print. Popped, because
        # Lightning calls both on_exception and teardown.
        while self.sinks:
            self.sinks.pop().close()

    def _training_seconds(self) -> float:
        return time.monotonic() - self.control.paused_seconds - self._began

    @staticmethod
    def _is_measured(step: int) -> bool:
        return step % MEASURE_EVERY_STEPS == 0

    def _measure(self, trainer: pl.Trainer, module: TrainingModule) -> Tensor:
        """(largest logit, update ratio of each group) of this step, on the device."""
        largest = module.objective.head_loss.largest_logit.float().reshape(1)
        if trainer.world_size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return torch.cat([largest, update_ratios(module.optimizer).to(largest)])


class _PendingStep(NamedTuple):
    """A step whose values are being copied to the host: loss, gradient norm, and at some steps those of `_measure`."""

    step: int
    lr: float
    values: PendingValues


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far, in GiB: reserved on its device, else resident; NaN on Windows without one."""
    module: Any = None if device.type == "cpu" else torch.get_device_module(device)
    if hasattr(module, "max_memory_reserved"):  # mps has no such counter, and shares the machine's memory
        return float(module.max_memory_reserved(device)) / 2**30
    if sys.platform == "win32":
        return math.nan
    import resource  # does not exist on Windows

    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum / 2**30 if sys.platform == "darwin" else maximum / 2**20  # bytes on macOS, else KiB

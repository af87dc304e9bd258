"""What happens around the steps of a fit: small classes, one duty each."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl

from src.model.weights import save_weights
from src.run_folder import FINAL, numbered_weights
from src.training.checkpoint.state import gather_full_state, gather_weights, scatter_full_state
from src.training.checkpoint.storage import LoadedState, Position, StateWriter
from src.training.console import log
from src.training.module import TrainingModule
from src.training.optim import LOSS_SCALE_POWER
from src.training.reporting.reporter import Reporter
from src.training.reporting.sink import Sink, StepReport
from src.training.schedule import RunLength

TIME_LIMIT_MARGIN = (
    30.0  # seconds kept for the last save, beyond twice what the slowest one took: another may be under way
)

SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


class SetLearningRate(pl.Callback):
    """Before each step, every group's lr = learning_rate_at(step) * its lr_scale."""

    def __init__(self, learning_rate_at: Callable[[int], float], first_step: int) -> None:
        self.learning_rate_at, self.first_step = learning_rate_at, first_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        lr = self.learning_rate_at(self.first_step + trainer.global_step)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = lr * group["lr_scale"]


class AfterStep(pl.Callback):
    """For duties after an optimizer step: hides the micro steps between."""

    def __init__(self, first_step: int) -> None:
        self.first_step, self._seen = first_step, 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._seen:
            self._seen = trainer.global_step
            assert isinstance(pl_module, TrainingModule)
            self.after_step(trainer, pl_module, self.first_step + trainer.global_step - 1)

    def after_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        raise NotImplementedError


class SaveWeights(AfterStep):
    """rwkv-N.pth after mini-epochs with N mod epoch_save = 0 and the last; rwkv-final.pth after the last step."""

    def __init__(self, length: RunLength, first_step: int, epoch_save: int, proj_dir: Path) -> None:
        super().__init__(first_step)
        self.length, self.epoch_save, self.proj_dir = length, epoch_save, proj_dir

    def saves_at(self, step: int) -> bool:
        last = step == self.length.steps - 1
        return last or (self.length.ends_mini_epoch(step) and self.length.mini_epoch(step) % self.epoch_save == 0)

    def after_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if self.saves_at(step):
            write_weights(trainer, module, self.proj_dir / f"rwkv-{self.length.mini_epoch(step)}.pth")


def write_weights(trainer: pl.Trainer, module: TrainingModule, path: Path) -> None:
    """The model's plain weights. Every rank takes part: under ZeRO's stage 3 each has a part of them."""
    weights = gather_weights(module.model, trainer.global_rank)
    if weights is not None:
        save_weights(weights, path)


class RestoreState(pl.Callback):
    """The full state that a run goes on from: masters, moments and counters."""

    def __init__(self, loaded: LoadedState) -> None:
        self.loaded = loaded

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        counters = self.loaded.counters
        if self.loaded.settings.get("precision") != "fp16":  # its scale of 1 would lose small gradients in fp16
            counters = {name: value for name, value in counters.items() if name not in ("loss_scale", "good_steps")}
        scatter_full_state(trainer, pl_module, self.loaded.tensors(), counters)


class CheckpointCallback(AfterStep):
    """The full state of the run, saved when the clock, a mini-epoch's weights or a stop asks for it.

    rwkv-final.pth comes after the last state, so that a run that is complete is complete in every part.
    """

    def __init__(
        self,
        *,
        writer: StateWriter,
        position: Position,
        length: RunLength,
        reporter: Reporter,
        weights: SaveWeights,
        bad_steps: NonFiniteMonitor,
        settings: dict[str, Any],
        save_minutes: float,
    ) -> None:
        super().__init__(position.step)
        self.writer, self.position, self.length = writer, position, length
        self.reporter, self.weights, self.bad_steps, self.settings = reporter, weights, bad_steps, settings
        self.save_seconds = save_minutes * 60
        self.saved_at = time.monotonic()

    def due(self) -> bool:
        """A wish for the Reporter: has the clock run out on this rank?"""
        return self.save_seconds > 0 and time.monotonic() - self.saved_at >= self.save_seconds

    def after_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        self.writer.check()
        agreed = self.reporter.agreed
        if not ("save" in agreed or "stop" in agreed or self.weights.saves_at(step)):
            return
        self.reporter.read_waiting()
        # A state among bad steps has passed samples that a return would leave out; only a stop can't wait for a better one.
        if "stop" in agreed or not self.bad_steps.in_row:
            self._save(trainer, module, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.writer.wait()
        if self.first_step + trainer.global_step >= self.length.steps and self.bad_steps.too_many is None:
            assert isinstance(pl_module, TrainingModule)
            write_weights(trainer, pl_module, self.weights.proj_dir / FINAL)

    def _save(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        now = Position(
            step=step + 1,
            samples=self.length.samples(step + 1),
            unit=self.length.unit,
            restarted_at_sample=self.position.restarted_at_sample,
            mini_epoch_losses=list(self.reporter.mini_epoch_losses),
            skipped_samples=self.position.skipped_samples,
            weights_written=bool(numbered_weights(self.weights.proj_dir)),
        )
        parameters = gather_full_state(trainer, module)
        tensors = ((f"{name}/{kind}", tensor) for name, kinds in parameters for kind, tensor in kinds.items())
        if trainer.is_global_zero:
            self.writer.write(now, self.settings, module.optimizer.counters(), tensors)
        else:
            for _ in tensors:  # every rank takes part in gathering
                pass
        self.saved_at = time.monotonic()


class GracefulStop(AfterStep):
    """Ctrl-C, SIGTERM, a terminal that is gone and the time limit end the run after the step under way, with its state saved; a second
    Ctrl-C at once."""

    def __init__(self, first_step: int, ends_at: float) -> None:
        """`ends_at` by time.monotonic(): when the process has to be gone; infinity without a limit."""
        super().__init__(first_step)
        self.received = 0  # the signal
        self.out_of_time = False
        self.seconds_coming: Callable[[], float] = lambda: 0.0  # of what is due before the next chance to stop
        self._ends_at = ends_at
        self._longest_step, self._step_began = 0.0, math.inf
        self._before: dict[int, Any] = {}
        self.reporter: Reporter
        self.keeper: CheckpointCallback

    def wish(self) -> bool:
        """A wish for the Reporter: does this rank have to stop?"""
        return self._has_to_stop(self.seconds_coming())

    def wish_now(self) -> bool:
        """The same in the middle of what `seconds_coming` told of."""
        return self._has_to_stop(0.0)

    def _has_to_stop(self, seconds_coming: float) -> bool:
        needed = TIME_LIMIT_MARGIN + 2 * self._longest_step + 2 * self.keeper.writer.slowest + seconds_coming
        self.out_of_time = time.monotonic() + needed >= self._ends_at
        return bool(self.received) or self.out_of_time

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # not earlier: Lightning installs a SIGTERM handler of its own, which would end the run without a word
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:  # nohup has SIGHUP ignored
                self._before[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    def after_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        now = time.monotonic() - self.reporter.paused
        self._longest_step = max(self._longest_step, now - self._step_began)
        self._step_began = now
        if "stop" in self.reporter.agreed or "rollback" in self.reporter.agreed:
            trainer.should_stop = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._receive:  # Lightning, whose turn comes first, has put SIGTERM's back
                signal.signal(number, handler)
        self._before = {}


class NonFiniteMonitor(Sink):
    """A sink that counts steps left out because their loss or gradient was not finite; `too_many` is set when to go back.

    With loss scaling (fp16) an overflow of the gradient alone is how the scale is found, and doesn't count, unless so many come in a row
    that the scale has nowhere to go.
    """

    def __init__(self, limit: int, scale_loss: bool) -> None:
        self.limit, self.scale_loss = limit, scale_loss
        self.good, self.total, self.first_in_row, self.in_row, self.overflows = 0, 0, 0, 0, 0
        self.too_many: range | None = None  # the steps in a row that were too many

    def step(self, report: StepReport) -> None:
        if math.isfinite(report.loss) and math.isfinite(report.grad_norm):
            self.good += 1
            self.in_row = self.overflows = 0
            return
        if self.scale_loss and math.isfinite(report.loss) and self.overflows < LOSS_SCALE_POWER:
            self.overflows += 1
            self.in_row = 0
            return
        self.first_in_row = report.step if self.in_row == 0 else self.first_in_row
        self.in_row += 1
        self.total += 1
        log(
            f"step {report.step + 1}: loss {report.loss:g}, gradient norm {report.grad_norm:g}: the step was left out "
            f"({self.in_row} in a row, {self.total} in all)"
        )
        if self.in_row >= self.limit:
            self.too_many = range(self.first_in_row, report.step + 1)

    def wish(self) -> bool:
        """A wish for the Reporter: is it time to go back to the last good state?"""
        return self.too_many is not None

"""What happens around the steps of a fit: small classes, one duty each."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl

from src.training.checkpoint import FINAL, save_weights
from src.training.module import TrainingModule
from src.training.schedule import RunLength


class SetLearningRate(pl.Callback):
    """Before each step, every group's lr = learning_rate(step) * its lr_scale."""

    def __init__(self, learning_rate_at: Callable[[int], float], first_step: int) -> None:
        self.learning_rate_at, self.first_step = learning_rate_at, first_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        lr = self.learning_rate_at(self.first_step + trainer.global_step)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = lr * group["lr_scale"]


class SaveWeights(pl.Callback):
    """rwkv-N.pth after mini-epochs with N mod epoch_save = 0 and the last; rwkv-final.pth after the last step."""

    def __init__(self, length: RunLength, first_step: int, epoch_save: int, proj_dir: Path) -> None:
        self.length, self.first_step, self.epoch_save, self.proj_dir = length, first_step, epoch_save, proj_dir
        self._seen = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._seen or not trainer.is_global_zero:
            return  # a micro step, or another rank's duty
        self._seen = trainer.global_step
        step = self.first_step + trainer.global_step - 1
        if not self.length.ends_mini_epoch(step):
            return
        assert isinstance(pl_module, TrainingModule)
        mini_epoch, last = self.length.mini_epoch(step), step == self.length.steps - 1
        if last or mini_epoch % self.epoch_save == 0:
            save_weights(pl_module.model, self.proj_dir / f"rwkv-{mini_epoch}.pth")
        if last:
            save_weights(pl_module.model, self.proj_dir / FINAL)


class StopOnSignal(pl.Callback):
    """Ctrl-C and SIGTERM end the run cleanly after the step that is under way; a second one at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.received:
            trainer.should_stop = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

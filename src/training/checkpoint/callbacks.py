"""When weights and full states are written and restored."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from src.model.weights import save_weights
from src.run_folder import numbered_results, replace_drawn_init
from src.training.checkpoint.results import Results
from src.training.checkpoint.state import (
    Position,
    SavedState,
    gather_full_state,
    gather_weights,
    scatter_full_state,
)
from src.training.checkpoint.storage import StateReader, StateWriter
from src.training.console import is_rank_zero
from src.training.control import SAVE, STOP, RunControl, StepCallback
from src.training.module import TrainingModule
from src.training.reporting.non_finite import NonFiniteMonitor
from src.training.reporting.reporter import Reporter
from src.training.schedule import RunLength


class SaveWeights(StepCallback):
    """rwkv-N.pth (of an adapter, adapter-N) after mini-epochs with N mod epoch_save = 0, after the last whole
    mini-epoch of a pass over the data (N = prime // mini_epoch_samples - 1), and after the last step."""

    def __init__(
        self,
        control: RunControl,
        length: RunLength,
        epoch_save: int,
        proj_dir: Path,
        prime: int = 0,
        results: Results | None = None,
    ) -> None:
        """`prime` is the number of samples of a pass; 0 where the order has no magic prime (conversations). `results`:
        None for plain weights."""
        super().__init__(control)
        self.results = results or Results()
        self.length, self.epoch_save, self.proj_dir = length, epoch_save, proj_dir
        # The official trainer counts magic_prime // 40320 mini-epochs and saves the last of them. -1 is no mini-epoch.
        self.last_whole = prime // length.mini_epoch_samples - 1

    def saves_at(self, step: int) -> bool:
        if step == self.length.steps - 1:
            return True
        mini_epoch = self.length.mini_epoch(step)
        # N = 0 is included: as in the official trainer, and the first weights show early whether a run is set up well
        is_due = mini_epoch % self.epoch_save == 0 or mini_epoch == self.last_whole
        return is_due and self.length.ends_mini_epoch(step)

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        if self.saves_at(step):
            self.write(pl_module, self.results.names.numbered(self.length.mini_epoch(step)))

    def write(self, pl_module: pl.LightningModule, name: str) -> None:
        """What the run trains, under a name in its folder. Every rank takes part."""
        assert isinstance(pl_module, TrainingModule)
        self.results.write(pl_module, self.proj_dir / name)


class SaveInitialWeights(pl.Callback):
    """rwkv-init.pth, before the first step of a run whose initial weights are drawn (stage 0 without --load_model).

    As the official trainer does. The file holds the values that training begins with, bit for bit, so it is in the
    run's precision. A file that this run did not write is never replaced.
    """

    def __init__(self, proj_dir: Path) -> None:
        self.proj_dir = proj_dir

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # From the model rather than drawn a second time: orthogonal matrices take minutes for a large model. Not
        # earlier, since a model that ZeRO's stage 3 partitions has no values before.
        assert isinstance(pl_module, TrainingModule)
        weights = gather_weights(pl_module.model)
        if weights is not None:
            replace_drawn_init(self.proj_dir, lambda path: save_weights(weights, path))


class RestoreState(pl.Callback):
    """Loads the full state that a run resumes from: masters, moments and counters, in one pass over its files.

    At the start of training, since the optimizer and ZeRO's partitions don't exist before. Raises DamagedStateError.
    """

    def __init__(self, state: SavedState, reader: StateReader | None) -> None:
        """`reader` on rank 0; the others get the tensors from there."""
        self.state, self.reader = state, reader

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        counters = self.state.counters
        if self.state.settings.get("precision") != "fp16":  # a scale of 1 would lose small gradients in fp16
            counters = {name: value for name, value in counters.items() if name not in ("loss_scale", "good_steps")}
        shards = self.reader.shards() if self.reader is not None else ()
        scatter_full_state(trainer, pl_module, shards, counters)


class CheckpointCallback(StepCallback):
    """Saves the full state when the clock, a mini-epoch's weights or a stop asks for it.

    rwkv-final.pth (adapter, state.pth) is written after the last state is on the disk: a folder that has it is complete
    in every part.
    """

    def __init__(
        self,
        control: RunControl,
        *,
        writer: StateWriter,
        position: Position,
        length: RunLength,
        reporter: Reporter,
        weights: SaveWeights,
        non_finite: NonFiniteMonitor,
        settings: dict[str, Any],
        save_minutes: float,
    ) -> None:
        super().__init__(control)
        self.writer, self.position, self.length = writer, position, length
        self.reporter, self.weights, self.non_finite, self.settings = reporter, weights, non_finite, settings
        self.save_seconds = save_minutes * 60
        self._saved_at = time.monotonic()
        self._reserve_time()

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        self.writer.check()  # a save that failed in the background fails the run at the next step
        self._reserve_time()
        if self.control.is_agreed(SAVE, STOP) or self.weights.saves_at(step):
            self.reporter.flush()  # the losses and skipped steps up to this step belong to the state
            # A state among skipped steps has passed samples that a roll-back would leave out; only a stop can't wait
            # for a better one.
            if self.control.is_agreed(STOP) or not self.non_finite.skipped_in_row:
                self._save(pl_module)
        elif self.save_seconds > 0 and time.monotonic() - self._saved_at >= self.save_seconds:
            self.control.request(SAVE)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.writer.wait()  # raises the error of the last save: no rwkv-final.pth then
        if self.control.step >= self.length.steps and self.non_finite.failed_steps is None:
            self.weights.write(pl_module, self.weights.results.names.final)

    def _save(self, module: pl.LightningModule) -> None:
        assert isinstance(module, TrainingModule)
        step = self.control.step
        position = Position(
            step=step,
            samples=self.length.samples(step),
            mini_epoch_samples=self.length.mini_epoch_samples,
            restarted_at_sample=self.position.restarted_at_sample,
            mini_epoch_losses=list(self.reporter.mini_epoch_losses),
            skipped_samples=self.position.skipped_samples,
            weights_written=bool(
                numbered_results(self.weights.proj_dir, self.weights.results.names)
            ),  # see find_resume_point
        )
        state = SavedState(position, self.settings, module.optimizer.counters(), time.time())
        tensors = gather_full_state(module)
        if is_rank_zero():
            self.writer.write(step, state.payload(), tensors)
        else:
            for _ in tensors:  # gathering is collective
                pass
        self._saved_at = time.monotonic()

    def _reserve_time(self) -> None:
        # Twice: the save of the stop may have to wait for one that is under way. Only rank 0 writes and has measured
        # it; its request stops all.
        if is_rank_zero():
            self.control.reserved_seconds["save"] = 2 * self.writer.slowest_seconds

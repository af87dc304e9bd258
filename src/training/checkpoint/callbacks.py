"""When weights and full states are written and restored."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from src.model.weights import IDLE_IN_LAYER_0, Weights, save_weights
from src.run_folder import FINAL, numbered_results, replace_drawn_init
from src.training.checkpoint.gather import gather_weights
from src.training.checkpoint.parts import Part, own_parts, owners, state_parts
from src.training.checkpoint.reader import StateReader
from src.training.checkpoint.restore import load_full_state
from src.training.checkpoint.results import Results
from src.training.checkpoint.state import Position, SavedState
from src.training.checkpoint.storage import StateWriter
from src.training.console import log
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
        non_finite: NonFiniteMonitor,
        prime: int = 0,
        results: Results | None = None,
    ) -> None:
        """`prime` is the number of samples of a pass; 0 where the order has no magic prime (conversations). `results`:
        None for plain weights."""
        super().__init__(control)
        self.results = results or Results()
        self.ensure_state: Callable[[pl.LightningModule], None] = lambda module: None  # CheckpointCallback sets it
        self.length, self.epoch_save, self.proj_dir = length, epoch_save, proj_dir
        self.non_finite = non_finite
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
        if not self.saves_at(step):
            return
        name = self.results.names.numbered(self.length.mini_epoch(step))
        # A run that goes back to the newest weights must not find those that the skipped steps began from, or that are
        # the cause of them. All ranks see the same numbers.
        if self.non_finite.skipped_in_row:
            log(f"note: {name} is not written, since the last {self.non_finite.skipped_in_row} steps were skipped")
            return
        assert isinstance(pl_module, TrainingModule)
        # Weights without any full state can only be continued with a fresh optimizer, and an adapter not at all.
        self.ensure_state(pl_module)
        self.results.write(pl_module, self.proj_dir / name)


def refuse_unusable(weights: Weights, counters: dict[str, float], restarted_at_sample: int, final: str = FINAL) -> None:
    """Raises FloatingPointError for the weights at the end of a run that never took a step, or that are not finite."""
    # Adam's count is that of the whole run, unless it began anew on trained weights.
    is_untrained = counters["adam_steps"] == 0 and restarted_at_sample == 0
    non_finite = [
        name
        for name, tensor in weights.items()
        if name not in IDLE_IN_LAYER_0 and not all(bool(bound.isfinite()) for bound in tensor.aminmax())
    ]
    if is_untrained or non_finite:
        what = f"{non_finite[0]} is not finite" if non_finite else "no step had a finite loss and gradient"
        raise FloatingPointError(
            f"the run ends without usable weights: {what}, so {final} is not written. Start again with --restart 1 and "
            "a lower --lr_init, or use --precision fp32 to find the cause"
        )


class SaveInitialWeights(pl.Callback):
    """rwkv-init.pth, before the first step of a run whose initial weights are drawn (stage 0 without --load_model).

    As the official trainer does. The file holds the values that training begins with, bit for bit, so it is in the
    run's precision. A file that this run did not write is never replaced.
    """

    def __init__(self, proj_dir: Path, check_folder: Callable[[], None] = lambda: None) -> None:
        self.proj_dir, self.check_folder = proj_dir, check_folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # From the model rather than drawn a second time: orthogonal matrices take minutes for a large model. Not
        # earlier, since a model that ZeRO's stage 3 partitions has no values before.
        assert isinstance(pl_module, TrainingModule)
        weights = gather_weights(pl_module.model, self.proj_dir)
        if weights is not None:
            self.check_folder()
            replace_drawn_init(self.proj_dir, lambda path: save_weights(weights, path))


class RestoreState(pl.Callback):
    """Loads the full state that a run resumes from: masters, moments and counters, in one pass over its files.

    At the start of training, since the optimizer and ZeRO's partitions don't exist before. Raises DamagedStateError.
    """

    def __init__(self, state: SavedState, reader: StateReader) -> None:
        self.state, self.reader = state, reader

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        counters = self.state.counters
        if self.state.settings.get("precision") != "fp16":  # a scale of 1 would lose small gradients in fp16
            counters = {name: value for name, value in counters.items() if name not in ("loss_scale", "good_steps")}
        load_full_state(pl_module, self.reader, counters)


class CheckpointCallback(StepCallback):
    """Saves the full state when the clock, a mini-epoch's weights or a stop asks for it, and one step before the first
    numbered weights of a run that has no state yet.

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
        has_state: bool = False,
    ) -> None:
        """`has_state`: the run resumes from a full state."""
        super().__init__(control)
        self._has_state = has_state
        weights.ensure_state = self.ensure_state
        self.writer, self.position, self.length = writer, position, length
        self.reporter, self.weights, self.non_finite, self.settings = reporter, weights, non_finite, settings
        self.save_seconds = save_minutes * 60
        self._saved_at = time.monotonic()
        self._owner: dict[str, int] | None = None
        self._reserve_time()

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        self.writer.check()  # a save that failed in the background fails the run at the next step
        if self._owner is None:  # the moments exist since this step
            self.writer.prepare(self._own_parts(pl_module))
        self._reserve_time()
        # A run that dies while it writes its first weights then takes their step again, with its validation.
        is_first = not self._has_state and self.weights.saves_at(step + 1)
        if self.control.is_agreed(SAVE, STOP) or self.weights.saves_at(step) or is_first:
            self.reporter.flush()  # the skipped steps up to this one are known then
            # A state among skipped steps has passed samples that a roll-back would leave out; only a stop can't wait
            # for a better one.
            if self.control.is_agreed(STOP) or not self.non_finite.skipped_in_row:
                self._save(pl_module)
        elif self.save_seconds > 0 and time.monotonic() - self._saved_at >= self.save_seconds:
            self.control.request(SAVE)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.writer.close()  # raises the error of the last save: no rwkv-final.pth then
        if self.control.step >= self.length.steps and self.non_finite.failed_steps is None:
            assert isinstance(pl_module, TrainingModule)
            results, counters = self.weights.results, pl_module.optimizer.counters()
            final, restarted_at_sample = results.names.final, self.position.restarted_at_sample
            results.write(
                pl_module,
                self.weights.proj_dir / final,
                accept=lambda tensors: refuse_unusable(tensors, counters, restarted_at_sample, final),
            )

    def ensure_state(self, module: pl.LightningModule) -> None:
        """Returns once a full state of this run is on the disk: an earlier one, or else one of this step."""
        if not self._has_state:  # the step before was skipped, or there was none
            self.reporter.flush()
            self._save(module)
        self.writer.wait()

    def save_between_steps(self, module: pl.LightningModule) -> None:
        """Save the full state of the last complete step, and wait for it: where no further step is possible."""
        self._save(module)
        self.writer.wait()

    def _save(self, module: pl.LightningModule) -> None:
        assert isinstance(module, TrainingModule)
        step, logs = self.control.step, self.reporter.sync()
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
        state = SavedState(position, self.settings, module.optimizer.counters(), time.time(), logs)
        self.writer.write(step, state.payload(), self._own_parts(module))
        self._has_state = True
        self._saved_at = time.monotonic()

    def _own_parts(self, module: pl.LightningModule) -> list[Part]:
        """What this rank writes."""
        parts, group = state_parts(module), self.writer.group
        if self._owner is None:  # the same at every save
            self._owner = owners(parts, group.world_size)
        return own_parts(parts, self._owner, group.rank)

    def _reserve_time(self) -> None:
        # Twice: the save of the stop may have to wait for one that is under way.
        self.control.reserved_seconds["save"] = 2 * self.writer.slowest_seconds

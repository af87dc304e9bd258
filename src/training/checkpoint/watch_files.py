"""Watches the files that a run depends on: its folder, which may be moved, and its data, which may be changed."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl

from src.dataset.watched_file import DataFileError
from src.training.console import log_error
from src.training.control import STOP, RunControl
from src.training.data import HeldOut, Samples


class WatchFiles(pl.Callback):
    """Stops the run with its state saved when its data changes, and at once when its folder is no longer its own.

    The first callback: what it finds after a step takes effect before anything else of that step is written, and with
    one process before the next batch is read. A change between that and the read raises DataFileError in the data
    loader; with one process the state is saved then, too.
    """

    def __init__(
        self,
        control: RunControl,
        samples: Samples,
        held_out: HeldOut | None,
        check_folder: Callable[[], None],
        save: Callable[[pl.LightningModule], None],
    ) -> None:
        """`save` saves the full state and waits for it."""
        self.control, self.samples, self.held_out = control, samples, held_out
        self.check_folder, self.save = check_folder, save
        self.data_error: DataFileError | None = None
        self._saved_at_step = control.step  # a start has nothing new to save

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self.check_folder()
        self.check_data()

    def check_data(self) -> None:
        """Request a stop where a file of the data is not the one that was opened; a few microseconds each time."""
        if self.data_error is not None:
            return
        try:
            self.samples.check_unchanged()
            if self.held_out is not None:
                self.held_out.check_unchanged()
        except DataFileError as error:
            self.data_error = error
            self.control.request(STOP)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # With several processes the others are in the middle of a step, and saving is collective.
        if not isinstance(exception, DataFileError) or trainer.world_size > 1:
            return
        if self.control.step > self._saved_at_step:
            try:
                self.save(pl_module)
            except Exception as error:  # the error of the data stays the one that is raised
                log_error(f"the state could not be saved: {error}")

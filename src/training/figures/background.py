"""Draws loss.png while a run goes on, in a thread beside it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytorch_lightning as pl

from src.run_folder import FIGURE
from src.training.checkpoint.callbacks import AfterStep
from src.training.console import warn_on_error
from src.training.module import TrainingModule
from src.training.plot import loss_picture
from src.training.schedule import RunLength

DRAW_SECONDS = 60.0  # between two drawings at least
TIME_SHARE = 0.004  # of the run that drawing may take: it takes about half a second of one core, more of a long run


class DrawPictures(AfterStep):
    """At a mini-epoch's end, on rank 0, as DRAW_SECONDS and TIME_SHARE allow. The run draws the last one when all is done."""

    def __init__(self, length: RunLength, first_step: int, proj_dir: Path) -> None:
        super().__init__(first_step)
        self.length, self.proj_dir = length, proj_dir
        self._thread: threading.Thread | None = None
        self._drawn_at, self._took = time.monotonic(), 0.0

    def after_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        last = step == self.length.steps - 1
        if not trainer.is_global_zero or last or not self.length.ends_mini_epoch(step):
            return
        pause = max(DRAW_SECONDS, self._took / TIME_SHARE)
        if time.monotonic() - self._drawn_at > pause and (self._thread is None or not self._thread.is_alive()):
            self._drawn_at = time.monotonic()
            self._thread = threading.Thread(target=self._draw, daemon=True, name="pictures")
            self._thread.start()

    def _draw(self) -> None:
        begin = time.thread_time()
        with warn_on_error(FIGURE):
            loss_picture(self.proj_dir, self.proj_dir / FIGURE)
        self._took = time.thread_time() - begin

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._thread is not None:
            self._thread.join()

"""Draws loss.png while a run goes on, in a thread."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytorch_lightning as pl

from src.run_folder import FIGURE
from src.training.console import is_rank_zero, warn_on_error
from src.training.control import RunControl, StepCallback
from src.training.plot import loss_picture
from src.training.schedule import RunLength

DRAW_SECONDS = 60.0  # between two figures at least
# Of the run's time that drawing may take: one figure takes about half a second of a core, more in a long run.
TIME_SHARE = 0.004


class BackgroundFigure(StepCallback):
    """At a mini-epoch's end, on rank 0, as DRAW_SECONDS and TIME_SHARE allow. The last figure is drawn when the run has ended."""

    def __init__(self, control: RunControl, length: RunLength, proj_dir: Path) -> None:
        super().__init__(control)
        self.length, self.proj_dir = length, proj_dir
        self._thread: threading.Thread | None = None
        self._drawn_at, self._drawing_seconds = time.monotonic(), 0.0

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        is_last = step == self.length.steps - 1
        if not is_rank_zero() or is_last or not self.length.ends_mini_epoch(step):
            return
        pause = max(DRAW_SECONDS, self._drawing_seconds / TIME_SHARE)
        if time.monotonic() - self._drawn_at > pause and (self._thread is None or not self._thread.is_alive()):
            self._drawn_at = time.monotonic()
            self._thread = threading.Thread(target=self._draw, daemon=True, name="figure")
            self._thread.start()

    def _draw(self) -> None:
        begin = time.thread_time()
        with warn_on_error(FIGURE):
            loss_picture(self.proj_dir, self.proj_dir / FIGURE)
        self._drawing_seconds = time.thread_time() - begin

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._thread is not None:
            self._thread.join()

"""A callback that draws loss.png during a run, in a background thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl

from src.run_folder import FIGURE
from src.training.console import is_rank_zero, warn_on_error
from src.training.control import RunControl, StepCallback
from src.training.figures.loss_figure import write_loss_figure
from src.training.schedule import RunLength

# The least time between two figures. A small model finishes a mini-epoch in seconds, and nobody looks that often.
DRAW_SECONDS = 60.0
# The largest share of the training time that drawing may take. A figure takes half a second of one core and more in a
# long run, whose logs are longer; on a CPU this core is missing from training.
TIME_SHARE = 0.004


class LossFigureCallback(StepCallback):
    """Starts a drawing at the end of a mini-epoch, on rank 0, as often as DRAW_SECONDS and TIME_SHARE allow.

    The figure of the complete run is drawn by the caller, after the last logs are written.
    """

    def __init__(
        self,
        control: RunControl,
        length: RunLength,
        proj_dir: Path,
        check_folder: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(control)
        self.length, self.proj_dir, self.check_folder = length, proj_dir, check_folder
        self._thread: threading.Thread | None = None
        self._last_start, self._last_duration = time.monotonic(), 0.0

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        is_last = step == self.length.steps - 1
        if not is_rank_zero() or is_last or not self.length.ends_mini_epoch(step):
            return
        pause = max(DRAW_SECONDS, self._last_duration / TIME_SHARE)
        is_drawing = self._thread is not None and self._thread.is_alive()
        if time.monotonic() - self._last_start > pause and not is_drawing:
            self._last_start = time.monotonic()
            # A daemon: a run that fails must not wait for its figure.
            self._thread = threading.Thread(target=self._draw, daemon=True, name="loss-figure")
            self._thread.start()

    def _draw(self) -> None:
        # The time of this thread alone: while training uses all cores, the clock on the wall would count its work too.
        start = time.thread_time()
        with warn_on_error(FIGURE):
            self.check_folder()
            write_loss_figure(self.proj_dir, self.proj_dir / FIGURE)
        self._last_duration = time.thread_time() - start

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # The caller writes the same file next: two threads must not draw at once.
        if self._thread is not None:
            self._thread.join()

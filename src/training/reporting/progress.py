"""The live line of a run; a plain line now and then where the output is no terminal."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time

from tqdm import tqdm

from src.training.reporting.sink import MiniEpochReport, Sink, StepReport, ValidationReport
from src.training.schedule import RunLength

PLAIN_LINE_SECONDS = 20.0  # between two lines when the output is not a terminal
SMOOTHING = 0.95  # of the loss that the line shows
BAR = "{percentage:3.0f}% |{bar:12}| {desc}"
BAR_WIDTH = len("100% || ") + 12


class ProgressLine(Sink):
    """Step, mini-epoch, smoothed loss, gradient norm, learning rate, tokens/s, MFU, memory, time left: as much of it as fits."""

    def __init__(self, length: RunLength, first_step: int, live: bool) -> None:
        self.length, self.smooth = length, math.nan
        self._last_plain, self._last_words = time.perf_counter(), -math.inf
        self._bar: tqdm | None = None
        if live:
            self._bar = tqdm(
                total=length.steps, initial=first_step, file=sys.stdout, dynamic_ncols=True, bar_format=BAR
            )

    def step(self, report: StepReport) -> None:
        if math.isfinite(report.loss):
            first = math.isnan(self.smooth)
            self.smooth = report.loss if first else SMOOTHING * self.smooth + (1 - SMOOTHING) * report.loss
        if self._bar is not None:
            now = time.perf_counter()
            if now - self._last_words > self._bar.mininterval or report.step == self.length.steps - 1:
                self._last_words = now
                width = shutil.get_terminal_size().columns - BAR_WIDTH - 2
                self._bar.set_description_str(self.words(report, width), refresh=False)
            self._bar.update(report.step + 1 - self._bar.n)
        elif time.perf_counter() - self._last_plain > PLAIN_LINE_SECONDS or report.step == self.length.steps - 1:
            self._last_plain = time.perf_counter()
            print(self.words(report), flush=True)

    def words(self, report: StepReport, width: float = math.inf) -> str:
        """The line without its bar; where it is longer than `width`, the less important parts are left out."""
        left = (self.length.steps - 1 - report.step) * self.length.tokens_per_step / report.tokens_per_second
        parts = [  # importance, words
            (9, f"step {report.step + 1}/{self.length.steps}"),
            (4, f"mini-epoch {self.length.mini_epoch(report.step)}"),
            (9, f"loss {self.smooth:.4f}"),
            (5, f"grad {report.grad_norm:.2f}"),
            (6, f"lr {report.lr:.2e}"),
            (8, f"{report.tokens_per_second:,.0f} tokens/s"),
            (3, f"MFU {report.mfu:.0%}" if math.isfinite(report.mfu) else ""),
            (2, f"{report.memory_gib:.1f} GiB" if math.isfinite(report.memory_gib) else ""),
            (7, f"left {duration(left)}"),
        ]
        shown = [part for part in parts if part[1]]
        while len(shown) > 1 and len(", ".join(words for _, words in shown)) > width:
            shown.remove(min(shown))
        return ", ".join(words for _, words in shown)

    def mini_epoch(self, report: MiniEpochReport) -> None:
        self._say(f"mini-epoch {report.mini_epoch}: mean loss {report.loss:.4f}, lr {report.last.lr:.8f}")

    def validation(self, report: ValidationReport) -> None:
        when = f"after step {report.steps}" if report.steps else "before the run"
        best = ", the lowest so far" if report.is_best and report.steps else ""
        self._say(f"held-out loss {report.loss:.4f} {when}{best} ({report.seconds:.1f} s)")

    def _say(self, text: str) -> None:
        tqdm.write(text)
        sys.stdout.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def has_live_line() -> bool:
    """Whether the output is a terminal that a line can be drawn on again and again: one that knows its size."""
    try:
        return sys.stdout.isatty() and min(os.get_terminal_size(sys.stdout.fileno())) > 0
    except OSError:
        return False


def duration(seconds: float) -> str:
    """h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

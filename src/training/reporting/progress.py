"""The progress bar of a run, or a line of text every 20 seconds where the output is not a terminal."""

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
LOSS_SMOOTHING = 0.95  # weight of the past in the running mean: about the last 20 steps
BAR_CELLS = 12
BAR_FORMAT = f"{{percentage:3.0f}}% |{{bar:{BAR_CELLS}}}| {{desc}}"
BAR_WIDTH = len("100% || ") + BAR_CELLS
MARGIN = 2  # columns left free: a line that fills the terminal may wrap


class ProgressLine(Sink):
    """Shows step, smoothed loss, learning rate, tokens/s, time left and more, as far as they fit into a line."""

    def __init__(self, length: RunLength, first_step: int, live: bool) -> None:
        self.length, self.smoothed_loss = length, math.nan
        self._printed_at, self._described_at = time.perf_counter(), -math.inf
        self._bar: tqdm | None = None
        if live:
            # on stdout, in one stream with the messages that are printed above it
            self._bar = tqdm(
                total=length.steps, initial=first_step, file=sys.stdout, dynamic_ncols=True, bar_format=BAR_FORMAT
            )

    def step(self, report: StepReport) -> None:
        if math.isfinite(report.loss):  # a NaN would never leave the running mean
            is_first = math.isnan(self.smoothed_loss)
            mean = LOSS_SMOOTHING * self.smoothed_loss + (1 - LOSS_SMOOTHING) * report.loss
            self.smoothed_loss = report.loss if is_first else mean
        is_last = report.step == self.length.steps - 1
        now = time.perf_counter()
        if self._bar is not None:
            # no more often than tqdm draws: composing the text takes longer than counting a step
            if now - self._described_at > self._bar.mininterval or is_last:
                self._described_at = now
                width = shutil.get_terminal_size().columns - BAR_WIDTH - MARGIN
                self._bar.set_description_str(self.describe(report, width), refresh=False)
            self._bar.update(report.step + 1 - self._bar.n)
        elif now - self._printed_at > PLAIN_LINE_SECONDS or is_last:
            self._printed_at = now
            print(self.describe(report), flush=True)

    def describe(self, report: StepReport, width: float = math.inf) -> str:
        """The line without its bar. The least important parts are left out until it has at most `width` characters."""
        steps_left = self.length.steps - 1 - report.step
        seconds_left = steps_left * self.length.tokens_per_step / report.tokens_per_second
        parts = [  # (importance, text), in the order in which they are shown
            (9, f"step {report.step + 1}/{self.length.steps}"),
            (4, f"mini-epoch {self.length.mini_epoch(report.step)}"),
            (9, f"loss {self.smoothed_loss:.4f}"),
            (5, f"grad {report.grad_norm:.2f}"),
            (6, f"lr {report.lr:.2e}"),
            (8, f"{report.tokens_per_second:,.0f} tokens/s"),
            (3, f"MFU {report.mfu:.0%}" if math.isfinite(report.mfu) else ""),
            (2, f"{report.memory_gib:.1f} GiB" if math.isfinite(report.memory_gib) else ""),
            (7, f"left {duration(seconds_left)}"),
        ]
        kept = [part for part in parts if part[1]]
        while len(kept) > 1 and len(", ".join(text for _, text in kept)) > width:
            kept.remove(min(kept))
        return ", ".join(text for _, text in kept)

    def mini_epoch(self, report: MiniEpochReport) -> None:
        self._print_above(f"mini-epoch {report.mini_epoch}: mean loss {report.loss:.4f}, lr {report.last.lr:.8f}")

    def validation(self, report: ValidationReport) -> None:
        when = f"after step {report.steps}" if report.steps else "before the run"
        best = ", the lowest so far" if report.is_best and report.steps else ""
        self._print_above(f"held-out loss {report.loss:.4f} {when}{best} ({report.seconds:.1f} s)")

    def _print_above(self, text: str) -> None:
        tqdm.write(text)  # clears the bar, prints, and draws the bar again
        sys.stdout.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def has_live_line() -> bool:
    """Whether stdout is a terminal that a progress bar can be drawn on: one that knows its size."""
    try:
        # `docker run -t` and `script` give terminals of size 0 x 0, where a bar would fill the log with lines
        return sys.stdout.isatty() and min(os.get_terminal_size(sys.stdout.fileno())) > 0
    except OSError:
        return False


def duration(seconds: float) -> str:
    """h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

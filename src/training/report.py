"""What a run tells about itself: one reader of step results, many places where they are shown or kept.

`Reporter` reads each step's loss one step late, when the device has long finished it, so that nothing ever waits. It hands a
`StepReport` to every sink, and at the end of a mini-epoch its mean.
"""

from __future__ import annotations

import csv
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor
from tqdm import tqdm

from src.files import write_whole
from src.training.module import TrainingModule
from src.training.schedule import RunLength

PLAIN_LINE_SECONDS = 20.0  # between two lines when the output is not a terminal
SMOOTHING = 0.95  # of the loss that the live line shows
SPEED_WINDOW_STEPS = 20


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: mean loss over its samples, learning rate before group scales, gradient norm before clipping."""

    step: int
    tokens: int  # trained on in the whole run, this step included
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float


@dataclass(frozen=True)
class MiniEpochReport:
    mini_epoch: int
    loss: float  # mean over its steps
    last: StepReport


class Sink(Protocol):
    """Somewhere that reports go."""

    def step(self, report: StepReport) -> None: ...
    def mini_epoch(self, report: MiniEpochReport) -> None: ...
    def close(self) -> None: ...


class Reporter(pl.Callback):
    """Collects step results and hands them on; on ranks other than 0 to nobody.

    What the ranks must agree on travels with the losses: `wishes` are asked after each step on every rank, and `agreed` holds the
    names of those that any rank had, at the same step on all of them (a step late when there are several).
    """

    def __init__(
        self,
        length: RunLength,
        first_step: int,
        sinks: list[Sink],
        losses_before: list[float],
        wishes: dict[str, Callable[[], bool]],
    ) -> None:
        self.length, self.sinks, self.wishes = length, sinks, wishes
        self.next_step = first_step
        self.agreed: set[str] = set()
        self.mini_epoch_losses = list(losses_before)  # of the steps since the last mini-epoch's end
        self._micro: list[Tensor] = []
        self._waiting: tuple[int, Tensor, float] | None = None  # step, (loss, wishes..., grad norm), lr
        self._times: deque[float] = deque(maxlen=SPEED_WINDOW_STEPS + 1)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._times.append(time.perf_counter())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        self._micro.append(outputs["plain_loss"])
        if len(self._micro) < pl_module.config.accumulate_grad_batches:
            return
        loss = torch.stack(self._micro).mean()
        self._micro = []
        wanted = [float(wish()) for wish in self.wishes.values()]
        values = torch.cat([loss.float().unsqueeze(0), torch.tensor(wanted, device=loss.device)])
        if trainer.world_size > 1:
            values = trainer.strategy.reduce(values, reduce_op="mean")
        self.agreed = set()
        self.read_waiting()
        group = trainer.optimizers[0].param_groups[0]
        values = torch.cat([values, pl_module.grad_norm.to(values).reshape(1)])
        self._waiting = (self.next_step, values, group["lr"] / group["lr_scale"])
        if trainer.world_size == 1:
            self.agreed = {name for name, wish in zip(self.wishes, wanted, strict=True) if wish}
        if self.length.ends_mini_epoch(self.next_step):
            self.read_waiting()
        self.next_step += 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.read_waiting()
        for sink in self.sinks:
            sink.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        for sink in self.sinks:
            sink.close()

    def read_waiting(self) -> None:
        """Read the newest step's results now, waiting for the device if it must be."""
        if self._waiting is None:
            return
        step, values, lr = self._waiting
        self._waiting = None
        loss, *wanted, grad_norm = values.tolist()
        self.agreed = {name for name, wish in zip(self.wishes, wanted, strict=True) if wish}
        self._times.append(time.perf_counter())
        speed = (len(self._times) - 1) * self.length.tokens_per_step / max(1e-9, self._times[-1] - self._times[0])
        report = StepReport(step, self.length.tokens(step + 1), loss, lr, grad_norm, speed)
        if math.isfinite(loss):
            self.mini_epoch_losses.append(loss)
        for sink in self.sinks:
            sink.step(report)
        if self.length.ends_mini_epoch(step):
            mean = sum(self.mini_epoch_losses) / len(self.mini_epoch_losses) if self.mini_epoch_losses else math.nan
            self.mini_epoch_losses = []
            for sink in self.sinks:
                sink.mini_epoch(MiniEpochReport(self.length.mini_epoch(step), mean, report))


class TrainLog:
    """train_log.txt: a header per start, then a line per mini-epoch.

    Lines of mini-epochs that are trained again, because their weights were not saved, are dropped first.
    """

    def __init__(self, path: Path, first_mini_epoch: int, settings: dict[str, Any]) -> None:
        self.path, self.count = path, 0
        if path.exists():
            _keep_lines(path, lambda line: not _is_mini_epoch_line(line) or int(line.split()[0]) < first_mini_epoch)
        title = "NEW RUN" if first_mini_epoch == 0 else f"NEW RUN continues at mini-epoch {first_mini_epoch}"
        self._append(f"{title} {datetime.now():%Y-%m-%d %H:%M:%S}\n{json.dumps(settings)}\n")

    def step(self, report: StepReport) -> None:
        pass

    def mini_epoch(self, report: MiniEpochReport) -> None:
        now, lr = datetime.now(), report.last.lr
        perplexity = math.exp(min(report.loss, 700.0)) if math.isfinite(report.loss) else math.nan
        self._append(f"{report.mini_epoch} {report.loss:.6f} {perplexity:.4f} {lr:.8f} {now} {self.count}\n")
        self.count += 1

    def close(self) -> None:
        pass

    def _append(self, text: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text)


def _is_mini_epoch_line(line: str) -> bool:
    return len(line.split()) == 7 and line.split()[0].isdigit()


class MetricsFile:
    """metrics.csv: a row per step, for plots and comparisons. Rows of steps that are trained again are dropped first.

    `lost_seconds` is the training time of the dropped rows. Each row is handed to the system at once, so that a run that was
    killed has told how far it came.
    """

    def __init__(self, path: Path, first_step: int, tokens_per_step: int) -> None:
        self.lost_seconds = 0.0
        if path.exists():
            dropped = _keep_lines(path, lambda line: not line[:1].isdigit() or int(line.split(",")[0]) < first_step)
            speeds = [float(line.rsplit(",", 1)[1]) for line in dropped if line.endswith("\n")]
            self.lost_seconds = sum(tokens_per_step / speed for speed in speeds if speed > 0)
        self._file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        self._writer = csv.writer(self._file)
        if self._file.tell() == 0:
            self._writer.writerow([column.name for column in fields(StepReport)])

    def step(self, report: StepReport) -> None:
        self._writer.writerow([value if isinstance(value, int) else f"{value:.9g}" for value in astuple(report)])
        self._file.flush()

    def mini_epoch(self, report: MiniEpochReport) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class ProgressLine:
    """The live line: step, loss, tokens/s, lr, time left; a plain line now and then where the output is no terminal."""

    def __init__(self, length: RunLength, first_step: int, live: bool) -> None:
        self.length, self.smooth = length, math.nan
        self._last_plain = time.perf_counter()
        self._bar = (
            tqdm(total=length.steps, initial=first_step, unit="step", dynamic_ncols=True, bar_format=_BAR)
            if live
            else None
        )

    def step(self, report: StepReport) -> None:
        first = math.isnan(self.smooth)
        self.smooth = report.loss if first else SMOOTHING * self.smooth + (1 - SMOOTHING) * report.loss
        left = (self.length.steps - 1 - report.step) * self.length.tokens_per_step / report.tokens_per_second
        words = f"loss {self.smooth:.4f}, {report.tokens_per_second:,.0f} tokens/s, lr {report.lr:.2e}, left {_duration(left)}"
        if self._bar is not None:
            self._bar.set_postfix_str(words, refresh=False)
            self._bar.update(report.step + 1 - self._bar.n)
        elif time.perf_counter() - self._last_plain > PLAIN_LINE_SECONDS or report.step == self.length.steps - 1:
            self._last_plain = time.perf_counter()
            print(f"step {report.step + 1}/{self.length.steps}: {words}", flush=True)

    def mini_epoch(self, report: MiniEpochReport) -> None:
        say = self._bar.write if self._bar is not None else print
        say(f"mini-epoch {report.mini_epoch}: mean loss {report.loss:.4f}, lr {report.last.lr:.8f}")
        sys.stdout.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


_BAR = "{percentage:3.0f}% |{bar:20}| step {n_fmt}/{total_fmt} {postfix}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Dashboard:
    """Weights & Biases, under the names that existing RWKV dashboards plot."""

    def __init__(self, logger: Any, weight_decay: float) -> None:
        self.logger, self.weight_decay = logger, weight_decay

    def step(self, report: StepReport) -> None:
        shown = {
            "loss": report.loss,
            "lr": report.lr,
            "wd": self.weight_decay,
            "Gtokens": report.tokens / 1e9,
            "kt/s": report.tokens_per_second / 1e3,
            "grad norm": report.grad_norm,
        }
        self.logger.log_metrics(shown, step=report.step)

    def mini_epoch(self, report: MiniEpochReport) -> None:
        self.logger.log_metrics({"mini-epoch loss": report.loss, **asdict(report.last)}, step=report.last.step)

    def close(self) -> None:
        self.logger.finalize("finished")


def _keep_lines(path: Path, wanted: Callable[[str], bool]) -> list[str]:
    """Drop the other lines, and a last one that was cut by a crash; the dropped ones."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    keeps = [line.endswith("\n") and wanted(line) for line in lines]
    if not all(keeps):
        with write_whole(path, "w") as file:
            file.writelines(line for line, keep in zip(lines, keeps, strict=True) if keep)
    return [line for line, keep in zip(lines, keeps, strict=True) if not keep]

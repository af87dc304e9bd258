"""Where the time of a step goes: a trace for Perfetto and the slowest operations."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from src.files import atomic_write
from src.training.console import log

WARM_UP_STEPS = 5  # memory is fetched, kernels are built and chosen in the first ones
SLOWEST = 10


class Profile(pl.Callback):
    """Records `steps` optimizer steps of this process after WARM_UP_STEPS; writes `trace` (.json.gz) and says the slowest operations."""

    def __init__(self, steps: int, trace: Path) -> None:
        self.steps, self.trace = steps, trace
        self._profiler: profile | None = None
        self._done = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._profiler is not None or self._done or trainer.global_step < WARM_UP_STEPS:
            return
        kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
        self._profiler = profile(activities=kinds)
        self._profiler.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._profiler is not None and trainer.global_step >= WARM_UP_STEPS + self.steps:
            self._finish()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._profiler is not None:
            self._finish()
        elif not self._done:
            log(
                f"--profile {self.steps}: no trace, the run ended within its first {WARM_UP_STEPS} steps, which are left out"
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _finish(self) -> None:
        assert self._profiler is not None
        profiler, self._profiler, self._done = self._profiler, None, True
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profiler.stop()
        try:
            write_trace(profiler, self.trace)
            said = f"wrote {self.trace}: open it at https://ui.perfetto.dev"
        except OSError as error:  # what was measured can still be said, and the run has nothing to do with it
            said = f"WARNING: --profile {self.steps}: {self.trace} could not be written ({error}); training goes on"
        log(f"{said}\n{slowest(profiler)}")


def write_trace(profiler: profile, trace: Path) -> None:
    """The recorded events as JSON of the Trace Event Format, compressed, whole or not at all. Raises OSError."""
    with tempfile.TemporaryDirectory(dir=trace.parent, prefix=f".{trace.name}.") as beside:
        plain = Path(beside) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        with open(plain, "rb") as source:
            source.seek(max(0, source.seek(0, os.SEEK_END) - 8))
            if not source.read().rstrip().endswith(b"}"):  # a full disk is not an error to the profiler
                raise OSError("the profiler wrote only a part of it; is the disk full?")
            source.seek(0)
            with atomic_write(trace) as file, gzip.open(file, "wb") as packed:
                shutil.copyfileobj(source, packed)


def slowest(profiler: profile) -> str:
    """A line for each of the ten operations with the most time of their own, on the GPU where there is one, else on the CPU."""
    # an operation's time on the GPU is that of the kernels it launched; the kernels themselves would count it twice
    totals = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
    on_gpu = any(event.self_device_time_total for event in totals)
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    whole = sum(getattr(event, own) for event in totals) or 1
    first = sorted(totals, key=lambda event: getattr(event, own), reverse=True)[:SLOWEST]
    lines = [f"{'ms':>10} {'share':>6} {'calls':>7}  the slowest operations on the {'GPU' if on_gpu else 'CPU'}"]
    for event in first:
        time = getattr(event, own)
        lines.append(f"{time / 1e3:10.1f} {time / whole:6.1%} {event.count:7}  {event.key}")
    return "\n".join(lines)

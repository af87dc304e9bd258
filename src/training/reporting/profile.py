"""Profiles some steps of a run: a trace for Perfetto and a table of the slowest operations."""

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

WARM_UP_STEPS = 5  # not recorded: they allocate memory, build kernels and choose algorithms
TOP_OPERATIONS = 10
TAIL_BYTES = 8  # of a trace: its closing brace and the whitespace after it


class Profile(pl.Callback):
    """Records `steps` optimizer steps after WARM_UP_STEPS; writes `trace` (.json.gz), logs the slowest operations."""

    def __init__(self, steps: int, trace: Path) -> None:
        self.steps, self.trace = steps, trace
        self._profiler: profile | None = None
        self._done = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._profiler is not None or self._done or trainer.global_step < WARM_UP_STEPS:
            return
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
        self._profiler = profile(activities=activities)
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
                f"--profile {self.steps}: no trace was written, since the run ended within the {WARM_UP_STEPS} warm-up "
                "steps, which are not recorded"
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._profiler is not None:
            self._profiler.stop()  # a profiler that is still recording would print errors when it is destroyed
            self._profiler = None

    def _finish(self) -> None:
        assert self._profiler is not None
        profiler, self._profiler, self._done = self._profiler, None, True
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels of the last step may still be running
        profiler.stop()
        try:
            write_trace(profiler, self.trace)
            message = f"wrote {self.trace}: open it at https://ui.perfetto.dev"
        except OSError as error:  # the table needs no file, and a missing trace is no reason to stop the run
            message = (
                f"WARNING: --profile {self.steps}: {self.trace} could not be written ({error}); training continues"
            )
        log(f"{message}\n{slowest_operations(profiler)}")


def write_trace(profiler: profile, trace: Path) -> None:
    """The recorded events as JSON of the Trace Event Format, compressed, whole or not at all. Raises OSError."""
    with tempfile.TemporaryDirectory(dir=trace.parent, prefix=f".{trace.name}.") as folder:
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        with open(plain, "rb") as source:
            source.seek(max(0, source.seek(0, os.SEEK_END) - TAIL_BYTES))
            if not source.read().rstrip().endswith(b"}"):  # the profiler raises nothing when the disk is full
                raise OSError("the profiler wrote only a part of it; is the disk full?")
            source.seek(0)
            with atomic_write(trace) as file, gzip.open(file, "wb") as compressed:
                shutil.copyfileobj(source, compressed)


def slowest_operations(profiler: profile) -> str:
    """A table of the TOP_OPERATIONS with the most self time, on the GPU where one was used, else on the CPU."""
    # an operation's time on the GPU is that of the kernels it launched; the kernels themselves would count it twice
    operations = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
    on_gpu = any(event.self_device_time_total for event in operations)
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    total = sum(getattr(event, attribute) for event in operations) or 1
    top = sorted(operations, key=lambda event: getattr(event, attribute), reverse=True)[:TOP_OPERATIONS]
    lines = [f"{'ms':>10} {'share':>6} {'calls':>7}  the slowest operations on the {'GPU' if on_gpu else 'CPU'}"]
    for event in top:
        microseconds = getattr(event, attribute)
        lines.append(f"{microseconds / 1e3:10.1f} {microseconds / total:6.1%} {event.count:7}  {event.key}")
    return "\n".join(lines)

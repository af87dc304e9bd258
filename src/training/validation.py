"""The loss on data that is held out, on the way through a run: the same samples each time, shared by the processes, best weights kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from src.config import VAL_EVERY, RunConfig
from src.dataset.binidx import MMapIndexedDataset
from src.dataset.sft import IGNORED, SftBatch, SftRows, collate
from src.errors import UserError
from src.inference.evaluate import windows
from src.run_folder import BEST, VALIDATION
from src.run_log import read_columns
from src.training.checkpoint.callbacks import AfterStep, write_weights
from src.training.data import SftSamples
from src.training.module import TrainingModule
from src.training.reporting.reporter import OnTheWay, Reporter, to_device
from src.training.reporting.sink import ValidationReport
from src.training.schedule import RunLength

Batch = tuple[Tensor, ...]


class HeldOut:
    """The samples of --val_data_file that are looked at: --val_windows of them, evenly spaced.

    Raises ValueError, before any training time is spent, when the file can't be read.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._sample: Callable[[int], Batch]
        if config.data_type == "binidx":
            self._tokens = MMapIndexedDataset(config.val_data_file).tokens
            self._windows = list(windows(len(self._tokens), config.ctx_len, config.val_windows))
            self._sample, self._collate, self.count = self._window, torch.utils.data.default_collate, len(self._windows)
        else:
            changed = {"data_file": config.val_data_file, "truncate": "end", "random_seed": 0}
            self._rows: SftRows = SftSamples(replace(config, **changed)).rows  # type: ignore[arg-type]
            self.count = min(len(self._rows), config.val_windows)
            self._sample, self._collate = self._row, collate

    def check_ids(self, vocab_size: int) -> None:
        """Raises ValueError when a token of these samples doesn't fit the vocabulary."""
        for number in range(self.count):
            inputs, targets, *_ = self._sample(number)
            largest = max(int(inputs.max()), int(targets.max()))
            if largest >= vocab_size:
                raise UserError(
                    f"--val_data_file {self.config.val_data_file}: token id {largest} doesn't fit --vocab_size {vocab_size}; expected "
                    "data made with the tokenizer of the training data"
                )

    def _window(self, number: int) -> Batch:
        ids = torch.from_numpy(self._tokens[self._windows[number]].astype(np.int64))
        return ids[:-1], ids[1:]

    def _row(self, number: int) -> SftBatch:
        return self._rows.row(number * len(self._rows) // self.count)

    def batches(self, rank: int, world_size: int) -> Iterator[Batch]:
        """A rank's share. Every rank gets the same number of batches, all of one shape: filled up with samples that don't count."""
        own = -(-self.count // world_size)
        size = min(self.config.micro_bsz, own)
        for first in range(0, own, size):
            batch = []
            for i in range(first, first + size):
                number = i * world_size + rank
                inputs, targets, *packed = self._sample(number if number < self.count and i < own else 0)
                if number >= self.count or i >= own:
                    targets = torch.full_like(targets, IGNORED)
                batch.append(SftBatch(inputs, targets, *packed) if packed else (inputs, targets))
            yield tuple(self._collate(batch))  # type: ignore[arg-type]

    def prompts(self, count: int, most: int) -> Iterator[tuple[list[int], list[int]]]:
        """(tokens, what follows in the data) of `count` samples: at most `most` tokens to begin with; an answer's whole question."""
        for i in range(min(count, self.count)):
            inputs, targets, *packed = self._sample(i * self.count // min(count, self.count))
            first = int((targets >= 0).int().argmax()) + 1 if packed else min(most, len(inputs) - 1)
            last = first
            while last < len(targets) and targets[last] >= 0:
                last += 1
            yield inputs[:first].tolist(), targets[first - 1 : last].tolist()


def mean_loss(
    trainer: pl.Trainer, module: TrainingModule, held_out: HeldOut, has_to_stop: Callable[[], bool]
) -> tuple[float, int] | None:
    """Mean loss in nats over the tokens that count, and their number: the same on every rank, and up to rounding for any number of them.

    None, on every rank, when one of them `has_to_stop` between two batches. Leaves weights, gradients and random numbers as they are.
    Every rank takes part.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=module.device)
    stop: OnTheWay | None = None
    module.eval()
    with torch.no_grad():
        for batch in held_out.batches(trainer.global_rank, trainer.world_size):
            if stop is not None and any(stop.read()):
                break
            found = trainer.strategy.validation_step(tuple(part.to(module.device) for part in batch), 0)
            assert isinstance(found, Tensor)
            sums += found
            wish = to_device([float(has_to_stop())], module.device)
            if trainer.world_size > 1:
                dist.all_reduce(wish)
            stop = OnTheWay(wish)
        else:
            stop = None
    module.train()
    if stop is not None:
        return None
    if trainer.world_size > 1:
        dist.all_reduce(sums)
    total, counted = sums.tolist()
    return total / max(1.0, counted), int(counted)


class Validate(AfterStep):
    """Measures the held-out loss where --val_every says, and keeps the weights of the lowest one as rwkv-best.pth.

    The lowest so far stands in `reporter.best_val_loss`; `at_start` measures before the first step too. A stop that is wished for on the
    way leaves a measurement out, and nothing of it is kept; the start that goes on from there makes up for it.
    """

    def __init__(
        self,
        held_out: HeldOut,
        reporter: Reporter,
        length: RunLength,
        first_step: int,
        val_every: str,
        proj_dir: Path,
        at_start: bool,
        has_to_stop: Callable[[], bool],
    ) -> None:
        super().__init__(first_step)
        self.held_out, self.reporter, self.length, self.proj_dir = held_out, reporter, length, proj_dir
        self.due = _schedule(val_every, length)
        self.at_start, self.has_to_stop = at_start, has_to_stop
        self._last_seconds = 0.0

    def seconds_coming(self) -> float:
        """What the last measurement took, where another one is due after the step under way or the next; else 0."""
        step = self.reporter.next_step
        return self._last_seconds if self.due(step) or self.due(step + 1) else 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After on_train_start of all: the handlers of signals are in place, so that a stop cuts this measurement too."""
        if self.at_start:
            assert isinstance(pl_module, TrainingModule)
            self.measure(trainer, pl_module, self.first_step)

    def after_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if self.due(step) and not self.reporter.agreed & {"rollback", "stop"}:
            self.measure(trainer, module, step + 1)

    def measure(self, trainer: pl.Trainer, module: TrainingModule, steps: int) -> None:
        self.reporter.read_waiting()
        begin = time.perf_counter()
        found = mean_loss(trainer, module, self.held_out, self.has_to_stop)
        if found is None:
            self.reporter.agreed.add("stop")
            self.reporter.paused += time.perf_counter() - begin
            return
        loss, counted = found
        self._last_seconds = seconds = time.perf_counter() - begin
        is_best = loss < self.reporter.best_val_loss
        if is_best:
            self.reporter.best_val_loss = loss
            write_weights(trainer, module, self.proj_dir / BEST)
        self.reporter.validated(
            ValidationReport(steps, self.length.tokens(steps), loss, counted, seconds, is_best),
            pause=time.perf_counter() - begin,
        )


def _schedule(val_every: str, length: RunLength) -> Callable[[int], bool]:
    """Whether to measure after a step, in the notation of --val_every; after the last one always."""
    found = VAL_EVERY.fullmatch(val_every)
    assert found is not None, "checked with the flags"
    every, in_steps = int(found[1]), bool(found[2])

    def due(step: int) -> bool:
        if step == length.steps - 1 or every == 0:
            return step == length.steps - 1
        if in_steps:
            return (step + 1) % every == 0
        return length.ends_mini_epoch(step) and (length.mini_epoch(step) + 1) % every == 0

    return due


def was_left_out(proj_dir: Path, val_every: str, length: RunLength, first_step: int) -> bool:
    """Whether the measurement that is due before `first_step` isn't in val.csv: the run was stopped instead, or it is due since now."""
    measured = read_columns(proj_dir / VALIDATION).get("steps", [])
    return first_step > 0 and _schedule(val_every, length)(first_step - 1) and first_step not in measured


def best_before(proj_dir: Path, step: int) -> float:
    """The lowest held-out loss up to `step` in val.csv, which holds losses on the same samples only; infinite where there is none."""
    columns = read_columns(proj_dir / VALIDATION)
    rows = zip(columns.get("steps", []), columns.get("loss", []), strict=True)
    return min((loss for steps, loss in rows if steps <= step and math.isfinite(loss)), default=math.inf)

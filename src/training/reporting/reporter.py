"""The one reader of step results, which hands them to all the places where they are shown or kept.

`Reporter` reads each step's values one step late, when the device has long finished it, so that nothing ever waits. It hands a
`StepReport` to every sink, and at the end of a mini-epoch its mean.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from src.training.module import TrainingModule
from src.training.reporting.sink import UPDATE_GROUPS, MiniEpochReport, Sample, Sink, StepReport, ValidationReport
from src.training.reporting.update_ratio import update_ratios
from src.training.schedule import RunLength

SPEED_WINDOW_STEPS = 20
MEASURED_EVERY = 50  # steps between two looks at what costs something: update ratios, the largest logit, memory


class Reporter(pl.Callback):
    """Collects step results and hands them on.

    What the ranks must agree on travels with the losses: `wishes` are asked after each step on every rank, and `agreed` holds the
    names of those that any rank had, at the same step on all of them (a step late when there are several).
    `peak_tokens_per_second` is what all devices would reach at their peak (NaN: not known).
    """

    def __init__(
        self,
        length: RunLength,
        first_step: int,
        sinks: list[Sink],
        losses_before: list[float],
        wishes: dict[str, Callable[[], bool]],
        peak_tokens_per_second: float = math.nan,
    ) -> None:
        self.length, self.sinks, self.wishes = length, list(sinks), wishes
        self.peak_tokens_per_second = peak_tokens_per_second
        self.next_step = first_step
        self.agreed: set[str] = set()
        self.mini_epoch_losses = list(losses_before)  # of the steps since the last mini-epoch's end
        self.best_val_loss = math.inf
        self._micro: list[Tensor] = []
        self._waiting: _Waiting | None = None
        self._times: deque[float] = deque(maxlen=SPEED_WINDOW_STEPS + 1)
        self._began = self.paused = 0.0  # seconds that validations took
        self._memory_gib = math.nan

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.perf_counter()
        self._times.append(self._clock())

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        pl_module.head_loss.measures = self.next_step % MEASURED_EVERY == 0

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
        values = loss.float().reshape(1)
        if trainer.world_size > 1:
            values = torch.cat([values, to_device(wanted, loss.device)])
            values = trainer.strategy.reduce(values, reduce_op="mean")
        self.agreed = set()
        self.read_waiting()
        parts = [values, pl_module.grad_norm.to(values).reshape(1)]
        if math.isnan(self._memory_gib) or self.next_step % MEASURED_EVERY == 0:
            self._memory_gib = memory_gib(pl_module.device)
        if self.next_step % MEASURED_EVERY == 0:
            parts.append(self._measure(trainer, pl_module).to(values))
        group = trainer.optimizers[0].param_groups[0]
        lr = group["lr"] / group["lr_scale"]
        self._waiting = _Waiting(self.next_step, lr, len(values) - 1, OnTheWay(torch.cat(parts)))
        if trainer.world_size == 1:
            self.agreed = {name for name, wish in zip(self.wishes, wanted, strict=True) if wish}
        if self.length.ends_mini_epoch(self.next_step):
            self.read_waiting()
        self.next_step += 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.read_waiting()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close_sinks()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close_sinks()

    def _close_sinks(self) -> None:
        while self.sinks:
            self.sinks.pop().close()

    def read_waiting(self) -> None:
        """Read the newest step's results now, waiting for the device if it must be."""
        if self._waiting is None:
            return
        step, lr, n_wishes, values = self._waiting
        self._waiting = None
        loss, *others = values.read()
        if n_wishes:
            self.agreed |= {name for name, wish in zip(self.wishes, others[:n_wishes], strict=True) if wish}
        grad_norm, *measured = others[n_wishes:]
        self._times.append(self._clock())
        speed = (len(self._times) - 1) * self.length.tokens_per_step / max(1e-9, self._times[-1] - self._times[0])
        report = StepReport(
            step=step,
            tokens=self.length.tokens(step + 1),
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_second=speed,
            seconds=self._times[-1],
            memory_gib=self._memory_gib,
            mfu=speed / self.peak_tokens_per_second,
            largest_logit=measured[0] if measured else math.nan,
            update_ratios=dict(zip(UPDATE_GROUPS, measured[1:], strict=True)) if measured else {},
        )
        if math.isfinite(loss):
            self.mini_epoch_losses.append(loss)
        for sink in self.sinks:
            sink.step(report)
        if self.length.ends_mini_epoch(step):
            mean = sum(self.mini_epoch_losses) / len(self.mini_epoch_losses) if self.mini_epoch_losses else math.nan
            self.mini_epoch_losses = []
            for sink in self.sinks:
                sink.mini_epoch(MiniEpochReport(self.length.mini_epoch(step), mean, report))

    def validated(self, report: ValidationReport, pause: float) -> None:
        """`pause` seconds were spent on it, which don't count for the speed of training."""
        self.paused += pause
        for sink in self.sinks:
            sink.validation(report)

    def show(self, samples: list[Sample]) -> None:
        for sink in self.sinks:
            sink.samples(samples)

    def _clock(self) -> float:
        return time.perf_counter() - self._began - self.paused

    def _measure(self, trainer: pl.Trainer, module: TrainingModule) -> Tensor:
        """(largest logit, update ratio of each group) of this step, on the device."""
        largest = module.head_loss.largest_logit.float().reshape(1)
        if trainer.world_size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return torch.cat([largest, update_ratios(module.optimizer).to(largest)])


class OnTheWay:
    """Values that are being copied from the device. Reading them waits for the work before the copy only, not for what came after."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrived = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


class _Waiting(NamedTuple):
    """What is known of a step that hasn't been read yet."""

    step: int
    lr: float
    n_wishes: int  # that travel with the values; 0 in a run of one process
    values: OnTheWay  # loss, wishes..., grad norm, and at times what `_measure` gives


def to_device(numbers: list[float], device: torch.device) -> Tensor:
    """Without waiting for the device, which a plain copy of unpinned memory does."""
    here = torch.tensor(numbers)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here


def memory_gib(device: torch.device) -> float:
    """The most memory that this process has taken so far: reserved on its GPU, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    if sys.platform == "win32":
        return math.nan
    import resource

    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return taken / 2**30 if sys.platform == "darwin" else taken / 2**20  # bytes there, KiB elsewhere

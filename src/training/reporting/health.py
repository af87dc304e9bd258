"""Is the run well: warnings that explain, each given once, with what to try.

Judged from values that are known anyway: losses read a step late, the host's clock, and whether the device has finished when the
host comes back to it. Nothing here waits for the device.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch

from src.training.console import log
from src.training.module import TrainingModule
from src.training.optim import MasterAdamW
from src.training.reporting.device_values import PendingValues
from src.training.reporting.sink import Sink, StepReport

BEFORE, LATEST = 100, 5  # losses that are compared: the median of the latest with the spread of those before
WARM_UP_STEPS = 10  # slower than the rest: memory is fetched, kernels are built
WINDOW_STEPS = 50  # over which time is judged
GRADIENTS_AT = 30  # the step whose gradients are looked at one by one: at first many are 0 by the initial values
STARVING = 0.1  # share of the time that the device may wait for data
IDLE = 0.8  # share of the steps before which the GPU may be idle


def loss_spike(losses: Sequence[float]) -> tuple[float, float] | None:
    """(loss before, loss now) when the last LATEST of `losses` lie clearly above the BEFORE ones before them.

    Clearly: their median exceeds the earlier median by 0.3 and by six times the earlier spread (1.48 times the median distance from the
    median, which is the standard deviation of normal noise). A single bad batch is no spike.
    """
    if len(losses) < BEFORE + LATEST:
        return None
    before, latest = losses[-BEFORE - LATEST : -LATEST], losses[-LATEST:]
    usual, now = statistics.median(before), statistics.median(latest)
    spread = 1.48 * statistics.median(abs(loss - usual) for loss in before)
    return (usual, now) if now - usual > max(0.3, 6 * spread) else None


def lr_is_over(lr: float, steps_left: int) -> bool:
    """Whether the learning rate is 0 with steps still to come."""
    return lr == 0 and steps_left > 0


def without_gradient(norms: dict[str, float | None]) -> list[str]:
    """Names of the parameters whose gradient is missing (None) or 0 in every number."""
    return [name for name, norm in norms.items() if norm is None or norm == 0]


def slow_part(seconds: float, waiting_for_data: float, idle_share: float) -> str:
    """What holds up the device: "data", "host" (the CPU, before a GPU), or "" when nothing does.

    `seconds` of training, of which `waiting_for_data` were spent in the loader; `idle_share` of the steps found the GPU idle.
    """
    if waiting_for_data > STARVING * seconds:
        return "data"
    return "host" if idle_share > IDLE else ""


class OnceWarnings:
    """Says each kind of warning once."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    def __call__(self, kind: str, what: str, advice: str) -> None:
        if kind not in self.said:
            self.said.add(kind)
            log(f"WARNING: {what}\n  what to try: {advice}")


class NumbersMonitor(Sink):
    """A sink that judges loss, gradient norm and learning rate; `steps` is the run's number of them."""

    def __init__(self, steps: int, warn: OnceWarnings) -> None:
        self.steps, self.warn = steps, warn
        self._losses: deque[float] = deque(maxlen=BEFORE + LATEST)

    def step(self, report: StepReport) -> None:
        number = report.step + 1
        if math.isfinite(report.loss):
            self._losses.append(report.loss)
        if number % LATEST == 0 and (spike := loss_spike(list(self._losses))):
            self.warn(
                "spike",
                f"step {number}: the loss rose from about {spike[0]:.2f} to {spike[1]:.2f}",
                "wait a few hundred steps, most spikes come down by themselves; if it stays up, go on from saved weights before it with half the "
                "--lr_init, a longer --warmup_steps or a --grad_clip below the usual gradient norm",
            )
        if report.grad_norm == 0:
            self.warn(
                "gradient",
                f"step {number}: the gradient is 0, nothing is learned",
                "look whether any target counts in the data (for --data_type sft a larger --ctx_len, so that answers aren't cut off); "
                "with --precision fp16 take bf16",
            )
        if lr_is_over(report.lr, left := self.steps - number):
            self.warn(
                "lr",
                f"step {number}: the learning rate is 0 with {left:,} steps to come, which will change nothing",
                "give --lr_final more than 0 (a tenth of --lr_init is usual), or --my_exit_tokens where the cosine should end",
            )


class PaceMonitor(pl.Callback):
    """A callback, the last in the list, that judges which gradients arrive and what the device waits for."""

    def __init__(self, warn: OnceWarnings) -> None:
        self.warn = warn
        self._ended = math.nan  # when the host was done with the step before
        self._finished: torch.cuda.Event | None = None  # when the device was
        self._norms: tuple[list[str], PendingValues] | None = None
        self._begin()

    def _begin(self) -> None:
        self._steps, self._idle, self._waited, self._since = 0, 0, 0.0, time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == WARM_UP_STEPS:
            self._begin()
        elif batch_idx > WARM_UP_STEPS:
            self._waited += time.perf_counter() - self._ended
            self._idle += self._finished is not None and self._finished.query()
            self._steps += 1
            if self._steps == WINDOW_STEPS:
                self._judge()
                self._begin()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._norms is not None:
            self._judge_gradients()
        if batch_idx == GRADIENTS_AT:
            self._look_at_gradients(pl_module)
        if pl_module.device.type == "cuda":
            self._finished = self._finished or torch.cuda.Event()
            self._finished.record()
        self._ended = time.perf_counter()

    def _judge(self) -> None:
        seconds = time.perf_counter() - self._since
        kind = slow_part(seconds, self._waited, self._idle / self._steps)
        if kind == "data":
            self.warn(
                kind,
                f"{self._waited / seconds:.0%} of the time goes into waiting for data",
                "copy --data_file to a local disk (it is read here and there, all over), leave memory free for the system to keep it in, "
                "and see what else uses the disk and the CPU",
            )
        elif kind == "host":
            self.warn(
                kind,
                f"the GPU had finished and waited for the CPU at {self._idle} of {self._steps} steps",
                "give it more to do at a time (a larger --micro_bsz, as memory allows), --compile 1 for fewer and larger operations; "
                "--profile 10 shows where the time goes",
            )

    def _look_at_gradients(self, pl_module: pl.LightningModule) -> None:
        """The norms are read a step later. Under ZeRO gradients are in parts, and not looked at."""
        assert isinstance(pl_module, TrainingModule)
        if not isinstance(pl_module.optimizer, MasterAdamW):
            return
        named = [(name, p.grad) for name, p in pl_module.model.named_parameters() if p.requires_grad]
        gradients = [torch.zeros((), device=pl_module.device) if grad is None else grad for _, grad in named]
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients, ord=math.inf)])
        self._norms = ([name for name, _ in named], PendingValues(norms))

    def _judge_gradients(self) -> None:
        assert self._norms is not None
        names, norms = self._norms
        self._norms = None
        if none := without_gradient(dict(zip(names, norms.read(), strict=True))):
            some = ", ".join(none[:3]) + (f" and {len(none) - 3} more" if len(none) > 3 else "")
            self.warn(
                "parameters",
                f"no gradient reaches {some}: what they hold never changes",
                "look at the weights that the run started from (--load_model): where the matrix that follows them is 0 and stays so, nothing "
                "arrives; new weights from --train_stage 1 have no such place",
            )

"""Warns of common problems of a run (loss spikes, missing gradients, an idle device), once each, with what to try.

They use only values that are available anyway: losses read a step late, the host's clock, and whether the device had
finished before the host queued the next step. Nothing here waits for the device.
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

BASELINE_STEPS, RECENT_STEPS = 100, 5  # losses compared: the median of the recent ones with the baseline before them
WARM_UP_STEPS = 10  # left out of the timing: these allocate memory and build kernels
WINDOW_STEPS = 50  # over which time is measured, so that a single slow read does not count
# Not earlier: the init sets some matrices to 0, and what lies before them has no gradient in the first steps.
GRADIENT_CHECK_STEP = 30
MAX_DATA_SHARE = 0.1  # of the time that the device may wait for data
MAX_IDLE_SHARE = 0.8  # of the steps before which the GPU may be idle; below it the GPU is busy most of the time
MAX_NAMES = 3  # of parameters in one message


def loss_spike(losses: Sequence[float]) -> tuple[float, float] | None:
    """(baseline, recent) medians when the last RECENT_STEPS losses clearly exceed the BASELINE_STEPS before, else None.

    Clearly: the recent median exceeds the baseline median by 0.3 and by six times the spread of the baseline (1.48
    times the median absolute deviation, which is the standard deviation of normal noise). A single bad batch is not a
    spike.
    """
    if len(losses) < BASELINE_STEPS + RECENT_STEPS:
        return None
    baseline, recent = losses[-BASELINE_STEPS - RECENT_STEPS : -RECENT_STEPS], losses[-RECENT_STEPS:]
    # medians: means would be moved by the very outliers that are to be ignored
    baseline_median, recent_median = statistics.median(baseline), statistics.median(recent)
    spread = 1.48 * statistics.median(abs(loss - baseline_median) for loss in baseline)
    return (baseline_median, recent_median) if recent_median - baseline_median > max(0.3, 6 * spread) else None


def is_lr_zero_early(lr: float, steps_left: int) -> bool:
    """Whether the learning rate is 0 with steps still to come."""
    return lr == 0 and steps_left > 0


def parameters_without_gradient(norms: dict[str, float | None]) -> list[str]:
    """Names of the parameters whose gradient is missing (None) or zero everywhere."""
    return [name for name, norm in norms.items() if norm is None or norm == 0]


def bottleneck(seconds: float, data_seconds: float, idle_share: float) -> str:
    """What keeps the device waiting: "data", "host" (the CPU that launches a GPU's work), or "" for neither.

    `seconds` of training, of which `data_seconds` were spent in the loader; before `idle_share` of the steps the GPU
    was idle.
    """
    # data first: a GPU that waits for data is idle too
    if data_seconds > MAX_DATA_SHARE * seconds:
        return "data"
    return "host" if idle_share > MAX_IDLE_SHARE else ""


class OnceWarnings:
    """Logs each kind of warning once; the monitors of a run share one."""

    def __init__(self) -> None:
        self._issued: set[str] = set()

    def __call__(self, kind: str, problem: str, advice: str) -> None:
        if kind not in self._issued:
            self._issued.add(kind)
            log(f"WARNING: {problem}\n  what to try: {advice}")


class NumbersMonitor(Sink):
    """A sink that watches loss, gradient norm and learning rate in a run of `steps` steps."""

    def __init__(self, steps: int, warn: OnceWarnings) -> None:
        self.steps, self.warn = steps, warn
        self._losses: deque[float] = deque(maxlen=BASELINE_STEPS + RECENT_STEPS)

    def step(self, report: StepReport) -> None:
        number = report.step + 1
        if math.isfinite(report.loss):  # NonFiniteMonitor reports the others
            self._losses.append(report.loss)
        # the steps are judged in groups of RECENT_STEPS, so that medians are not computed at each of them
        if number % RECENT_STEPS == 0 and (spike := loss_spike(list(self._losses))):
            baseline, recent = spike
            self.warn(
                "spike",
                f"step {number}: the loss rose from about {baseline:.2f} to {recent:.2f}",
                "wait a few hundred steps, since most spikes recover; if it stays high, resume from weights before "
                "it with half the --lr_init, a longer --warmup_steps, or a --grad_clip below the usual gradient norm",
            )
        if report.grad_norm == 0:
            self.warn(
                "gradient",
                f"step {number}: the gradient is 0, so nothing is learned",
                "check that the data has targets that count towards the loss (with --data_type sft, a larger --ctx_len "
                "keeps answers from being truncated); with --precision fp16, use bf16",
            )
        if is_lr_zero_early(report.lr, left := self.steps - number):
            self.warn(
                "lr",
                f"step {number}: the learning rate is 0, so the remaining {left:,} steps will not change the weights",
                "set --lr_final above 0 (a tenth of --lr_init is common), or --my_exit_tokens to where the schedule "
                "should end",
            )


class PaceMonitor(pl.Callback):
    """Watches what the device waits for between steps, and once which parameters receive a gradient.

    The last of the callbacks: the time between the end of one step and the begin of the next is then the loader's
    alone.
    """

    def __init__(self, warn: OnceWarnings) -> None:
        self.warn = warn
        self._gradient_check = _GradientCheck(warn)
        self._host_done = math.nan  # when the host was done with the step before
        self._device_done: torch.cuda.Event | None = None  # recorded behind the device's work on it
        self._start_window()

    def _start_window(self) -> None:
        self._steps, self._idle_steps, self._data_seconds = 0, 0, 0.0
        self._window_start = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == WARM_UP_STEPS:
            self._start_window()
        elif batch_idx > WARM_UP_STEPS:
            self._data_seconds += time.perf_counter() - self._host_done
            # `query` doesn't wait: True means that the device ran out of work before the host queued more
            self._idle_steps += self._device_done is not None and self._device_done.query()
            self._steps += 1
            if self._steps == WINDOW_STEPS:
                self._report_bottleneck()
                self._start_window()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._gradient_check.report()  # before the next is begun: the norms are read a step late
        if batch_idx == GRADIENT_CHECK_STEP:
            self._gradient_check.begin(pl_module)
        if pl_module.device.type == "cuda":
            self._device_done = self._device_done or torch.cuda.Event()
            self._device_done.record()
        self._host_done = time.perf_counter()

    def _report_bottleneck(self) -> None:
        seconds = time.perf_counter() - self._window_start
        kind = bottleneck(seconds, self._data_seconds, self._idle_steps / self._steps)
        if kind == "data":
            self.warn(
                kind,
                f"{self._data_seconds / seconds:.0%} of the time is spent waiting for data",
                "copy --data_file to a local disk (it is read in random order), leave memory free for the file cache, "
                "and check what else uses the disk and the CPU",
            )
        elif kind == "host":
            self.warn(
                kind,
                f"the GPU was idle, waiting for the CPU, before {self._idle_steps} of {self._steps} steps",
                "give the GPU more work per step with a larger --micro_bsz, as memory allows; see that --compile isn't "
                "0, for fewer and larger kernels; --profile 10 shows where the time goes",
            )


class _GradientCheck:
    """Warns about parameters that receive no gradient. Under ZeRO gradients are sharded, and nothing is checked."""

    def __init__(self, warn: OnceWarnings) -> None:
        self.warn = warn
        self._pending: tuple[list[str], PendingValues] | None = None

    def begin(self, module: pl.LightningModule) -> None:
        """Start copying the norms of all gradients to the host."""
        assert isinstance(module, TrainingModule)
        if not isinstance(module.optimizer, MasterAdamW):
            return
        named = [(name, p.grad) for name, p in module.model.named_parameters() if p.requires_grad]
        gradients = [torch.zeros((), device=module.device) if grad is None else grad for _, grad in named]
        # the largest element rather than the 2-norm: squares of tiny gradients would underflow to 0
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients, ord=math.inf)])
        self._pending = ([name for name, _ in named], PendingValues(norms))

    def report(self) -> None:
        """Read the norms that `begin` started to copy, and warn."""
        if self._pending is None:
            return
        names, norms = self._pending
        self._pending = None
        if affected := parameters_without_gradient(dict(zip(names, norms.read(), strict=True))):
            others = f" and {len(affected) - MAX_NAMES} more" if len(affected) > MAX_NAMES else ""
            self.warn(
                "parameters",
                f"no gradient reaches {', '.join(affected[:MAX_NAMES])}{others}: these parameters never change",
                "check the weights that the run started from (--load_model): a parameter gets no gradient where the "
                "matrix after it is 0 and stays 0; initial weights from --train_stage 1 do not have this problem",
            )

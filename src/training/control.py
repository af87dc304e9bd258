"""What the ranks of a run agree on between steps: to stop, to save, to roll back. And the count of steps.

A signal reaches one process, a clock runs out on one machine first; but saving is collective, and a rank that stops
alone leaves the others waiting for ever. So each rank only requests, and `RunControl` combines the requests of all
ranks after every step: what any rank requested takes effect on all of them after the same step.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytorch_lightning as pl

from src.training.distributed.process_group import PendingFlags, ProcessGroup

STOP, SAVE, ROLL_BACK = REQUESTS = ("stop", "save", "roll back")

# Seconds kept for the last save, in addition to twice what the slowest save took: another one may be under way.
TIME_LIMIT_MARGIN = 30.0
TIME_LIMIT_EXIT_CODE = 124  # as coreutils' `timeout`; signals give 128 + their number, as shells report them

SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


class RunControl(pl.Callback):
    """Counts the steps of the run and combines the requests of its ranks. The first callback: the others rely on both.

    With several processes the flags travel on the CPU while the next step computes, so that no device and no other rank
    is waited for; they take effect one step later. With one process they take effect at once.
    """

    def __init__(self, process_group: ProcessGroup, first_step: int) -> None:
        # optimizer steps taken since the run began, those before this start included
        self.step = process_group.step = first_step
        self.step_ended = False  # whether the micro step that was just taken completed an optimizer step
        self.paused_seconds = 0.0  # spent on validation, which is not counted as training time
        self.reserved_seconds: dict[str, float] = {}  # by purpose: needed before the next chance to stop
        self._process_group = process_group
        self._first_step = first_step
        self._requested: set[str] = set()
        self._agreed: set[str] = set()
        self._saved_last = False  # whether a save was agreed on after the step before
        self._pending: PendingFlags | None = None

    def request(self, name: str) -> None:
        """Ask all ranks to STOP, SAVE or ROLL_BACK after a step. Safe in a signal handler."""
        self._requested.add(name)

    def agree(self, name: str) -> None:
        """Record what all ranks have agreed on elsewhere; called on every rank at the same step."""
        self._agreed.add(name)

    def is_agreed(self, *names: str) -> bool:
        """Whether any of `names` is to be done now: the same on every rank."""
        return any(name in self._agreed for name in names)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in this block is not counted as training time, neither for tokens per second nor for a step's length."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.paused_seconds += time.monotonic() - begin

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = self._first_step + trainer.global_step
        self.step_ended = step > self.step
        if not self.step_ended:
            return  # one of the micro steps of --accumulate_grad_batches
        self.step = self._process_group.step = step
        # a save was done after the step before; stopping and rolling back stay agreed until the fit ends
        self._agreed.discard(SAVE)
        self._exchange()
        if self.is_agreed(STOP, ROLL_BACK):
            trainer.should_stop = True

    def _exchange(self) -> None:
        outgoing = self._process_group.any_rank([name in self._requested for name in REQUESTS])
        arrived = outgoing if self._process_group.world_size == 1 else self._pending
        self._pending = outgoing
        self._requested.discard(SAVE)
        if arrived is not None:
            self._agree_on(arrived)
        # While a request to save is on its way, the clocks of this rank and others request again: that save is done.
        if self._saved_last:
            self._agreed.discard(SAVE)
        self._saved_last = SAVE in self._agreed

    def _agree_on(self, flags: PendingFlags) -> None:
        self._agreed |= {name for name, flag in zip(REQUESTS, flags.wait(), strict=True) if flag}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # No collective may be under way when the process group is destroyed. And a stop that was requested during the
        # last step, or while the last save was waited for, must not be lost where the run rolls back instead of ending.
        if self._pending is not None:
            self._agree_on(self._pending)
        self._agree_on(self._process_group.any_rank([name in self._requested for name in REQUESTS]))


class StepCallback(pl.Callback):
    """Base class for callbacks that act after an optimizer step: hides the micro steps."""

    def __init__(self, control: RunControl) -> None:
        self.control = control

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.control.step_ended:
            self.after_step(trainer, pl_module, self.control.step - 1)

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """`step` is the number of the step that was just taken, from 0 for the first of the run."""
        raise NotImplementedError


class GracefulStop(StepCallback):
    """Requests a stop on Ctrl-C, SIGTERM, a closed terminal and when --time_limit is near; a second Ctrl-C interrupts
    at once.

    The run then ends after the step under way, with its state saved.
    """

    def __init__(self, control: RunControl, ends_at: float) -> None:
        """`ends_at` by time.monotonic(): when the process has to be gone; infinity without a limit."""
        super().__init__(control)
        self.received = 0  # the number of the first signal
        self.ran_out_of_time = False  # before any signal came
        self._ends_at = ends_at
        self._longest_step, self._step_began = 0.0, math.inf
        self._previous_handlers: dict[int, Any] = {}

    @property
    def has_time_limit(self) -> bool:
        return math.isfinite(self._ends_at)

    def must_stop(self, excluding: str = "") -> bool:
        """Whether this rank has to stop. `excluding`: a purpose whose reserved seconds are being spent right now."""
        return bool(self.received) or self.is_out_of_time(excluding)

    def is_out_of_time(self, excluding: str = "") -> bool:
        reserved = sum(seconds for name, seconds in self.control.reserved_seconds.items() if name != excluding)
        # A request takes effect after the next step, with several processes one step later; the third is a reserve.
        needed = TIME_LIMIT_MARGIN + 3 * self._longest_step + reserved
        return time.monotonic() + needed >= self._ends_at

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not earlier: Lightning installs a SIGTERM handler of its own, which would end the run without saving.
        for number in SIGNALS:
            # nohup makes processes ignore SIGHUP, which stays so. Shells make their background jobs ignore SIGINT; a
            # `kill -INT` is meant all the same.
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
                self._previous_handlers[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number
        self.control.request(STOP)

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        now = time.monotonic() - self.control.paused_seconds
        self._longest_step = max(self._longest_step, now - self._step_began)  # the first has no beginning: -infinity
        self._step_began = now
        if self.is_out_of_time():
            self.ran_out_of_time = self.ran_out_of_time or not self.received
            self.control.request(STOP)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore_handlers()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()  # Lightning calls no teardown hook after an exception

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            if signal.getsignal(number) == self._receive:  # Lightning, whose turn comes first, has restored SIGTERM's
                signal.signal(number, handler)
        self._previous_handlers = {}

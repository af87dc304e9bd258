"""What ranks agree on between steps, with ranks that are objects of this process: requests take effect on all at the
same step."""

import math
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from src.training.control import ROLL_BACK, SAVE, STOP, TIME_LIMIT_MARGIN, GracefulStop, RunControl, StepCallback
from src.training.distributed.process_group import PendingFlags, ProcessGroup


class Ranks:
    """Process groups of several ranks: a rank's flags are combined with those of the others once all have sent
    theirs."""

    def __init__(self, count):
        self.rounds = []
        self.groups = [_Rank(self, rank, count) for rank in range(count)]


class _Rank(ProcessGroup):
    def __init__(self, ranks, rank, count):
        self.ranks, self.rank, self.world_size, self.sent = ranks, rank, count, 0

    def any_rank(self, flags):
        if len(self.ranks.rounds) == self.sent:
            self.ranks.rounds.append(torch.zeros(len(flags), dtype=torch.int32))
        combined = self.ranks.rounds[self.sent]
        self.sent += 1
        combined |= torch.tensor(list(flags), dtype=torch.int32)
        return PendingFlags(combined)


def take_step(controls, trainers):
    for control, trainer in zip(controls, trainers, strict=True):
        trainer.global_step += 1
        control.on_train_batch_end(trainer, None, None, None, trainer.global_step - 1)


def trainers(count):
    return [SimpleNamespace(global_step=0, should_stop=False) for _ in range(count)]


def test_a_process_that_is_alone_agrees_with_itself_at_once():
    (trainer,) = trainers(1)
    control = RunControl(ProcessGroup(), first_step=7)
    control.request(SAVE)
    assert not control.is_agreed(SAVE)
    take_step([control], [trainer])
    assert control.is_agreed(SAVE)
    assert not control.is_agreed(STOP, ROLL_BACK)
    assert control.step == 8
    assert not trainer.should_stop
    take_step([control], [trainer])
    assert not control.is_agreed(SAVE)  # done once


@pytest.mark.parametrize("request_of", [0, 1, 2])
@pytest.mark.parametrize("name", [SAVE, STOP, ROLL_BACK])
def test_what_one_rank_requests_takes_effect_on_all_at_the_same_step(name, request_of):
    three, controls = trainers(3), [RunControl(group, 0) for group in Ranks(3).groups]
    effects = []
    for step in range(6):
        if step == 2:
            controls[request_of].request(name)
        take_step(controls, three)
        effects.append([control.is_agreed(name) for control in controls])
    assert all(len(set(ranks)) == 1 for ranks in effects)
    assert [ranks[0] for ranks in effects[:4]] == [
        False,
        False,
        False,
        True,
    ]  # one step late, while the next one computes
    assert [ranks[0] for ranks in effects[4:]] == ([False, False] if name == SAVE else [True, True])
    assert all(trainer.should_stop == (name != SAVE) for trainer in three)


def test_micro_steps_are_no_steps():
    seen = []

    class Recorder(StepCallback):
        def after_step(self, trainer, pl_module, step):
            seen.append(step)

    (trainer,) = trainers(1)
    control = RunControl(ProcessGroup(), first_step=10)
    recorder = Recorder(control)
    for micro_step in range(9):
        trainer.global_step = (micro_step + 1) // 3
        for callback in (control, recorder):
            callback.on_train_batch_end(trainer, None, None, None, micro_step)
    assert seen == [10, 11, 12]
    assert control.step == 13


def test_the_time_limit_leaves_room_for_what_is_reserved(monkeypatch):
    control = RunControl(ProcessGroup(), 0)
    stop = GracefulStop(control, ends_at=time.monotonic() + 100)
    assert not stop.must_stop()
    control.reserved_seconds["save"] = 80
    assert stop.must_stop()
    assert not stop.must_stop(excluding="save")
    assert not GracefulStop(control, math.inf).must_stop()


def test_the_time_limit_leaves_room_for_three_of_the_longest_steps(monkeypatch):
    """Of 100 seconds each, but for the time of a validation; a short one that follows is not the longest."""
    now = [0.0]
    monkeypatch.setattr("src.training.control.time", SimpleNamespace(monotonic=lambda: now[0]))
    control = RunControl(ProcessGroup(), 0)
    stop = GracefulStop(control, ends_at=1000.0)
    for seconds in (0, 100, 10):
        with control.paused():
            now[0] += 50
        now[0] += seconds
        stop.after_step(None, None, 0)
    now[0] = 1000 - 3 * 100 - TIME_LIMIT_MARGIN - 1
    assert not stop.must_stop()
    now[0] += 1
    assert stop.must_stop()


@pytest.mark.parametrize("has_failed", [False, True])
def test_a_signal_requests_a_stop_and_a_second_ctrl_c_interrupts(has_failed):
    control = RunControl(ProcessGroup(), 0)
    stop = GracefulStop(control, math.inf)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop.on_train_start(None, None)
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    (trainer,) = trainers(1)
    take_step([control], [trainer])
    assert trainer.should_stop
    assert stop.received == signal.SIGINT  # the first decides on the exit code
    if has_failed:
        stop.on_exception(None, None, KeyboardInterrupt())
    else:
        stop.teardown(None, None, "fit")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_ignored_signals_stay_ignored_but_for_ctrl_c():
    """nohup ignores SIGHUP, and shells let their background jobs ignore SIGINT; a `kill -INT` is meant all the same."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        stop = GracefulStop(RunControl(ProcessGroup(), 0), math.inf)
        stop.on_train_start(None, None)
        assert signal.getsignal(signal.SIGHUP) == signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, signal.SIG_DFL)
        stop.teardown(None, None, "fit")
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        stop.on_train_start(None, None)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # by something else, in the meantime
        stop.teardown(None, None, "fit")
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_save_that_two_ranks_request_one_after_another_is_done_once():
    """Their clocks run out a step apart; and while a request is on its way, the same rank requests again."""
    three, controls = trainers(3), [RunControl(group, 0) for group in Ranks(3).groups]
    saves = []
    for step in range(8):
        if step in (2, 3):
            controls[0].request(SAVE)
        if step == 3:
            controls[1].request(SAVE)
        take_step(controls, three)
        saves.append(controls[2].is_agreed(SAVE))
    assert saves.count(True) == 1


def test_a_stop_in_the_tail_of_a_fit_is_not_lost():
    """As of a signal while the last save is waited for, in a fit that rolls back."""
    control = RunControl(ProcessGroup(), 0)
    (trainer,) = trainers(1)
    take_step([control], [trainer])
    control.request(STOP)
    assert not control.is_agreed(STOP)
    control.on_train_end(trainer, None)
    assert control.is_agreed(STOP)


def test_no_exchange_is_under_way_after_a_fit(monkeypatch):
    """The process group may be destroyed then."""
    waited, wait = [], PendingFlags.wait
    monkeypatch.setattr(PendingFlags, "wait", lambda self: waited.append(self) or wait(self))
    ranks, three = Ranks(3), trainers(3)
    controls = [RunControl(group, 0) for group in ranks.groups]
    for _ in range(2):
        take_step(controls, three)
    for control, trainer in zip(controls, three, strict=True):
        control.on_train_end(trainer, None)
    assert len(waited) == sum(group.sent for group in ranks.groups)


def test_the_reason_of_a_stop_is_what_came_first():
    control = RunControl(ProcessGroup(), 0)
    stop = GracefulStop(control, ends_at=time.monotonic() + 10)  # within the margin: the time is over
    stop.received = signal.SIGTERM
    stop.after_step(None, None, 0)
    assert not stop.ran_out_of_time
    other = GracefulStop(control, ends_at=time.monotonic() + 10)
    other.after_step(None, None, 0)
    assert other.ran_out_of_time

"""The health monitors: each criterion by numbers, each warning once, and the callback's hooks as a fit calls them."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

from src.training.control import ROLL_BACK, RunControl
from src.training.distributed.process_group import ProcessGroup
from src.training.module import TrainingModule
from src.training.optim import LOSS_SCALE_POWER, MasterAdamW
from src.training.reporting.health import (
    BASELINE_STEPS,
    RECENT_STEPS,
    NumbersMonitor,
    OnceWarnings,
    PaceMonitor,
    bottleneck,
    is_lr_zero_early,
    loss_spike,
    parameters_without_gradient,
)
from src.training.reporting.non_finite import NonFiniteMonitor
from src.training.reporting.sink import StepReport


def falling(count, noise, seed=0):
    """Losses like those of a run: from 9 towards 3, with normal noise."""
    random.seed(seed)
    return [3 + 6 * math.exp(-i / 50) + random.gauss(0, noise) for i in range(count)]


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_noise_is_not_a_spike(noise):
    losses = falling(600, noise)
    assert not any(loss_spike(losses[: i + 1]) for i in range(len(losses)))


@pytest.mark.parametrize(("noise", "rise"), [(0.01, 0.5), (0.1, 1.0), (0.3, 3.0)])
def test_a_spike_is_detected_within_a_few_steps(noise, rise):
    losses = falling(600, noise)
    losses += [3.0 + rise + random.gauss(0, noise) for _ in range(RECENT_STEPS)]
    baseline, recent = loss_spike(losses)
    assert baseline == pytest.approx(3.0, abs=0.2)
    assert recent == pytest.approx(baseline + rise, abs=4 * noise)


@pytest.mark.parametrize(
    ("baseline", "recent", "expected"),
    [
        ([3.0] * 100, [3.3] * 5, False),  # 0.3 is the least rise
        ([3.0] * 100, [3.31] * 5, True),
        ([2.9, 3.1] * 50, [3.0 + 0.88] * 5, False),  # six times 1.48 * 0.1
        ([2.9, 3.1] * 50, [3.0 + 0.90] * 5, True),
        ([3.0] * 100, [9.0, 3.0, 9.0, 3.0, 9.0], True),  # more than half of the recent ones
        ([3.0] * 100, [9.0, 3.0, 9.0, 3.0, 3.0], False),
        ([3.0] * 99, [9.0] * 5, False),  # the baseline is too short
        ([9.0] * 60 + [3.0] * 40, [9.0] * 5, False),  # of a hundred
        ([9.0] * 49 + [3.0] * 51, [9.0] * 5, True),
        ([9.0] * 500 + [3.0] * 100, [4.0] * 5, True),  # what is older doesn't count
    ],
)
def test_when_a_rise_is_a_spike(baseline, recent, expected):
    assert (loss_spike([*baseline, *recent]) is not None) == expected


def test_single_bad_batches_are_not_a_spike():
    losses = [*falling(400, 0.1), 9.0, 3.0, 9.0, 3.0, 3.0]
    assert loss_spike(losses) is None
    assert loss_spike([5.0] * (BASELINE_STEPS - 1) + [50.0] * RECENT_STEPS) is None  # the baseline is too short


def test_a_learning_rate_of_0_before_the_end():
    assert is_lr_zero_early(0.0, 100)
    assert not is_lr_zero_early(0.0, 0)  # the last step of a run with --lr_final 0
    assert not is_lr_zero_early(1e-9, 100)


def test_parameters_without_a_gradient():
    assert parameters_without_gradient({"a": 1e-30, "b": 0.0, "c": None, "d": math.inf}) == ["b", "c"]


@pytest.mark.parametrize(
    ("seconds", "data_seconds", "idle_share", "expected"),
    [
        *((10, 0.1, 0.0, ""), (10, 3, 0.0, "data"), (10, 0.1, 0.95, "host"), (10, 5, 1.0, "data"), (10, 0.9, 0.7, "")),
        *((100, 10, 0.0, ""), (100, 10.1, 0.0, "data"), (100, 1, 0.8, ""), (100, 1, 0.81, "host")),
    ],
)
def test_what_the_device_waits_for(seconds, data_seconds, idle_share, expected):
    assert bottleneck(seconds, data_seconds, idle_share) == expected


def report(step, loss=3.0, lr=1e-3, grad_norm=0.5):
    return StepReport(step=step, tokens=step * 10, loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_second=1e3)


def test_each_warning_is_logged_once_with_what_to_try(capsys):
    monitor = NumbersMonitor(steps=1000, warn=OnceWarnings())
    for step, loss in enumerate(falling(200, 0.05)):
        monitor.step(report(step, loss))
    assert capsys.readouterr().out == ""
    for step in range(200, 220):
        monitor.step(report(step, 8.0, lr=0.0, grad_norm=0.0))
    output = capsys.readouterr().out
    assert output.count("WARNING") == output.count("what to try") == 3
    assert "from about 3." in output
    for flag in ("--lr_init", "--lr_final", "--ctx_len"):
        assert flag in output
    monitor.step(report(220, math.nan, grad_norm=math.nan))  # NonFiniteMonitor reports it
    assert capsys.readouterr().out == ""


def test_a_spike_is_looked_for_every_5_steps(capsys):
    monitor = NumbersMonitor(steps=1000, warn=OnceWarnings())
    for step in range(104):
        monitor.step(report(step, 3.0 if step < 100 else 9.0))
    assert capsys.readouterr().out == ""
    monitor.step(report(104, 9.0))
    assert "step 105: the loss rose from about 3.00 to 9.00" in capsys.readouterr().out


def is_rolled_back(control, global_step):
    """Whether the ranks of `control`, of which there is one, agree on a roll-back after the next step."""
    trainer = SimpleNamespace(global_step=global_step, should_stop=False)
    control.on_train_batch_end(trainer, None, None, None, 0)
    assert trainer.should_stop == control.is_agreed(ROLL_BACK)
    return control.is_agreed(ROLL_BACK)


def test_overflows_are_not_counted_until_the_loss_scale_reaches_its_minimum():
    """fp16: the scale can be halved LOSS_SCALE_POWER times; what overflows after that has another cause."""
    control = RunControl(ProcessGroup(), first_step=0)
    monitor = NonFiniteMonitor(control, limit=3, scale_loss=True)
    for step in range(LOSS_SCALE_POWER):
        monitor.step(report(step, grad_norm=math.inf))
    assert (monitor.good, monitor.skipped, monitor.skipped_in_row) == (0, 0, 0)
    for step in range(20, 22):
        monitor.step(report(step, grad_norm=math.nan))
    assert (monitor.skipped_in_row, monitor.failed_steps) == (2, None)
    monitor.step(report(22))
    assert (monitor.good, monitor.skipped_in_row, monitor.failed_steps) == (1, 0, None)
    assert not is_rolled_back(control, global_step=1)
    for step in range(30, 30 + LOSS_SCALE_POWER + 3):
        monitor.step(report(step, grad_norm=math.inf))
    assert monitor.failed_steps == range(30 + LOSS_SCALE_POWER, 30 + LOSS_SCALE_POWER + 3)
    assert is_rolled_back(control, global_step=2)


def test_an_overflow_without_loss_scaling_is_a_skipped_step():
    monitor = NonFiniteMonitor(RunControl(ProcessGroup(), first_step=0), limit=3, scale_loss=False)
    monitor.step(report(0, grad_norm=math.inf))
    assert monitor.skipped_in_row == 1


def run_steps(monkeypatch, steps, loader_seconds, step_seconds, idle):
    """Call the hooks of PaceMonitor as a fit does, with a simulated clock and GPU."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    event = SimpleNamespace(record=lambda: None, query=lambda: idle)
    monkeypatch.setattr("torch.cuda.Event", lambda: event)
    monitor = PaceMonitor(OnceWarnings())
    module = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(monitor._gradient_check, "begin", lambda module: None)
    for step in range(steps):
        now[0] += loader_seconds(step) if callable(loader_seconds) else loader_seconds
        monitor.on_train_batch_start(None, module, None, step)
        now[0] += step_seconds
        monitor.on_train_batch_end(None, module, None, None, step)


@pytest.mark.parametrize(
    ("loader_seconds", "idle", "expected"),
    [(0.001, False, ""), (0.5, False, "33% of the time is spent waiting for data"), (0.001, True, "50 of 50 steps")],
    ids=["none", "data", "host"],
)
def test_the_bottleneck_is_reported_once(monkeypatch, capsys, loader_seconds, idle, expected):
    run_steps(monkeypatch, 200, loader_seconds, 1.0, idle)
    output = capsys.readouterr().out
    assert output.count("WARNING") == (1 if expected else 0)
    assert expected in output


def test_the_bottleneck_is_measured_over_50_steps_after_10(monkeypatch, capsys):
    run_steps(monkeypatch, 60, 0.5, 1.0, False)
    assert capsys.readouterr().out == ""
    run_steps(monkeypatch, 61, 0.5, 1.0, False)
    assert capsys.readouterr().out.count("WARNING") == 1


def test_slow_first_steps_are_no_bottleneck(monkeypatch, capsys):
    """They allocate memory and build kernels."""
    run_steps(monkeypatch, 120, lambda step: 50.0 if step <= 10 else 0.001, 1.0, False)
    assert capsys.readouterr().out == ""


def test_parameters_without_a_gradient_are_reported_once(capsys):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-30)  # whose square is 0
    model[0].bias.grad.zero_()
    model[1].bias.grad = None
    module = TrainingModule.__new__(TrainingModule)
    torch.nn.Module.__init__(module)
    module.model = model
    module._device = torch.device("cpu")
    module.optimizer = MasterAdamW.__new__(MasterAdamW)
    monitor = PaceMonitor(OnceWarnings())
    for step in range(34):
        if step == 31:  # not before step 30, whose norms are read a step late
            assert capsys.readouterr().out == ""
        monitor.on_train_batch_start(None, module, None, step)
        monitor.on_train_batch_end(None, module, None, None, step)
    output = capsys.readouterr().out
    assert output.count("WARNING") == 1
    assert "0.bias, 1.bias" in output

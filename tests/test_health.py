"""Health: each judgement with numbers, each warning once, and both watches in a real fit."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

from src.training.checkpoint.callbacks import NonFiniteMonitor
from src.training.module import TrainingModule
from src.training.optim import LOSS_SCALE_POWER, MasterAdamW
from src.training.reporting.health import (
    BEFORE,
    GRADIENTS_AT,
    LATEST,
    NumbersMonitor,
    OnceWarnings,
    PaceMonitor,
    loss_spike,
    lr_is_over,
    slow_part,
    without_gradient,
)
from src.training.reporting.sink import StepReport


def falling(count, noise, seed=0):
    """Losses as a run has them: from 9 towards 3, with normal noise."""
    random.seed(seed)
    return [3 + 6 * math.exp(-i / 50) + random.gauss(0, noise) for i in range(count)]


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_no_spike_in_the_noise_of_a_run(noise):
    losses = falling(600, noise)
    assert not any(loss_spike(losses[: i + 1]) for i in range(len(losses)))


@pytest.mark.parametrize(("noise", "rise"), [(0.01, 0.5), (0.1, 1.0), (0.3, 3.0)])
def test_spike_is_seen_within_a_few_steps(noise, rise):
    losses = falling(600, noise)
    losses += [3.0 + rise + random.gauss(0, noise) for _ in range(LATEST)]
    usual, now = loss_spike(losses)
    assert usual == pytest.approx(3.0, abs=0.2)
    assert now == pytest.approx(usual + rise, abs=4 * noise)


def test_single_bad_batches_are_no_spike():
    losses = [*falling(400, 0.1), 9.0, 3.0, 9.0, 3.0, 3.0]
    assert loss_spike(losses) is None
    assert loss_spike([5.0] * (BEFORE - 1) + [50.0] * LATEST) is None  # too little to compare with


def test_learning_rate_that_is_over():
    assert lr_is_over(0.0, 100)
    assert not lr_is_over(0.0, 0)  # --lr_final 0 ends there
    assert not lr_is_over(1e-9, 100)


def test_parameters_without_a_gradient():
    assert without_gradient({"a": 1e-30, "b": 0.0, "c": None, "d": math.inf}) == ["b", "c"]


@pytest.mark.parametrize(
    ("seconds", "waiting", "idle", "expected"),
    [(10, 0.1, 0.0, ""), (10, 3, 0.0, "data"), (10, 0.1, 0.95, "host"), (10, 5, 1.0, "data"), (10, 0.9, 0.7, "")],
)
def test_what_holds_up_the_device(seconds, waiting, idle, expected):
    assert slow_part(seconds, waiting, idle) == expected


def report(step, loss=3.0, lr=1e-3, grad_norm=0.5):
    return StepReport(step=step, tokens=step * 10, loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_second=1e3)


def test_warnings_are_given_once_with_what_to_try(capsys):
    watch = NumbersMonitor(steps=1000, warn=OnceWarnings())
    for step, loss in enumerate(falling(200, 0.05)):
        watch.step(report(step, loss))
    assert capsys.readouterr().out == ""
    for step in range(200, 220):
        watch.step(report(step, 8.0, lr=0.0, grad_norm=0.0))
    words = capsys.readouterr().out
    assert words.count("WARNING") == words.count("what to try") == 3
    assert "from about 3." in words
    for flag in ("--lr_init", "--lr_final", "--ctx_len"):
        assert flag in words
    watch.step(report(220, math.nan, grad_norm=math.nan))  # not finite: NonFiniteMonitor speaks of that
    assert capsys.readouterr().out == ""


def test_overflows_find_the_scale_until_it_has_nowhere_to_go():
    """fp16: the scale is halved sixteen times at most; what overflows after that has another cause."""
    watch = NonFiniteMonitor(3, scale_loss=True)
    for step in range(LOSS_SCALE_POWER):
        watch.step(report(step, grad_norm=math.inf))
    assert (watch.good, watch.in_row, watch.total) == (0, 0, 0)
    for step in range(20, 22):
        watch.step(report(step, grad_norm=math.nan))
    assert (watch.in_row, watch.wish()) == (2, False)
    watch.step(report(22))
    assert (watch.good, watch.in_row, watch.wish()) == (1, 0, False)
    for step in range(30, 30 + LOSS_SCALE_POWER + 3):
        watch.step(report(step, grad_norm=math.inf))
    assert watch.too_many == range(30 + LOSS_SCALE_POWER, 30 + LOSS_SCALE_POWER + 3)
    watch = NonFiniteMonitor(3, scale_loss=False)
    watch.step(report(0, grad_norm=math.inf))
    assert watch.in_row == 1


def run_steps(monkeypatch, steps, loader_seconds, step_seconds, idle):
    """The callback's two ends called as a fit calls them, under a clock and a GPU of ours."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    event = SimpleNamespace(record=lambda: None, query=lambda: idle)
    monkeypatch.setattr("torch.cuda.Event", lambda: event)
    watch = PaceMonitor(OnceWarnings())
    module = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(watch, "_look_at_gradients", lambda module: None)
    for step in range(steps):
        now[0] += loader_seconds
        watch.on_train_batch_start(None, module, None, step)
        now[0] += step_seconds
        watch.on_train_batch_end(None, module, None, None, step)


@pytest.mark.parametrize(
    ("loader_seconds", "idle", "expected"),
    [(0.001, False, ""), (0.5, False, "33% of the time goes into waiting for data"), (0.001, True, "50 of 50 steps")],
    ids=["well", "data", "host"],
)
def test_pace(monkeypatch, capsys, loader_seconds, idle, expected):
    run_steps(monkeypatch, 200, loader_seconds, 1.0, idle)
    words = capsys.readouterr().out
    assert words.count("WARNING") == (1 if expected else 0)
    assert expected in words


def test_gradients_are_looked_at_once(capsys):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[0].bias.grad.zero_()
    model[1].bias.grad = None
    module = TrainingModule.__new__(TrainingModule)
    torch.nn.Module.__init__(module)
    module.model = model
    module._device = torch.device("cpu")
    module.optimizer = MasterAdamW.__new__(MasterAdamW)
    watch = PaceMonitor(OnceWarnings())
    for step in range(GRADIENTS_AT + 3):
        watch.on_train_batch_start(None, module, None, step)
        watch.on_train_batch_end(None, module, None, None, step)
    words = capsys.readouterr().out
    assert words.count("WARNING") == 1
    assert "0.bias, 1.bias" in words

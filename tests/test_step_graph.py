"""Training steps in a CUDA graph, without a GPU: which runs have one, and its bookkeeping around a stand-in."""

import warnings
from functools import partial

import pytest
import torch
from test_gpu_step import tokens as _tokens
from test_gpu_step import train
from torch.utils._pytree import tree_leaves

from src.config import RunConfig
from src.errors import UserError
from src.training import module
from src.training.hardware.selection import Hardware, captures_steps
from src.training.hardware.step_graph import WARM_UP_STEPS, StepGraph
from src.training.optim import MasterAdamW

tokens = _tokens
ONE_GPU = Hardware("gpu", 1, 1, "bf16", "plain")


@pytest.mark.parametrize(
    ("changed", "hardware"),
    [
        ({}, Hardware("cpu", 1, 1, "fp32", "plain")),
        ({}, Hardware("gpu", 2, 1, "bf16", "ddp")),
        ({}, Hardware("gpu", 2, 1, "bf16", "deepspeed", stage=2)),
        ({}, Hardware("gpu", 1, 1, "fp16", "plain")),
        ({"accumulate_grad_batches": 2}, ONE_GPU),
        ({"data_type": "sft"}, ONE_GPU),
        ({"document_states": True}, ONE_GPU),
        ({"chunk_ctx": 16}, ONE_GPU),
        ({"lora_dropout": 0.1}, ONE_GPU),
        ({"kernel": "reference"}, ONE_GPU),
    ],
    ids=str,
)
def test_steps_that_change_are_not_captured(changed, hardware):
    assert not captures_steps(RunConfig(**changed), hardware)
    assert not captures_steps(RunConfig(cuda_graph="off", **changed), hardware)
    with pytest.raises(UserError) as caught:
        captures_steps(RunConfig(cuda_graph="on", **changed), hardware)
    assert (caught.value.flag, caught.value.given) == ("cuda_graph", "on")


@pytest.mark.parametrize(("choice", "expected"), [("auto", True), ("on", True), ("off", False)])
def test_rows_of_one_length_on_one_gpu_are_captured(choice, expected):
    assert captures_steps(RunConfig(cuda_graph=choice), ONE_GPU) is expected


class StandIn:
    """As a capture: the step's effects come with each replay, and its results lie where the capture put them."""

    def __init__(self, disturb=lambda: None):
        self.disturb, self.captured, self.replays = disturb, 0, 0

    def __call__(self, step):
        self.captured += 1
        graph, optimizer = step.__self__, step.__self__.optimizer
        held = [*optimizer.parameters, *optimizer.masters, optimizer.skipped_steps, optimizer.grad_norm]
        held += [x for p in optimizer.parameters for x in optimizer.moments(p).values()]
        before = [x.detach().clone() for x in held]
        step()
        output = graph._output
        with torch.no_grad():
            for x, value in zip(held, before, strict=True):
                x.copy_(value)

        def replay():
            self.replays += 1
            self.disturb()
            optimizer.zero_grad()
            step()
            for to, value in zip(tree_leaves(output), tree_leaves(graph._output), strict=True):
                to.copy_(value)
            graph._output = output

        return replay


class Training:
    """A linear model on rows of numbers, its steps in the order in which Lightning makes them."""

    def __init__(self, record=None):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 3).bfloat16()
        groups = [
            {"params": [self.model.weight], "lr_scale": 1.0, "weight_decay": 0.1},
            {"params": [self.model.bias], "lr_scale": 2.0, "weight_decay": 0.0},
        ]
        self.optimizer = MasterAdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-18, grad_clip=0.5)
        self.graph = None if record is None else StepGraph(self.forward, self.optimizer, record)
        self.forwards, self.replayed, self.losses = 0, [], []

    def forward(self, batch):
        self.forwards += 1
        loss = (self.model(batch[0]) - batch[1]).square().mean().float()
        return {"loss": loss, "metrics": {}}

    def step(self, batch, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        def closure():
            output = (self.graph or self.forward)(batch)
            if not (replayed := self.graph is not None and self.graph.replayed):
                self.optimizer.zero_grad()
                output["loss"].backward()
            self.replayed.append(replayed)
            self.losses.append(output["loss"].item())

        self.optimizer.step(closure)


def batches(other_shape=-1, not_finite=-1):
    draw = torch.Generator().manual_seed(1)
    for number in range(8):
        rows = 3 if number == other_shape else 5
        x, y = (torch.randn(rows, size, generator=draw).bfloat16() for size in (4, 3))
        if number == not_finite:
            x[0, 0] = float("nan")
        yield x, y


def trained(record=None, **kinds):
    training = Training(record)
    for number, batch in enumerate(batches(**kinds)):
        training.step(batch, 1e-2 * (1 + number % 3))
    return training


def assert_equal(one, other):
    for a, b in zip(one.optimizer.masters, other.optimizer.masters, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(torch.tensor(one.losses), torch.tensor(other.losses), rtol=0, atol=0, equal_nan=True)
    assert one.optimizer.counters() == other.optimizer.counters()


@pytest.mark.parametrize("kinds", [{}, {"other_shape": 6}, {"not_finite": 5}], ids=str)
def test_replayed_steps_are_the_steps(kinds):
    """Rates, batches and a step that is skipped reach the graph; another shape is computed without it."""
    record = StandIn()
    training = trained(record, **kinds)
    assert_equal(training, trained(**kinds))
    assert record.captured == 1
    other = kinds.get("other_shape")
    assert training.replayed == [WARM_UP_STEPS <= number != other for number in range(8)]
    assert record.replays == 1 + sum(training.replayed)  # and the one that is compared
    assert training.optimizer.skipped_steps == ("not_finite" in kinds)


def test_a_first_replay_of_a_step_that_is_not_finite_is_no_difference():
    training = trained(StandIn(), not_finite=WARM_UP_STEPS)
    assert_equal(training, trained(not_finite=WARM_UP_STEPS))
    assert sum(training.replayed) == 8 - WARM_UP_STEPS


def test_a_capture_that_fails_gives_one_warning_and_the_same_training():
    def fail(step):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    with pytest.warns(UserWarning, match=r"not permitted when stream is capturing\): it runs without") as caught:
        training = trained(fail)
    assert len(caught) == 1
    assert not any(training.replayed)
    assert_equal(training, trained())


def test_a_graph_that_computes_something_else_is_not_used():
    training = Training()
    record = StandIn(disturb=lambda: training.model.weight.data.mul_(1.5))
    training.graph = StepGraph(training.forward, training.optimizer, record)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in batches():
            training.step(batch, 1e-2)
    assert [("instead of" in str(w.message), "--cuda_graph off" in str(w.message)) for w in caught] == [(True, True)]
    assert not any(training.replayed)


def test_a_run_of_replayed_steps_is_the_run_without(tokens, tmp_path, monkeypatch):
    """Lightning's loop and all callbacks around replays: the same weights, bit for bit."""
    record, weights = StandIn(), []
    for captured in (False, True):
        monkeypatch.setattr(module, "captures_steps", lambda *args, captured=captured: captured)
        monkeypatch.setattr(MasterAdamW, "can_be_captured", True)
        monkeypatch.setattr(module, "StepGraph", partial(StepGraph, record=record))
        assert train(tokens, tmp_path / str(captured), accelerator="cpu", precision="bf16") == 0
        weights.append(torch.load(tmp_path / str(captured) / "rwkv-final.pth"))
    assert (record.captured, record.replays) == (1, 12 - WARM_UP_STEPS + 1)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    columns = [(tmp_path / str(captured) / "metrics.csv").read_text() for captured in (False, True)]
    losses = [[line.split(",")[:3] for line in text.splitlines()] for text in columns]
    assert losses[0] == losses[1]

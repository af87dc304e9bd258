"""Thin products of token-shifted inputs as one product: the same numbers as one by one, and in a block."""

import pytest
import torch

from src.model import ModelConfig, layers
from src.model.layers import Block
from src.ops import shifted_products
from src.ops.reference import token_shift_reference

SHAPES = {
    "fresh": (2, None, False),
    "carried": (2, None, True),
    "packed": (1, [0, 0, 3, 9, 9, 20], False),
    "packed, carried": (1, [0, 0, 3, 9, 9, 20], True),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def problem(batch, bounds, carried, dtype):
    x = torch.randn(batch, 20, 32)
    last = torch.randn(batch if bounds is None else len(bounds) - 1, 32) if carried else None
    mixes = [torch.rand(1, 1, 32) for _ in range(3)]
    matrices = [torch.randn(32, size) for size in (4, 7, 2)]
    tensors = [t if t is None else t.to(dtype).requires_grad_() for t in (x, last, *mixes, *matrices)]
    return tensors, None if bounds is None else torch.tensor(bounds, dtype=torch.int32)


def one_by_one(x, last, bounds, mixes, matrices):
    mixed = token_shift_reference(x, last, bounds, tuple(mixes))
    return [y @ matrix for y, matrix in zip(mixed, matrices, strict=True)]


def together(x, last, bounds, mixes, matrices):
    return shifted_products(x, last, bounds, list(zip(mixes, matrices, strict=True)))


def outputs_and_gradients(function, tensors, bounds):
    x, last, *parameters = tensors
    outputs = list(function(x, last, bounds, parameters[:3], parameters[3:]))
    leaves = [t for t in tensors if t is not None]
    return outputs + list(torch.autograd.grad(outputs, leaves, [y.detach().cos() for y in outputs]))


@pytest.mark.parametrize(("batch", "bounds", "carried"), SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(batch, bounds, carried):
    tensors, bounds = problem(batch, bounds, carried, torch.float64)
    results = [outputs_and_gradients(function, tensors, bounds) for function in (together, one_by_one)]
    for got, true in zip(*results, strict=True):
        torch.testing.assert_close(got, true)


def test_bf16_loses_no_more_than_one_by_one():
    tensors, _ = problem(2, None, True, torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    cotangents = [torch.randn(2, 20, size).bfloat16() for size in (4, 7, 2)]

    def run(function, tensors):
        x, last, *parameters = tensors
        outputs = list(function(x, last, None, parameters[:3], parameters[3:]))
        return outputs + list(torch.autograd.grad(outputs, tensors, [c.to(x.dtype) for c in cotangents]))

    true, got, plain = run(one_by_one, exact), run(together, tensors), run(one_by_one, tensors)
    for t, g, p in zip(true, got, plain, strict=True):
        assert (g - t).norm() <= 2 * (p - t).norm() + 1e-3 * t.norm()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("bounds", [None, [0, 4, 4, 10]], ids=["rows", "packed"])
def test_a_block_is_the_same(layer, bounds, monkeypatch):
    block = Block(ModelConfig(2, 64, 10, head_size=32, kernel="reference"), layer).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, v_first = (torch.randn(1, 10, 64, dtype=torch.float64) for _ in range(2))
    bounds = bounds and torch.tensor(bounds, dtype=torch.int32)
    trained = [p for p in block.parameters() if p.requires_grad]
    results = []
    for gathered in (True, False):
        monkeypatch.setattr(layers, "gathers_products", lambda x, gathered=gathered: gathered)
        out, _, _ = block(x, v_first if layer else None, None, bounds)
        results.append([out, *torch.autograd.grad(out.square().sum(), trained)])
    for got, true in zip(*results, strict=True):
        torch.testing.assert_close(got, true)

"""The fused activation: value, gradients and layouts against plain PyTorch."""

import importlib

import pytest
import torch

from src.ops import relu_squared
from src.ops.reference import relu_squared_reference

module = importlib.import_module("src.ops.relu_squared")


@pytest.mark.parametrize("shape", [(), (1,), (17,), (2, 3, 64), (0, 4), (5, 33)])
def test_equals_plain_pytorch(shape):
    torch.manual_seed(0)
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    got, want = (torch.autograd.grad(f(x), x, dy)[0] for f in (relu_squared, relu_squared_reference))
    assert torch.equal(relu_squared(x), relu_squared_reference(x))
    assert torch.allclose(got, want, rtol=1e-6, atol=0)


def test_transposed_input_and_expanded_gradient():
    x = torch.randn(7, 40).t().requires_grad_()
    got, want = (torch.autograd.grad(f(x).sum(), x)[0] for f in (relu_squared, relu_squared_reference))
    assert torch.allclose(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    x, dy = torch.randn(33).to(dtype).requires_grad_(), torch.randn(33).to(dtype)
    assert torch.equal(relu_squared(x), relu_squared_reference(x))
    got, want = (torch.autograd.grad(f(x), x, dy)[0] for f in (relu_squared, relu_squared_reference))
    torch.testing.assert_close(got, want)


def test_infinities_and_nan():
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0])
    assert torch.equal(relu_squared(x).nan_to_num(nan=7), torch.tensor([float("inf"), 0.0, 7.0, 0.0]).nan_to_num(nan=7))


def test_opcheck():
    if not module._native():
        pytest.skip("no native library on this machine")
    torch.library.opcheck(torch.ops.rwkv7.relu_squared.default, (torch.randn(3, 20, requires_grad=True),))


def test_second_derivative():
    x = torch.randn(20, requires_grad=True)
    seconds = []
    for f in (relu_squared, relu_squared_reference):
        (first,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert torch.allclose(*seconds)

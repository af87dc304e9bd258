"""Products with weights on a CPU with matrix units: the weight's gradient against plain PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F

from src.model import RWKV7, ModelConfig
from src.ops import linear, product


@pytest.fixture(autouse=True)
def _matrix_units():
    if not product._matrix_units():
        pytest.skip("no native library for matrix units on this machine")
    torch.manual_seed(0)


# one number; parts of a block; several chunks of tokens (2048), whole ones too, of columns of a (1024) and of b (2048)
SIZES = [(1, 1, 1), (7, 33, 40), (64, 32, 96), (2100, 70, 33), (4096, 33, 40), (4200, 40, 64), (70, 1030, 2100)]


@pytest.mark.parametrize(("tokens", "outputs", "inputs"), SIZES, ids=str)
def test_weight_gradient(tokens, outputs, inputs):
    a, b = torch.randn(tokens, outputs).bfloat16(), torch.randn(tokens, inputs).bfloat16()
    exact = a.double().t() @ b.double()
    got, plain = product.weight_gradient(a, b), a.t() @ b
    assert got.dtype == torch.bfloat16
    assert (got - exact).norm() <= 2 * (plain - exact).norm() + 1e-7 * exact.norm()


def test_strided_operands_and_threads_change_no_bit():
    a, b = torch.randn(300, 200).bfloat16(), torch.randn(300, 700).bfloat16()
    got = product.weight_gradient(a, b)
    assert torch.equal(product.weight_gradient(a.t().contiguous().t(), b), got)
    assert torch.equal(product.weight_gradient(torch.cat([a, a], 1)[:, 200:], b), got)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        assert torch.equal(product.weight_gradient(a, b), got)
    finally:
        torch.set_num_threads(threads)


def test_not_a_number_and_infinity_stay_visible():
    a, b = torch.ones(64, 64).bfloat16(), torch.ones(64, 64).bfloat16()
    a[5, 3], b[6, 4] = torch.nan, torch.inf
    got = product.weight_gradient(a, b)
    assert got[3].isnan().all()
    assert got[7, 4] == torch.inf
    assert got[7, 5] == 64


def test_linear_has_the_gradients_of_plain_pytorch():
    x = torch.randn(2, 40, 64).bfloat16().requires_grad_()
    weight = torch.randn(96, 64).bfloat16().requires_grad_()
    d = torch.randn(2, 40, 96).bfloat16()
    y, plain = linear(x, weight), F.linear(x, weight)
    assert "_Linear" in type(y.grad_fn).__name__
    assert torch.equal(y, plain)
    for got, wanted in zip(
        torch.autograd.grad(y, (x, weight), d), torch.autograd.grad(plain, (x, weight), d), strict=True
    ):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2**-7)


def test_a_model_uses_it_unless_it_is_plain():
    """And a frozen weight needs no gradient: PyTorch's product."""

    def uses(model):
        loss = model(torch.arange(8).view(1, 8))[0].float().sum()
        seen, todo = set(), [loss.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [before for before, _ in node.next_functions]
        return sum("_Linear" in type(node).__name__ for node in seen)

    sizes = {"vocab_size": 32, "n_layer": 1, "n_embd": 64}
    assert uses(RWKV7(ModelConfig(**sizes)).bfloat16()) == 7  # six in the block, and the head
    assert uses(RWKV7(ModelConfig(**sizes, kernel="portable")).bfloat16()) == 0
    frozen = RWKV7(ModelConfig(**sizes)).bfloat16()
    frozen.head.weight.requires_grad_(False)
    assert uses(frozen) == 6

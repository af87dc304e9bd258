"""Products with weights on a CPU with matrix units, against plain PyTorch in float64; and without them."""

import pytest
import torch
import torch.nn.functional as F

from src.model import RWKV7, ModelConfig
from src.ops import linear, product

units = pytest.mark.usefixtures("matrix_units")


@pytest.fixture
def matrix_units():
    if not product._matrix_units():
        pytest.skip("no native library for matrix units on this machine")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# one number; parts of a block; chunks of tokens (512), whole ones too, parts of columns of a (256) and of b (512)
SIZES = [(1, 1, 1), (7, 33, 40), (64, 32, 96), (1100, 70, 33), (1024, 33, 40), (4096, 33, 40), (70, 530, 1100)]


@units
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), SIZES, ids=str)
def test_weight_gradient(tokens, outputs, inputs):
    a, b = torch.randn(tokens, outputs).bfloat16(), torch.randn(tokens, inputs).bfloat16()
    exact = a.double().t() @ b.double()
    got, plain = product.weight_gradient(a, b), a.t() @ b
    assert got.dtype == torch.bfloat16
    assert (got - exact).norm() <= 2 * (plain - exact).norm() + 1e-7 * exact.norm()


# tokens, inner, outputs: one number; parts of a block; tasks of rows (256), panels of a weight (1 MiB), streamed
PRODUCT_SIZES = [(1, 1, 1), (7, 33, 40), (64, 32, 96), (300, 70, 33), (40, 2100, 600), (520, 64, 512)]


@units
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("tokens", "inner", "outputs"), PRODUCT_SIZES, ids=str)
def test_product(tokens, inner, outputs, turned):
    x, weight = torch.randn(tokens, inner).bfloat16(), torch.randn(inner, outputs).bfloat16()
    exact, plain = x.double() @ weight.double(), x @ weight
    got = torch.ops.rwkv7.product(x, weight.t().contiguous() if turned else weight, turned)
    assert got.dtype == torch.bfloat16
    assert (got - exact).norm() <= 2 * (plain - exact).norm() + 1e-7 * exact.norm()
    strided = torch.cat([x, x], 1)[:, inner:]
    assert torch.equal(torch.ops.rwkv7.product(strided, weight, False), got)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        assert torch.equal(torch.ops.rwkv7.product(x, weight, False), got)
    finally:
        torch.set_num_threads(threads)


@units
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


@units
def test_not_a_number_and_infinity_stay_visible():
    a, b = torch.ones(64, 64).bfloat16(), torch.ones(64, 64).bfloat16()
    a[5, 3], b[6, 4] = torch.nan, torch.inf
    got = product.weight_gradient(a, b)
    assert got[3].isnan().all()
    assert got[7, 4] == torch.inf
    assert got[7, 5] == 64
    b[6, 4] = 1
    got = torch.ops.rwkv7.product(a, b, True)
    assert got[5].isnan().all()
    assert (got[6] == 64).all()


@units
def test_linear_has_the_gradients_of_plain_pytorch():
    x = torch.randn(2, 40, 64).bfloat16().requires_grad_()
    weight = torch.randn(96, 64).bfloat16().requires_grad_()
    d = torch.randn(2, 40, 96).bfloat16()
    y, plain = linear(x, weight), F.linear(x, weight)
    assert "_Linear" in type(y.grad_fn).__name__
    for got, wanted in zip(
        (y, *torch.autograd.grad(y, (x, weight), d)),
        (plain, *torch.autograd.grad(plain, (x, weight), d)),
        strict=True,
    ):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2**-7)
    assert torch.equal(linear(x, weight).relu_(), y.relu())  # what it returns may be changed in place


def test_without_matrix_units_products_are_those_of_pytorch(monkeypatch):
    monkeypatch.setattr(product, "_matrix_units", lambda: False)
    x = torch.randn(2, 40, 64).bfloat16().requires_grad_()
    weight = torch.randn(96, 64).bfloat16().requires_grad_()
    y, plain = linear(x, weight), F.linear(x, weight)
    assert type(y.grad_fn) is type(plain.grad_fn)
    assert torch.equal(y, plain)
    d = torch.randn_like(y)
    for got, wanted in zip(
        torch.autograd.grad(y, (x, weight), d), torch.autograd.grad(plain, (x, weight), d), strict=True
    ):
        assert torch.equal(got, wanted)
    rows = d.flatten(0, 1).detach()
    assert torch.equal(product.weight_gradient(rows, x.detach().flatten(0, 1)), rows.t() @ x.detach().flatten(0, 1))


@units
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

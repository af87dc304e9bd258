"""The loss: cross entropy with L2Wrap, whole and by chunks, against the plain formula in float64."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from src.ops import cross_entropy_l2wrap, linear_cross_entropy_l2wrap
from src.ops import loss as loss_module
from src.ops.reference import L2WRAP, cross_entropy_l2wrap_reference

V, C = 37, 8


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def problem(rows=(3, 7), dtype=torch.float64):
    hidden = torch.randn(*rows, C, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (3 * torch.randn(V, C, dtype=torch.float64)).to(dtype).requires_grad_()
    targets = torch.randint(0, V, rows)
    targets.view(-1)[::4] = -100
    return hidden, weight, targets


def with_gradients(loss, inputs):
    return [loss, *torch.autograd.grad(3 * loss, inputs)]


def test_reference_is_the_formula():
    hidden, weight, targets = problem()
    logits = (hidden @ weight.t()).detach().requires_grad_()
    value, grad = with_gradients(cross_entropy_l2wrap_reference(logits, targets), [logits])
    counts = targets != -100
    probability = torch.softmax(logits, -1)
    picked = probability.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(value, -picked.log()[counts].mean())
    want = probability - torch.nn.functional.one_hot(targets.clamp(min=0), V)
    largest = logits.max(-1, keepdim=True)
    want = want.scatter_add(-1, largest.indices, L2WRAP * largest.values)
    assert torch.allclose(grad, 3 * want * counts[..., None] / counts.sum(), atol=1e-12)


@pytest.mark.parametrize("chunk", [0, 1, 4, 21, 1000])
def test_chunked_is_the_formula(chunk):
    hidden, weight, targets = problem()
    want = with_gradients(cross_entropy_l2wrap_reference(hidden @ weight.t(), targets), [hidden, weight])
    got = with_gradients(linear_cross_entropy_l2wrap(hidden, weight, targets, chunk), [hidden, weight])
    for x, y in zip(got, want, strict=True):
        assert torch.allclose(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_plain_pytorch(dtype, monkeypatch):
    monkeypatch.setattr(loss_module, "ROWS", 5)  # several parts
    hidden, weight, targets = problem(dtype=dtype)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    exact = logits.detach().double().requires_grad_()
    want = with_gradients(cross_entropy_l2wrap_reference(exact, targets), [exact])
    plain = with_gradients(cross_entropy_l2wrap_reference(logits, targets), [logits])
    got = with_gradients(cross_entropy_l2wrap(logits, targets), [logits])
    assert got[0].dtype == torch.float32
    for x, p, e in zip(got, plain, want, strict=True):
        assert torch.isfinite(x).all()
        plain_error = max((p.double() - e).norm(), torch.finfo(torch.float32).eps * e.norm())
        assert (x.double() - e).norm() <= 2 * plain_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunked_low_precision_under_a_scaled_loss(dtype):
    """fp16's loss scaling must find gradients that have not underflowed before it can scale them."""
    hidden, weight, targets = problem(rows=(4, 600), dtype=dtype)
    scale = 2.0**12
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = scale * cross_entropy_l2wrap_reference(exact_hidden @ exact_weight.t(), targets)
    got = scale * linear_cross_entropy_l2wrap(hidden, weight, targets, 128)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(exact.item(), rel=1e-3 if dtype == torch.float16 else 1e-2)
    for x, e in zip(
        torch.autograd.grad(got, [hidden, weight]),
        torch.autograd.grad(exact, [exact_hidden, exact_weight]),
        strict=True,
    ):
        assert torch.isfinite(x).all()
        assert (x.double() - e).norm() / e.norm() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_l2wrap_reaches_the_target_where_it_is_the_largest_logit(dtype):
    """The usual row of a trained model: of a certain prediction L2Wrap is all that is left of the gradient."""
    logits = torch.zeros(6, 1000, dtype=dtype)
    targets = torch.arange(6) * 7
    logits[torch.arange(6), targets] = 40.0
    logits.requires_grad_()
    _, grad = with_gradients(cross_entropy_l2wrap(logits, targets), [logits])
    expected = torch.zeros(6, 1000).scatter_(1, targets[:, None], 3 * L2WRAP * 40 / 6)
    torch.testing.assert_close(grad.float(), expected, rtol=1e-2, atol=1e-9)
    hidden, weight = torch.eye(6, dtype=dtype), logits.detach().t()[:, :6].contiguous().requires_grad_()
    _, grad = with_gradients(linear_cross_entropy_l2wrap(hidden, weight, targets, 2), [weight])
    torch.testing.assert_close(grad[targets, torch.arange(6)].float(), expected[0, 0].expand(6), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_the_head_is_summed_in_fp32(dtype):
    """Over 1,200 chunks: in the weight's own dtype the later ones would be lost in the sum, as 256 + 0.5 is 256."""
    hidden, weight, _ = problem(rows=(1200,), dtype=dtype)
    with torch.no_grad():
        hidden[:] = hidden[:1]  # all push in one direction
    targets = torch.full((1200,), 3)
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = cross_entropy_l2wrap_reference(exact_hidden @ exact_weight.t(), targets)
    got = linear_cross_entropy_l2wrap(hidden, weight, targets, 1)
    (x,), (e,) = torch.autograd.grad(got, [weight]), torch.autograd.grad(exact, [exact_weight])
    assert (x.double() - e).norm() / e.norm() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("rows", [0, 5])
def test_reference_of_no_counted_token_is_zero(rows):
    logits = torch.randn(rows, V, requires_grad=True)
    value, grad = with_gradients(cross_entropy_l2wrap_reference(logits, torch.full((rows,), -100)), [logits])
    assert value == 0
    assert grad.shape == logits.shape
    assert (grad == 0).all()


def test_backward_may_run_twice_through_a_chunked_loss():
    hidden, weight, targets = problem()
    loss = linear_cross_entropy_l2wrap(hidden, weight, targets, 4)
    first, second = (torch.autograd.grad(3 * loss, [hidden, weight], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("chunk", [0, 4])
def test_nothing_counts(chunk):
    hidden, weight, targets = problem()
    value, *grads = with_gradients(
        linear_cross_entropy_l2wrap(hidden, weight, torch.full_like(targets, -100), chunk), [hidden, weight]
    )
    assert value == 0
    assert all((grad == 0).all() for grad in grads)


def test_another_ignored_index():
    hidden, weight, targets = problem()
    logits = hidden @ weight.t()
    moved = targets.masked_fill(targets == -100, V + 5)
    assert torch.equal(cross_entropy_l2wrap(logits, moved, V + 5), cross_entropy_l2wrap(logits, targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_takes_the_place_of_logits_that_nobody_needs(dtype):
    hidden, weight, targets = problem(dtype=dtype)
    want = with_gradients(cross_entropy_l2wrap(hidden @ weight.t(), targets), [hidden, weight])
    logits = hidden @ weight.t()
    before, kept = logits.detach().clone(), []
    logits.register_hook(kept.append)
    loss = cross_entropy_l2wrap(logits, targets, overwrite=True)
    got = [loss, *torch.autograd.grad(3 * loss, [hidden, weight], retain_graph=True)]
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert kept[0].data_ptr() == logits.data_ptr()
    assert not torch.equal(logits, before)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_logits_stay_as_they_are_unless_given_away():
    logits = torch.randn(5, V, requires_grad=True)
    before = logits.detach().clone()
    loss = cross_entropy_l2wrap(logits, torch.arange(5))
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(logits, before)
    assert torch.equal(first, second)


def test_huge_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value, grad = with_gradients(cross_entropy_l2wrap(logits, torch.tensor([1])), [logits])
    assert value == 2e4
    assert torch.isfinite(grad).all()


def test_chunked_never_holds_more_rows_of_logits():
    """No tensor with V columns and more than `chunk` rows is made, in forward or backward."""
    hidden, weight, targets = problem(rows=(40,))
    chunk, rows = 4, []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if (
                isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[-1] == V and out.shape[0] != C
            ):  # not weight.t()
                rows.append(out.shape[0])
            return out

    with Spy():
        loss = linear_cross_entropy_l2wrap(hidden, weight, targets, chunk)
    assert rows
    assert max(rows) <= chunk
    assert not any(x is not None and x.shape == (40, V) for x in loss.grad_fn.saved_tensors)


def test_without_gradients_none_are_made():
    hidden, weight, targets = problem()
    with torch.no_grad():
        value = linear_cross_entropy_l2wrap(hidden, weight, targets, 4)
    assert torch.allclose(value, cross_entropy_l2wrap(hidden @ weight.t(), targets))


def test_mistakes_are_named():
    hidden, weight, targets = problem()
    with pytest.raises(ValueError, match="--head_chunk"):
        linear_cross_entropy_l2wrap(hidden, weight, targets, -1)
    with pytest.raises(ValueError, match="targets"):
        linear_cross_entropy_l2wrap(hidden, weight, targets[:1], 4)
    with pytest.raises(ValueError, match="targets"):
        cross_entropy_l2wrap(hidden @ weight.t(), targets[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_stands_in_ignored_rows_reaches_nothing(dtype):
    logits = torch.randn(5, 37, dtype=dtype)
    logits[1], logits[3, 4] = math.nan, math.inf
    logits.requires_grad_()
    targets = torch.tensor([4, -100, 0, -100, 36])
    loss = cross_entropy_l2wrap(logits, targets)
    loss.backward()
    kept = [0, 2, 4]
    alone = logits.detach()[kept].requires_grad_()
    expected = cross_entropy_l2wrap(alone, targets[kept])
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits.grad[kept], alone.grad)
    assert (logits.grad[[1, 3]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype):
    logits, targets = 5 * torch.randn(300, 1001).to(dtype), torch.randint(0, 1001, (300,))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(with_gradients(cross_entropy_l2wrap(logits.requires_grad_(), targets), [logits]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_targets_need_not_lie_densely():
    ids = torch.randint(0, 37, (6, 2))
    logits = torch.randn(6, 1, 37)
    torch.testing.assert_close(
        cross_entropy_l2wrap(logits, ids[:, 1:]), cross_entropy_l2wrap(logits, ids[:, 1:].clone())
    )

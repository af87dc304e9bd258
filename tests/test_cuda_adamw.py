"""The CUDA kernel of AdamW's step, executed on a CPU: the formula in float64, any alignment, and as MasterAdamW's."""

import copy
import ctypes
import math

import pytest
import torch
from host_cuda.harness import CUDA, ORDERS, build, build_ops, compiler, shared_folder
from test_optim import build as build_optimizer
from test_optim import set_gradients, small_model

from src.ops import adamw

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BETAS, EPS, DECAY = (0.9, 0.99), 0.1, 0.1  # an eps whose place in the formula is seen
MANY = [1, 2, 3, 5, 4096, 4097, 9000, *range(1, 120)]  # more tensors than one launch takes, some of several blocks


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = shared_folder(tmp_path_factory)
    loaded = ctypes.CDLL(str(build(folder, CUDA / "adamw.cu")), mode=ctypes.RTLD_GLOBAL)
    build_ops(folder, CUDA / "adamw_cuda.cpp")
    torch.library.register_fake("rwkv7_host::adamw_", lambda *_: None)
    return loaded


@pytest.fixture(autouse=True)
def through_host(library, monkeypatch):
    monkeypatch.setattr(torch.ops.rwkv7, "adamw_", torch.ops.rwkv7_host.adamw_, raising=False)
    monkeypatch.setattr(adamw, "adamw_on_gpu", lambda *args: True)


def number(value):
    return torch.tensor([float(value)])


def problem(dtype, sizes=MANY, offset=0):
    """Parameters, gradients, masters and moments; each begins `offset` elements after an aligned address."""
    draw = torch.Generator().manual_seed(0)

    def values(size, dtype):
        return torch.randn(size + offset, generator=draw).to(dtype)[offset:]

    masters = [values(size, torch.float32) for size in sizes]
    parameters = masters if dtype == torch.float32 else [values(size, dtype) for size in sizes]
    gradients = [values(size, dtype) for size in sizes]
    return parameters, gradients, masters, [values(s, torch.float32) for s in sizes], [
        values(s, torch.float32).square() for s in sizes
    ]  # fmt: skip


def take_step(tensors, found_inf=0, steps=4, scale=8.0):
    adamw.adamw_(
        *tensors, steps=number(steps), lr=number(1e-2), grad_scale=number(scale), found_inf=number(found_inf),
        betas=BETAS, eps=EPS, weight_decay=DECAY,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_a_step_is_the_formula(dtype, offset):
    tensors = problem(dtype, offset=offset)
    _, gradients, masters, m, v = ([x.double() for x in column] for column in tensors)
    take_step(tensors)
    for i in range(len(MANY)):
        g = gradients[i] / 8
        mean, square = 0.9 * m[i] + 0.1 * g, 0.99 * v[i] + 0.01 * g * g
        step = 1e-2 / (1 - 0.9**5) * mean / ((square / (1 - 0.99**5)).sqrt() + EPS)
        for got, true in zip((x[i] for x in tensors[2:]), (masters[i] * (1 - 1e-3) - step, mean, square), strict=True):
            torch.testing.assert_close(got.double(), true, rtol=2e-6, atol=1e-6)
        assert torch.equal(tensors[0][i], tensors[2][i].to(dtype))


@pytest.mark.parametrize("shifted", range(5))
def test_any_one_tensor_may_be_misaligned(shifted):
    """The host run refuses a vector at an address that is no multiple of its size."""
    tensors = problem(torch.bfloat16, [50])
    other = [[x.clone() for x in column] for column in tensors]
    moved = torch.cat([other[shifted][0][:1], other[shifted][0]])[1:]
    other[shifted] = [moved]
    take_step(tensors)
    take_step(other)
    for (x,), (y,) in zip(tensors, other, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_step_that_is_left_out_changes_no_bit(dtype):
    tensors = problem(dtype)
    before = copy.deepcopy(tensors)
    take_step(tensors, found_inf=1)
    assert all(torch.equal(x, y) for xs, ys in zip(tensors, before, strict=True) for x, y in zip(xs, ys, strict=True))


def test_nothing_beyond_the_tensors_is_written_in_any_order(library):
    results = []
    for order in ORDERS.values():
        library.host_cuda_order(*order)
        whole = problem(torch.bfloat16, [5000 + 7 * i for i in range(3)])
        before = copy.deepcopy(whole)
        take_step([[x[3:-2] for x in column] for column in whole])
        for xs, ys in zip(whole, before, strict=True):
            for x, y in zip(xs, ys, strict=True):
                assert torch.equal(torch.cat([x[:3], x[-2:]]), torch.cat([y[:3], y[-2:]]))
        results.append([x for column in whole for x in column])
    library.host_cuda_order(*ORDERS["forward"])
    assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0], strict=True))


def test_first_steps_lose_no_digits():
    """1 - beta^t of the first step is 1 - beta, which fp32 would have to few digits where beta is near 1."""
    master, gradient = torch.zeros(4), torch.ones(4)
    tensors = [[x] for x in (master, gradient, master, torch.zeros(4), torch.zeros(4))]
    adamw.adamw_(
        *tensors, steps=number(0), lr=number(1), grad_scale=number(1), found_inf=number(0), betas=(0.999, 0.99999),
        eps=0.0, weight_decay=0.0,
    )  # fmt: skip
    torch.testing.assert_close(master, -torch.ones(4), rtol=1e-6, atol=0)


def test_the_op_keeps_its_schema_and_refuses_wrong_lists():
    tensors = problem(torch.bfloat16, [3, 8])
    rest = (number(0), number(1e-3), number(1), number(0), *BETAS, EPS, DECAY)
    op = torch.ops.rwkv7_host.adamw_
    torch.library.opcheck(op.default, (*tensors, *rest), test_utils=("test_schema", "test_faketensor"))
    for wrong in (
        [tensors[0], tensors[1][:1], *tensors[2:]],
        [tensors[0], [x.float() for x in tensors[1]], *tensors[2:]],
        [*tensors[:4], [x.bfloat16() for x in tensors[4]]],
        [*tensors[:2], [x.repeat(2)[::2] for x in tensors[2]], *tensors[3:]],
    ):
        with pytest.raises(RuntimeError, match="adamw"):
            op(*wrong, *rest)
    with pytest.raises(RuntimeError, match="found_inf"):
        op(*tensors, *rest[:3], torch.zeros(2), *rest[4:])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_master_adamw_is_the_same_with_it(dtype, monkeypatch):
    """Groups, rates, clipping, a gradient that is missing, a step that is skipped, the counters: as PyTorch's AdamW."""
    models, optimizers = [], []
    for native in (True, False):
        monkeypatch.setattr(adamw, "adamw_on_gpu", lambda *args, native=native: native)
        models.append(small_model(dtype))
        optimizers.append(build_optimizer(models[-1], scale_loss=dtype == torch.float16))
    assert [optimizer.can_be_captured for optimizer in optimizers] == [True, False]
    for step in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            set_gradients(model, step)
            model.blocks[1].ffn.x_k.grad = None
            if step == 2:
                model.head.weight.grad[0, 0] = math.nan
            optimizer.param_groups[0]["lr"] *= 0.9
            optimizer.step()
    one, other = optimizers
    assert one.counters() == other.counters()
    assert one.counters()["adam_steps"] == 4
    torch.testing.assert_close(one.grad_norm, other.grad_norm, equal_nan=True)
    for a, b in zip(one.parameters, other.parameters, strict=True):
        torch.testing.assert_close(one.master_of(a), other.master_of(b), rtol=1e-5, atol=1e-6)
        assert torch.equal(a, one.master_of(a).to(dtype))
        if a is not models[0].blocks[1].ffn.x_k:
            for kind in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(one.moments(a)[kind], other.moments(b)[kind], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_state_of_one_is_resumed_by_the_other(dtype, monkeypatch):
    def resumed(native):
        monkeypatch.setattr(adamw, "adamw_on_gpu", lambda *args: native)
        model = small_model(dtype)
        return model, build_optimizer(model)

    first, optimizer = resumed(native=True)
    set_gradients(first, 1)
    optimizer.step()
    continued = []
    for native in (True, False):
        model, other = resumed(native)
        model.load_state_dict(first.state_dict())
        with torch.no_grad():
            for old, new in zip(optimizer.parameters, other.parameters, strict=True):
                other.master_of(new).copy_(optimizer.master_of(old))
                for kind in ("exp_avg", "exp_avg_sq"):
                    other.moments(new)[kind].copy_(optimizer.moments(old)[kind])
        other.load_counters(optimizer.counters())
        set_gradients(model, 2)
        other.step()
        continued.append(other)
    for a, b in zip(*(x.masters for x in continued), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

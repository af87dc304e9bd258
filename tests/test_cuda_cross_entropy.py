"""The CUDA kernels of the loss, executed on a CPU: against float64 in every lane order, and through autograd."""

import ctypes

import pytest
import torch
from host_cuda.harness import (
    CUDA,
    DTYPES,
    ORDERS,
    Guarded,
    HostLibrary,
    build,
    build_ops,
    compiler,
    pointer,
    shared_folder,
)

from src.ops import cross_entropy_l2wrap, linear_cross_entropy_l2wrap
from src.ops import loss as loss_module
from src.ops.reference import L2WRAP, cross_entropy_l2wrap_reference

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
IGNORED = -100
SIZES = [1, 3, 37, 256, 2049, 5003]  # rows of odd sizes start at every address that 16-byte loads can't use


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return HostLibrary(build(shared_folder(tmp_path_factory), CUDA / "cross_entropy.cu"))


def problem(rows, vocabulary, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(rows, vocabulary, generator=draw)).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=draw)
    targets[1::3] = IGNORED
    return logits, targets, torch.rand(rows, generator=draw) * (targets != IGNORED)


def forward(host, logits, targets):
    out = Guarded()
    nll, largest, total = (out.empty((len(targets),), FP32) for _ in range(3))
    where = torch.full((len(targets),), -1)
    pointers = [pointer(x) for x in (nll, largest, total, where)]
    sizes = [DTYPES[logits.dtype], ctypes.c_int64(len(targets)), logits.shape[1]]
    where_in = [pointer(logits), pointer(targets), ctypes.c_int64(IGNORED)]
    host.call("cross_entropy_l2wrap_forward", *sizes, *where_in, *pointers, ctypes.c_int64(0))
    out.check()
    return nll, largest, total, where


def backward(host, logits, targets, statistics, scale):
    """The gradient, in a copy of the logits between sentinels."""
    out = Guarded()
    grad = out.empty(logits.shape, logits.dtype)
    grad.copy_(logits)
    sizes = [DTYPES[logits.dtype], ctypes.c_int64(len(targets)), logits.shape[1]]
    pointers = [pointer(x) for x in (grad, targets.clamp(min=0), *statistics, scale)]
    host.call("cross_entropy_l2wrap_backward", *sizes, *pointers, ctypes.c_float(L2WRAP), ctypes.c_int64(0))
    out.check()
    return grad


def formula(logits, targets, scale):
    """In float64: nll per row, the first index of the largest logit, the gradient of sum(scale * nll) with L2Wrap."""
    z = logits.double()
    counts = targets != IGNORED
    safe = targets.clamp(min=0)[:, None]
    nll = torch.where(counts, z.logsumexp(-1) - z.gather(-1, safe)[:, 0], 0)
    where = (z == z.amax(-1, keepdim=True)).int().argmax(-1, keepdim=True)
    grad = torch.softmax(z, -1).scatter_add(-1, safe, -torch.ones_like(z[:, :1]))
    grad = grad.scatter_add(-1, where, L2WRAP * z.gather(-1, where))
    return nll, where[:, 0], grad * scale.double()[:, None]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("vocabulary", SIZES)
def test_values_and_gradients_are_the_formula(host, vocabulary, dtype):
    logits, targets, scale = problem(7, vocabulary, dtype)
    nll, *statistics = forward(host, logits, targets)
    grad = backward(host, logits, targets, statistics, scale)
    true_nll, true_where, true_grad = formula(logits, targets, scale)
    counts = targets != IGNORED
    assert torch.allclose(nll.double(), true_nll, rtol=1e-6, atol=2e-6)
    assert torch.equal(statistics[2][counts], true_where[counts])  # ties, of which bf16 has many, go to the first
    assert (nll[~counts] == 0).all()
    assert (grad[~counts] == 0).all()
    rounding = {FP32: 1e-6, BF16: 2.2e-3, FP16: 3e-4}[dtype]
    assert (grad.double() - true_grad).norm() <= rounding * true_grad.norm()
    # apart from rounding to its own dtype (fp16: down to its subnormals) every element is right, not only their norm
    slack = {FP32: 2e-6, BF16: 4e-3, FP16: 5e-4}[dtype] * true_grad.abs() + 1e-7
    assert ((grad.double() - true_grad).abs() <= slack).all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_equal_bits_in_every_lane_order(host, dtype):
    logits, targets, scale = problem(4, 2051, dtype)
    runs = []
    for order in ORDERS:
        host.order(order)
        nll, *statistics = forward(host, logits, targets)
        runs.append([nll, *statistics, backward(host, logits, targets, statistics, scale)])
    host.order("forward")
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(run, runs[0], strict=True))


def test_rows_of_extreme_logits(host):
    """Huge and equal logits, masked-out tokens, a row of nothing else, a NaN, a target that doesn't exist."""
    logits = torch.zeros(6, 300)
    logits[0, 299] = 3e4
    logits[1] = 7.0
    logits[2, 5:] = float("-inf")
    logits[3] = float("-inf")
    logits[4, 77] = float("nan")
    targets = torch.tensor([0, 299, 4, 0, 0, 300])
    nll, largest, total, where = forward(host, logits, targets)
    torch.testing.assert_close(nll[:3], torch.tensor([3e4, torch.tensor(300.0).log(), torch.tensor(5.0).log()]))
    assert nll[3:].isnan().all()
    assert where.tolist()[:4] == [299, 0, 0, 0]
    grad = backward(host, logits[:3].contiguous(), targets[:3], (largest[:3], total[:3], where[:3]), torch.ones(3))
    assert grad.isfinite().all()
    assert (grad[2, 5:] == 0).all()


def test_each_logit_is_passed_over_without_a_barrier(host):
    logits, targets, scale = problem(3, 4096, BF16)
    targets[:] = 5
    host.take_counts()
    _, *statistics = forward(host, logits, targets)
    counts = host.take_counts()
    assert counts["block_barriers"] == len(targets)
    assert counts["shuffles"] == len(targets) * 8 * 5 * 3
    backward(host, logits, targets, statistics, scale)
    assert not any(host.take_counts().values())


# --- Through PyTorch's dispatcher and autograd --------------------------------------------------------------


@pytest.fixture
def through_host(tmp_path_factory, monkeypatch):
    """src/ops/loss.py takes the kernels, run on the CPU, for its native ops."""
    folder = shared_folder(tmp_path_factory)
    ctypes.CDLL(str(build(folder, CUDA / "cross_entropy.cu")), mode=ctypes.RTLD_GLOBAL)
    build_ops(folder, CUDA / "cross_entropy_cuda.cpp")
    calls = []

    def counted(name):
        op = getattr(torch.ops.rwkv7_host, name)
        return lambda *args: (calls.append(name), op(*args))[1]

    for name in ("cross_entropy_l2wrap_forward", "cross_entropy_l2wrap_backward_"):
        monkeypatch.setattr(torch.ops.rwkv7, name, counted(name), raising=False)
    monkeypatch.setattr(loss_module, "_native", lambda device, dtype: dtype in DTYPES)
    return calls


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_the_loss_through_the_kernels(through_host, dtype, chunk):
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 7, 16).to(dtype).requires_grad_(), torch.randn(301, 16).to(dtype).requires_grad_()
    targets = torch.randint(0, 301, (3, 7))
    targets[:, ::3] = IGNORED
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want_loss = cross_entropy_l2wrap_reference(exact[0] @ exact[1].t(), targets)
    want = torch.autograd.grad(2 * want_loss, exact)
    loss = linear_cross_entropy_l2wrap(hidden, weight, targets, chunk)
    got = torch.autograd.grad(2 * loss, [hidden, weight])
    assert through_host
    eps = torch.finfo(dtype).eps
    assert abs(loss.item() - want_loss.item()) < 2 * eps * want_loss.item()
    for x, y in zip(got, want, strict=True):
        assert (x.double() - y).norm() < 4 * eps * y.norm()


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_gradient_lands_in_the_logits_only_where_they_were_given_away(through_host, overwrite):
    leaf = torch.randn(4, 33, requires_grad=True)
    logits = leaf * 1
    before, arrived = logits.detach().clone(), []
    logits.register_hook(arrived.append)
    loss = cross_entropy_l2wrap(logits, torch.tensor([0, 1, IGNORED, 3]), overwrite=overwrite)
    loss.backward(retain_graph=True)
    assert (arrived[0].data_ptr() == logits.data_ptr()) == overwrite
    assert torch.equal(logits, before) != overwrite
    if overwrite:
        with pytest.raises(RuntimeError, match="inplace"):
            loss.backward()
    else:
        loss.backward()
        assert torch.equal(arrived[1], arrived[0])


def test_ops_keep_their_schema_and_shapes_and_refuse_wrong_inputs(through_host):
    ops = torch.ops.rwkv7_host
    logits, targets, scale = problem(4, 33, BF16)
    torch.library.register_fake("rwkv7_host::cross_entropy_l2wrap_forward", loss_module._forward_shapes)
    torch.library.register_fake("rwkv7_host::cross_entropy_l2wrap_backward_", lambda *_: None)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.cross_entropy_l2wrap_forward.default, (logits, targets, IGNORED), test_utils=checks)
    _, *statistics = ops.cross_entropy_l2wrap_forward(logits, targets, IGNORED)
    arguments = (logits, targets.clamp(min=0), *statistics, scale, L2WRAP)
    torch.library.opcheck(ops.cross_entropy_l2wrap_backward_.default, arguments, test_utils=checks)
    assert all(x.shape == (0,) for x in ops.cross_entropy_l2wrap_forward(logits[:0], targets[:0], IGNORED))
    for wrong in ((logits.double(), targets), (logits.t(), targets), (logits, targets.int()), (logits, targets[:1])):
        with pytest.raises(RuntimeError, match="cross_entropy_l2wrap"):
            ops.cross_entropy_l2wrap_forward(*wrong, IGNORED)


# --- On a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("chunk", [0, 300])
@pytest.mark.parametrize("vocabulary", [6400, 65536, 50257])
def test_gpu_is_right_repeats_its_bits_and_makes_no_copy_of_the_logits(vocabulary, chunk):
    torch.manual_seed(0)
    rows, width = 1024, 256
    hidden = torch.randn(rows, width, device="cuda", dtype=BF16, requires_grad=True)
    weight = (0.1 * torch.randn(vocabulary, width, device="cuda")).to(BF16).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), device="cuda")
    targets[::5] = IGNORED

    def run():
        loss = linear_cross_entropy_l2wrap(hidden, weight, targets, chunk)
        return loss.detach(), *torch.autograd.grad(loss, [hidden, weight])

    first = run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    second = run()
    extra = torch.cuda.max_memory_allocated() - before
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert extra < 1.2 * (chunk or rows) * vocabulary * 2 + 12 * vocabulary * width + 2**23
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = cross_entropy_l2wrap_reference(exact[0] @ exact[1].t(), targets)
    assert abs(first[0].item() - want.item()) < 1e-3 * want.item()
    for x, y in zip(first[1:], torch.autograd.grad(want, exact), strict=True):
        assert (x.double() - y).norm() < 1e-2 * y.norm()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than 2 GPUs")
def test_gpu_works_where_the_logits_are():
    """On the second GPU, while the first is the current one."""
    logits, targets, _ = problem(64, 5003, BF16)
    exact = logits.double().requires_grad_()
    (want,) = torch.autograd.grad(cross_entropy_l2wrap_reference(exact, targets), exact)
    with torch.cuda.device(0):
        leaf = logits.to("cuda:1").requires_grad_()
        (got,) = torch.autograd.grad(cross_entropy_l2wrap(leaf, targets.to("cuda:1")), leaf)
        assert torch.cuda.current_device() == 0
    assert got.device == torch.device("cuda:1")
    assert (got.cpu().double() - want).norm() < 1e-2 * want.norm()

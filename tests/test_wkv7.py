"""wkv7: every implementation against float64, and the properties that any implementation must have."""

import ctypes
import gc
import warnings
from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from src.ops import recurrence as module
from src.ops import wkv7
from src.ops.build import BuildError
from src.ops.reference import wkv7_reference

NAMES = ("y", "final_state", "dr", "dw", "dk", "dv", "da", "db", "dstate")


@pytest.fixture(autouse=True)
def _seed_and_one_thread():
    """One thread: the reference's tiny operations lose more time than they gain by a second one."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def native():
    module.build.load_native(module._register)
    return torch.ops.rwkv7


def problem(B, T, H, N, dtype=torch.float32, *, decay=0.0, documents=None):
    """Inputs as in a model: a = -kk, b = kk * rate with kk of unit length; a carried state; all require gradients."""
    r, k, v = (torch.randn(B, T, H, N) for _ in range(3))
    w = decay + 2 * torch.randn(B, T, H, N)
    kk = torch.nn.functional.normalize(torch.randn(B, T, H, N), dim=-1)
    state = 0.5 * torch.randn(documents or B, H, N, N)
    inputs = [x.to(dtype).requires_grad_() for x in (r, w, k, v, -kk, kk * torch.rand(B, T, H, N))]
    return inputs, state.requires_grad_()


def outputs_and_gradients(op, inputs, state, cu_seqlens=None, **choice):
    y, final_state = op(*inputs, state, cu_seqlens, **choice)
    generator = torch.Generator().manual_seed(1)
    dy, dfinal = (torch.randn(x.shape, generator=generator).to(x.dtype) for x in (y, final_state))
    leaves = [*inputs, *([] if state is None else [state])]
    return [y, final_state, *torch.autograd.grad((y, final_state), leaves, (dy, dfinal))]


def in_float64(inputs, state):
    exact = [x.detach().double().requires_grad_() for x in inputs]
    return exact, None if state is None else state.detach().double().requires_grad_()


def error(x, exact):
    assert torch.isfinite(x).all()
    return ((x.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


SHAPES = {
    "one-token": (2, 1, 1, 64),
    "one-head": (1, 33, 1, 64),
    "odd": (2, 67, 2, 32),
    "segments": (1, 65, 1, 64),
    "tiny-head": (2, 40, 2, 16),
    "odd-head": (1, 35, 2, 48),
    "head-96": (1, 9, 1, 96),
    "head-128": (1, 7, 1, 128),
    "head-256": (1, 3, 1, 256),
}
SLOW, MIXED, FAST = -8.0, 0.0, 8.0  # raw decays: near 1; everything; near 0.545


CASES = [(shape, torch.float32, MIXED) for shape in SHAPES]
CASES += [(shape, dtype, MIXED) for shape in ("odd", "odd-head") for dtype in (torch.bfloat16, torch.float16)]
CASES += [
    (shape, dtype, decay)
    for shape in ("odd", "segments")
    for dtype in (torch.float32, torch.bfloat16)
    for decay in (SLOW, FAST)
]
DECAY_NAMES = {SLOW: "slow", MIXED: "mixed", FAST: "fast"}


@pytest.mark.parametrize(
    ("shape", "dtype", "decay"), CASES, ids=[f"{s}-{str(d)[6:]}-{DECAY_NAMES[w]}" for s, d, w in CASES]
)
def test_native_is_as_exact_as_plain_pytorch(native, shape, dtype, decay):
    inputs, state = problem(*SHAPES[shape], dtype, decay=decay)
    exact = outputs_and_gradients(wkv7_reference, *in_float64(inputs, state))
    plain = outputs_and_gradients(wkv7_reference, inputs, state)
    got = outputs_and_gradients(wkv7, inputs, state, kernel="recurrent")
    rounding = torch.finfo(torch.float32).eps
    for name, x, p, e in zip(NAMES, got, plain, exact, strict=True):
        assert (x.dtype, x.shape) == (p.dtype, p.shape), name
        # One rounding is granted to both: with a handful of numbers plain PyTorch is at times exact by luck.
        assert error(x, e) <= 2 * max(error(p, e), rounding), name


@pytest.mark.parametrize("decay", [SLOW, FAST], ids=["slow", "fast"])
def test_equal_keys_lose_no_precision(native, decay):
    """Every token removes and replaces along one direction: what each reads depends on all that were before."""
    inputs, state = problem(1, 60, 2, 32, decay=decay)
    with torch.no_grad():
        direction = torch.nn.functional.normalize(torch.randn(32), dim=-1)
        for i, factor in ((2, 1.0), (4, -1.0), (5, 1.0)):
            inputs[i].copy_(factor * direction.expand_as(inputs[i]))
    exact = outputs_and_gradients(wkv7_reference, *in_float64(inputs, state))
    plain = outputs_and_gradients(wkv7_reference, inputs, state)
    rounding = torch.finfo(torch.float32).eps
    got = outputs_and_gradients(wkv7, inputs, state, kernel="recurrent")
    for name, x, p, e in zip(NAMES, got, plain, exact, strict=True):
        assert error(x, e) <= 2 * max(error(p, e), rounding), name


def test_reference_gradients_are_the_derivatives():
    inputs, state = problem(1, 3, 1, 4)
    assert torch.autograd.gradcheck(wkv7_reference, [*in_float64(inputs, state)[0], in_float64(inputs, state)[1]])


@pytest.mark.parametrize("kernel", ["recurrent", "portable", "reference"])
@pytest.mark.parametrize("cut", [1, 32, 33, 64])
def test_split_with_carried_state_is_the_whole(kernel, cut):
    inputs, state = problem(2, 70, 2, 32)
    whole = outputs_and_gradients(wkv7, inputs, state, kernel=kernel)

    def in_two(r, w, k, v, a, b, state, _):
        y1, middle = wkv7(*(x[:, :cut] for x in (r, w, k, v, a, b)), state, kernel=kernel)
        y2, final = wkv7(*(x[:, cut:] for x in (r, w, k, v, a, b)), middle, kernel=kernel)
        return torch.cat([y1, y2], 1), final

    for name, x, y in zip(NAMES, outputs_and_gradients(in_two, inputs, state), whole, strict=True):
        assert error(x, y.double()) < 2e-6, name


@pytest.mark.parametrize("kernel", ["recurrent", "portable", "reference"])
def test_packed_documents_are_independent(kernel):
    bounds = [0, 1, 40, 40, 73, 105]  # one token, no token, across and at the bounds of kept states
    inputs, state = problem(1, 105, 2, 16, documents=len(bounds) - 1)
    packed = outputs_and_gradients(wkv7, inputs, state, torch.tensor(bounds, dtype=torch.int32), kernel=kernel)

    def alone(r, w, k, v, a, b, state, _):
        parts = []
        for document, (begin, end) in enumerate(pairwise(bounds)):
            start = state[document : document + 1]
            if begin == end:
                parts.append((r[:, begin:end], start))
            else:
                parts.append(wkv7(*(x[:, begin:end] for x in (r, w, k, v, a, b)), start, kernel="reference"))
        return torch.cat([y for y, _ in parts], 1), torch.cat([final for _, final in parts])

    for name, x, y in zip(NAMES, packed, outputs_and_gradients(alone, inputs, state), strict=True):
        assert error(x, y.double()) < 2e-6, name


def test_threads_share_the_work_and_agree(native):
    """Every head is computed by one thread alone, so the number of threads changes no bit."""
    inputs, state = problem(3, 40, 3, 16)
    one = outputs_and_gradients(wkv7, inputs, state, kernel="recurrent")
    torch.set_num_threads(2)
    for name, x, y in zip(NAMES, outputs_and_gradients(wkv7, inputs, state, kernel="recurrent"), one, strict=True):
        assert torch.equal(x, y), name


def test_without_a_state_it_starts_from_zeros(native):
    inputs, state = problem(2, 40, 2, 16)
    nothing = outputs_and_gradients(wkv7, inputs, None, kernel="recurrent")
    zeros = outputs_and_gradients(wkv7, inputs, torch.zeros_like(state).requires_grad_(), kernel="recurrent")
    for name, x, y in zip(NAMES, nothing, zeros[:-1], strict=False):
        assert torch.equal(x, y), name


def test_strided_inputs_are_read_in_place(native):
    """Views of one fused projection, an expanded gradient, a transposed input."""
    fused = torch.randn(2, 20, 6, 2, 16, requires_grad=True)
    views = [fused[:, :, i] for i in range(5)] + [fused[:, :, 5].transpose(2, 3).contiguous().transpose(2, 3)]
    y, _ = wkv7(*views, kernel="recurrent")
    (got,) = torch.autograd.grad(y.sum(), fused)
    (want,) = torch.autograd.grad(wkv7_reference(*(x.contiguous() for x in views))[0].sum(), fused)
    assert error(got, want.double()) < 2e-6


def test_gradient_of_the_final_state_alone(native):
    inputs, state = problem(1, 40, 1, 16)
    grads = [
        torch.autograd.grad(op(*inputs, state)[1].square().sum(), [*inputs, state], allow_unused=True)
        for op in (wkv7, wkv7_reference)
    ]
    for x, y in zip(*grads, strict=True):
        if y is not None:
            assert error(x, y.double()) < 2e-6


def test_nothing_is_kept_without_need_of_a_gradient(native, monkeypatch):
    kept = []
    real = native.wkv7_forward

    def spy(*args):
        result = real(*args)
        kept.append(result[2].numel() + result[3].numel())
        return result

    monkeypatch.setattr(native, "wkv7_forward", spy)
    inputs, state = problem(1, 70, 1, 16)
    wkv7(*inputs, state)
    with torch.no_grad():
        wkv7(*inputs, state)
    with torch.inference_mode():
        wkv7(*inputs, state)
    wkv7(*(x.detach() for x in inputs), state.detach())
    assert kept[0] > 0
    assert kept[1:] == [0, 0, 0]


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 to count the heap's bytes")
def test_calls_leave_nothing_on_the_heap(native):
    """A few bytes left by each call would cut the heap into pieces that no tensor fits into any more."""
    heap = ctypes.CDLL(None).mallinfo2
    heap.restype = _MallInfo
    inputs, state = problem(1, 1, 1, 16)

    def calls(count):
        for _ in range(count):
            y, _ = wkv7(*inputs, state)
            y.sum().backward()
            with torch.no_grad():
                wkv7(*inputs, state)

    calls(100)
    gc.collect()
    before = heap().uordblks
    calls(500)
    gc.collect()
    assert heap().uordblks - before < 500 * 16


def test_inputs_stay_as_they_are_and_nothing_outside_is_written(native):
    """Each input lies between two bands of sentinels."""
    inputs, state = problem(1, 35, 1, 16)
    banded = []
    for x in (*inputs, state):
        store = torch.full((x.numel() + 64,), 7.0)
        store[32:-32] = x.detach().flatten()
        banded.append((store, store.clone()))
    views = [
        store[32:-32].view(x.shape).requires_grad_() for (store, _), x in zip(banded, (*inputs, state), strict=True)
    ]
    outputs_and_gradients(wkv7, views[:6], views[6], kernel="recurrent")
    for store, before in banded:
        assert torch.equal(store, before)


def test_states_that_fade_to_nothing_cost_nothing_and_stay_finite(native):
    inputs, state = problem(1, 300, 1, 16, decay=FAST)
    silent = [torch.zeros_like(x) if i != 1 else x for i, x in enumerate(inputs)]
    _, final_state = wkv7(*silent, state, kernel="recurrent")
    assert final_state.abs().max() < 1e-30


@pytest.mark.parametrize("documents", [None, 3], ids=["rows", "packed"])
@pytest.mark.parametrize("with_state", [False, True], ids=["from-zeros", "from-state"])
def test_opcheck(native, documents, with_state):
    inputs, state = problem(1 if documents else 2, 70, 1, 16, documents=documents)
    cu_seqlens = torch.tensor([0, 5, 5, 70], dtype=torch.int32) if documents else None
    wkv7(*inputs)
    args = (*inputs, state if with_state else None, cu_seqlens, True, False)
    torch.library.opcheck(torch.ops.rwkv7.wkv7_forward.default, args)


def test_under_activation_checkpointing(native):
    inputs, _ = problem(2, 40, 2, 16)
    plain = torch.autograd.grad(wkv7(*inputs)[0].square().sum(), inputs)
    saved = checkpoint(lambda *x: wkv7(*x)[0].square().sum(), *inputs, use_reentrant=False)
    for x, y in zip(torch.autograd.grad(saved, inputs), plain, strict=True):
        assert torch.equal(x, y)


def test_under_torch_compile(native):
    inputs, _ = problem(2, 40, 2, 16)

    def loss(*x):
        return wkv7(*x)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs), strict=True
    ):
        assert error(x, y.double()) < 2e-6


def test_second_derivative_is_refused(native):
    inputs, _ = problem(1, 3, 1, 16)
    (grad,) = torch.autograd.grad(wkv7(*inputs)[0].square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


INPUTS = "rwkvab"


@pytest.mark.parametrize("kernel", ["auto", "recurrent", "reference"])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.half(),
        lambda x: x[:1],
        lambda x: x[:, :3],
        lambda x: x.expand(-1, -1, 2, -1),
        lambda x: x[..., :8],
        lambda x: x[0],
        lambda x: x.to("meta"),
    ],
    ids=["dtype", "batch", "length", "heads", "head size", "dimensions", "device"],
)
@pytest.mark.parametrize("name", INPUTS[1:])
def test_inputs_that_differ_are_refused(name, change, kernel):
    inputs, _ = problem(2, 4, 1, 16)
    inputs[INPUTS.index(name)] = change(inputs[INPUTS.index(name)])
    with pytest.raises(ValueError, match=f"one shape, dtype and device.* {name} is"):
        wkv7(*inputs, kernel=kernel)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_inputs_without_four_dimensions_or_tokens_are_refused(kernel):
    inputs, _ = problem(2, 4, 1, 16)
    for change in (lambda x: x[0], lambda x: x[:, :0]):
        with pytest.raises(ValueError, match=r"\[B, T, H, N\]"):
            wkv7(*map(change, inputs), kernel=kernel)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.half(),
        lambda x: x.double(),
        lambda x: x[:1],
        lambda x: x[0],
        lambda x: x[..., :8],
        lambda x: x.to("meta"),
    ],
    ids=["half", "double", "documents", "dimensions", "head size", "device"],
)
def test_wrong_states_are_refused(change, kernel):
    inputs, state = problem(2, 4, 1, 16)
    with pytest.raises(ValueError, match="state must be"):
        wkv7(*inputs, change(state), kernel=kernel)
    packed = [x[:1] for x in inputs]
    with pytest.raises(ValueError, match="state must be"):
        wkv7(*packed, state, torch.tensor([0, 4], dtype=torch.int32), kernel=kernel)  # one document, two states


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize(
    ("bounds", "batch"),
    [
        (torch.tensor([0, 4]), 1),
        (torch.tensor([0], dtype=torch.int32), 1),
        (torch.tensor([[0, 4]], dtype=torch.int32), 1),
        (torch.tensor([0, 4], dtype=torch.int32), 2),
        (torch.tensor([0, 4], dtype=torch.int32, device="meta"), 1),
    ],
    ids=["int64", "one number", "two dimensions", "two rows", "device"],
)
def test_wrong_forms_of_bounds_are_refused(bounds, batch, kernel):
    inputs, _ = problem(batch, 4, 1, 16)
    with pytest.raises(ValueError, match="cu_seqlens must be"):
        wkv7(*inputs, cu_seqlens=bounds, kernel=kernel)


def test_wrong_kernels_are_refused():
    inputs, _ = problem(2, 4, 1, 16)
    with pytest.raises(ValueError, match="--kernel"):
        wkv7(*inputs, kernel="fast")
    with pytest.raises(BuildError, match="tensor cores") as caught:
        wkv7(*inputs, kernel="chunked")
    assert caught.value.kernel == "chunked"
    with pytest.raises(BuildError, match="multiple of 16"):
        wkv7(*problem(2, 4, 1, 24)[0], kernel="recurrent")


@pytest.mark.parametrize("kernel", ["auto", "portable"])
@pytest.mark.parametrize("bounds", [[0, 3], [1, 4], [0, 3, 2, 4]])
def test_wrong_document_bounds_are_refused(native, bounds, kernel):
    inputs, _ = problem(1, 4, 1, 16)
    with pytest.raises(RuntimeError, match="cu_seqlens must"):
        wkv7(*inputs, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), kernel=kernel)


@pytest.mark.parametrize("bounds", [None, [0, 5, 70]], ids=["rows", "packed"])
@pytest.mark.parametrize(("name", "change"), [
    ("saved_state", lambda x: x[:-1]), ("saved_state", lambda x: x.half()), ("saved_state", lambda x: x.mT),
    ("saved_state", lambda x: torch.cat([x, x])),
    ("saved_sa", lambda x: x[:, 1:]), ("saved_sa", lambda x: x.bfloat16()), ("saved_sa", lambda x: x.transpose(1, 3)),
    ("dfinal_state", lambda x: x[1:]), ("dfinal_state", lambda x: x.double()), ("dfinal_state", lambda x: x.flatten()),
])  # fmt: skip
def test_backward_refuses_what_forward_did_not_keep(native, name, change, bounds):
    """Read as if it fitted, it would be numbers from outside the tensor, or a crash."""
    documents = 2
    inputs, state = problem(1 if bounds else documents, 70, 1, 16, documents=documents)
    inputs, cu_seqlens = [x.detach() for x in inputs], bounds and torch.tensor(bounds, dtype=torch.int32)
    y, final_state, saved_state, saved_sa = native.wkv7_forward(*inputs, state.detach(), cu_seqlens, True, False)
    kept = {"dfinal_state": final_state, "saved_state": saved_state, "saved_sa": saved_sa}

    def backward(dfinal_state, saved_state, saved_sa):
        return native.wkv7_backward(y, dfinal_state, *inputs, state.detach(), cu_seqlens, saved_state, saved_sa, False)

    backward(**kept)
    with pytest.raises(RuntimeError, match=name):
        backward(**{**kept, name: change(kept[name])})


def test_without_a_compiler_the_portable_kernel_serves_with_one_warning(monkeypatch):
    def no_compiler(*_):
        raise BuildError("no C++ compiler; install one")

    monkeypatch.setattr(module.build, "load_native", no_compiler)
    monkeypatch.setattr(module, "_warned", set())
    inputs, state = problem(1, 3, 1, 16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            y, _ = wkv7(*inputs, state)
    assert [str(w.message) for w in caught if "no C++ compiler" in str(w.message)] == [str(caught[0].message)]
    assert torch.equal(y, wkv7(*inputs, state, kernel="portable")[0])
    with pytest.raises(BuildError, match=r"no C\+\+ compiler"):
        wkv7(*inputs, state, kernel="recurrent")
    monkeypatch.setattr(module, "_warned", set())
    assert "no C++ compiler" in module.describe_kernel("cpu", torch.float32, 16, "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the summary of a run has said it
        wkv7(*inputs, state)

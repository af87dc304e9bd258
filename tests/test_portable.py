"""The portable kernel of wkv7: against float64, which operators it is made of, and what torch.compile makes of it."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from src.ops import wkv7
from src.ops.portable_layout import CHUNK, from_chunks, pack, to_chunks
from src.ops.reference import wkv7_reference
from tests.test_wkv7 import FAST, MIXED, NAMES, SLOW, error, in_float64, outputs_and_gradients, problem

portable = partial(wkv7, kernel="portable")
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SHAPES = {
    "one-token": (2, 1, 1, 64),
    "two-tokens": (1, 2, 2, 64),
    "a-chunk": (2, CHUNK, 1, 32),
    "one-more": (1, CHUNK + 1, 2, 64),
    "odd": (2, 67, 2, 32),
    "odd-head": (1, 40, 1, 24),
    "head-128": (1, 35, 1, 128),
}
CASES = [(shape, torch.float32, MIXED) for shape in SHAPES]
CASES += [("odd", dtype, decay) for dtype in DTYPES for decay in (SLOW, MIXED, FAST)]


@pytest.fixture(autouse=True)
def _seed_and_one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(inputs, state, cu_seqlens=None):
    """At most 1e-5 from float64; where bf16 or fp16 has rounded, at most twice as far as plain PyTorch."""
    exact = outputs_and_gradients(wkv7_reference, *in_float64(inputs, state), cu_seqlens)
    plain = outputs_and_gradients(wkv7_reference, inputs, state, cu_seqlens)
    got = outputs_and_gradients(portable, inputs, state, cu_seqlens)
    for name, x, p, e in zip(NAMES, got, plain, exact, strict=True):
        assert (x.dtype, x.shape) == (p.dtype, p.shape), name
        assert x.is_contiguous(), name
        most = 1e-5 if inputs[0].dtype == torch.float32 else 2 * error(p, e)  # dy is rounded to that dtype, too
        assert error(x, e) <= (max(most, 1e-5) if x.dtype == torch.float32 else most), name


@pytest.mark.parametrize(("shape", "dtype", "decay"), CASES, ids=lambda x: DTYPES.get(x, x))
def test_is_exact(shape, dtype, decay):
    check(*problem(*SHAPES[shape], dtype, decay=decay))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=DTYPES.get)
@pytest.mark.parametrize("decay", [SLOW, FAST], ids=["slow", "fast"])
def test_is_exact_for_equal_keys(decay, dtype):
    """Every token removes and replaces along one direction: powers of A would grow, the inverse doesn't."""
    inputs, state = problem(1, 100, 2, 32, decay=decay)
    with torch.no_grad():
        direction = torch.nn.functional.normalize(torch.randn(32), dim=-1)
        for i, factor in ((2, 1.0), (4, -1.0), (5, 1.0)):
            inputs[i].copy_(factor * direction.expand_as(inputs[i]))
    check([x.detach().to(dtype).requires_grad_() for x in inputs], state)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 33, 512, 4096])
@pytest.mark.parametrize("decay", [SLOW, FAST], ids=["slow", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=DTYPES.get)
def test_is_exact_for_correlated_keys_at_any_length(dtype, decay, tokens):
    """Keys around one direction, with learning rates of up to 1."""
    inputs, state = problem(1, tokens, 1, 64, decay=decay)
    with torch.no_grad():
        key = torch.nn.functional.normalize(torch.randn(64) + 0.3 * torch.randn(1, tokens, 1, 64), dim=-1)
        for i, x in ((2, key), (4, -key), (5, key * torch.rand_like(key))):
            inputs[i].copy_(x)
    check([x.detach().to(dtype).requires_grad_() for x in inputs], state)


@pytest.mark.parametrize("decay", [SLOW, MIXED, FAST])
def test_is_exact_over_many_chunks(decay):
    """Against itself in float64, which the tests above compare with the recurrence."""
    inputs, state = problem(1, 4096, 1, 64, decay=decay)
    exact = outputs_and_gradients(portable, *in_float64(inputs, state))
    for name, x, e in zip(NAMES, outputs_and_gradients(portable, inputs, state), exact, strict=True):
        assert error(x, e) <= 1e-5, name


BOUNDS = [[0, 1, 40, 40, 73, 105], [0, 0, 32, 64, 65, 105, 105], [0, 105], [0, *range(1, 106)]]


@pytest.mark.parametrize("bounds", BOUNDS, ids=len)
def test_documents_in_a_row_are_exact(bounds):
    check(*problem(1, 105, 1, 16, documents=len(bounds) - 1), torch.tensor(bounds, dtype=torch.int32))


def test_gradients_are_the_derivatives():
    inputs, state = in_float64(*problem(1, CHUNK + 2, 1, 2))
    assert torch.autograd.gradcheck(portable, [*inputs, state], fast_mode=True)
    bounds = torch.tensor([0, 2, 2, CHUNK + 2], dtype=torch.int32)
    states = torch.randn(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(portable, [*inputs, states, bounds], fast_mode=True)


@pytest.mark.parametrize("which", [0, 1], ids=["y", "final state"])
def test_one_output_alone_has_its_gradient(which):
    inputs, state = problem(1, 40, 1, 16)
    leaves = [*inputs, state]
    got, want = (
        torch.autograd.grad(op(*leaves)[which].square().sum(), leaves, materialize_grads=True)
        for op in (portable, wkv7_reference)
    )
    for x, y in zip(got, want, strict=True):
        assert error(x, y.double()) < 1e-5 or not y.any()


def test_views_are_read_as_what_they_show():
    fused = torch.randn(2, 20, 6, 2, 16, requires_grad=True)
    views = [fused[:, :, i] for i in range(5)] + [fused[:, :, 5].transpose(2, 3).contiguous().transpose(2, 3)]
    (got,) = torch.autograd.grad(portable(*views)[0].sum(), fused)
    (want,) = torch.autograd.grad(wkv7_reference(*(x.contiguous() for x in views))[0].sum(), fused)
    assert error(got, want.double()) < 1e-5


def test_a_second_derivative_is_refused():
    inputs, _ = problem(1, 3, 1, 16)
    (grad,) = torch.autograd.grad(portable(*inputs)[0].square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grad.sum().backward()


@pytest.mark.parametrize("bounds", BOUNDS, ids=len)
def test_every_document_begins_at_a_chunk_and_every_token_has_a_slot(bounds):
    packing = pack(torch.tensor(bounds, dtype=torch.int32), bounds[-1])
    x = torch.randn(1, bounds[-1], 2, 4)
    chunks = to_chunks(x, packing, padding=7.0).flatten(1, 2)
    assert chunks.shape[0] == bounds[-1] // CHUNK + len(bounds) - 1
    rows = chunks.unflatten(1, (1, 2))
    assert torch.equal(from_chunks(torch.add, rows, torch.zeros_like(rows), x, packing), x)
    assert (chunks == 7.0).sum() == chunks.numel() - x.numel()
    for document, (begin, end) in enumerate(pairwise(bounds)):
        first, last = packing.first[document], packing.last[document]
        assert last - first == max(end - begin - 1, 0) // CHUNK
        assert (packing.document[first : last + 1] == document).all()
        assert begin == end or torch.equal(chunks[first, :, 0], x[0, begin])
    assert packing.is_first.nonzero().flatten().tolist() == packing.first.tolist()
    assert packing.is_last.nonzero().flatten().tolist() == packing.last.tolist()


class Recorder(TorchDispatchMode):
    """Names of the operators that are dispatched."""

    def __init__(self):
        super().__init__()
        self.operators = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.add(func)
        return func(*args, **(kwargs or {}))


def is_core(operator):
    """Whether an operator, or the functional form of an in-place one, is in PyTorch's core ATen set."""
    name = operator._schema.name.removeprefix("aten::").removesuffix("_")
    packet = getattr(torch.ops.aten, {"_unsafe_view": "view"}.get(name, name), None)  # what reshape calls after a copy
    return packet is not None and any(
        torch.Tag.core in getattr(packet, overload).tags for overload in packet.overloads()
    )


@pytest.mark.parametrize("bounds", [None, [0, 5, 5, 70]], ids=["rows", "packed"])
@pytest.mark.parametrize("tokens", [64, 70])
def test_every_operator_is_a_core_one(bounds, tokens):
    """So that any device that PyTorch dispatches matrix products to runs it."""
    documents = None if bounds is None else len(bounds) - 1
    inputs, state = problem(1, tokens, 1, 64, torch.bfloat16, documents=documents)
    cu_seqlens = None if bounds is None else torch.tensor([*bounds[:-1], tokens], dtype=torch.int32)
    for start in (state, None):
        with Recorder() as recorder:
            y, final_state = portable(*inputs, start, cu_seqlens)
            leaves = [*inputs, *([] if start is None else [start])]
            torch.autograd.grad((y, final_state), leaves, (torch.ones_like(y), torch.ones_like(final_state)))
        made_here = {torch.ops.aten.ones_like.default, torch.ops.aten.detach.default}  # by this test, and by autograd
        assert not {str(op) for op in recorder.operators - made_here if not is_core(op)}
    assert not is_core(torch.ops.aten.cumprod.default)  # the check can tell


@pytest.mark.slow
def test_compiled_it_is_one_graph_for_all_lengths_of_packed_rows():
    """From two chunks on: a graph for fewer is another one, as it is for a single document."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(portable, backend=counter, fullgraph=True)  # fullgraph: a break is an error
    for bounds in ([0, 30, 100], [0, 5, 33, 64], [0, 5, 33, 64, 70, 200], [0, 150, 160, 170]):
        inputs, state = problem(1, bounds[-1], 2, 32, documents=len(bounds) - 1)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        got = outputs_and_gradients(compiled, inputs, state, cu_seqlens)
        for name, x, y in zip(NAMES, got, outputs_and_gradients(portable, inputs, state, cu_seqlens), strict=True):
            assert error(x, y.double()) < 1e-6, name
    assert counter.frame_count <= 2  # for the first length, and for any

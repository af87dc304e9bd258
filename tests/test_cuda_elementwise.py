"""The CUDA kernels of a block's elementwise work, executed on a CPU: against float64, in every lane order, as ops."""

import ctypes
import importlib

import pytest
import torch
from host_cuda.harness import CUDA, DTYPES, ORDERS, Guarded, build, build_ops, compiler, pointer, shared_folder
from test_elementwise import compare, inputs_problem, shift

from src.ops import relu_squared, time_mix_inputs, time_mix_output

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

module = importlib.import_module("src.ops.elementwise")
SOURCES = ("token_shift", "time_mix", "relu_squared")
OPS = ("token_shift_1", "token_shift_3", "token_shift_6", "time_mix_inputs", "time_mix_output", "relu_squared")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = shared_folder(tmp_path_factory)
    loaded = {name: ctypes.CDLL(str(build(folder, CUDA / f"{name}.cu")), mode=ctypes.RTLD_GLOBAL) for name in SOURCES}
    build_ops(folder, CUDA / "elementwise_cuda.cpp")
    module._register("rwkv7_host")
    return loaded


@pytest.fixture(autouse=True)
def through_host(libraries, monkeypatch):
    """src/ops/elementwise.py takes the kernels, run on the CPU, for its native ops."""
    torch.manual_seed(0)
    for name in (*OPS, *(f"{op}_backward" for op in OPS)):
        monkeypatch.setattr(torch.ops.rwkv7, name, getattr(torch.ops.rwkv7_host, name), raising=False)
    monkeypatch.setattr(module, "NATIVE_DTYPES", {"cpu": tuple(DTYPES)})
    monkeypatch.setattr(module, "_native", lambda device: True)


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


@dtypes
@pytest.mark.parametrize("mixes", [1, 3, 6])
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize(("batch", "length", "width"), [(1, 1, 32), (3, 7, 48), (2, 75, 160)])
def test_token_shift(dtype, mixes, carried, batch, length, width):
    """A row alone, documents that end within a warp's rows, and over the tiles' edges in rows and channels."""
    x = torch.randn(batch, length, width, requires_grad=True)
    last = torch.randn(batch, width, requires_grad=True) if carried else None
    compare(shift, [x, last, None, *(torch.rand(1, 1, width, requires_grad=True) for _ in range(mixes))], dtype)


@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize(
    "bounds", [[0, 5, 6, 40], [0, 130], [0, 64, 72, 128, 129], [0, 0, 3, 3, 3, 16, 16], [0, 8, 8, 9]], ids=str
)
def test_token_shift_of_packed_documents(carried, bounds):
    x = torch.randn(1, bounds[-1], 32, requires_grad=True)
    last = torch.randn(len(bounds) - 1, 32, requires_grad=True) if carried else None
    bounds = torch.tensor(bounds, dtype=torch.int32)
    compare(shift, [x, last, bounds, *(torch.rand(1, 1, 32, requires_grad=True) for _ in range(6))])


@pytest.mark.parametrize("bounds", [[3, 12], [0, 7], [-4, 6, 12], [0, 9, 4, 12], [5, 2, 40]], ids=str)
def test_no_bounds_reach_other_memory(libraries, bounds):
    """Their values can't be checked on the host. What they must not do is read or write elsewhere."""
    rows, width, documents = 12, 32, len(bounds) - 1
    out, inside = Guarded(), {}
    for name, shape in (("x", (rows, width)), ("last", (documents, width)), ("d", (rows, width)), ("mix", (1, width))):
        inside[name] = out.empty(shape, torch.float32).normal_()
    for name, shape in (("y", (rows, width)), ("dx", (rows, width)), ("dlast", (documents, width)), ("dmix", (width,))):
        inside[name] = out.empty(shape, torch.float32)
    cu_seqlens, partial = torch.tensor(bounds, dtype=torch.int32), torch.empty(width)
    at = {name: ctypes.c_void_p(tensor.data_ptr()) for name, tensor in inside.items()}
    listed = {name: (ctypes.c_void_p * 1)(at[name].value) for name in ("d", "mix", "y", "dmix")}
    sizes = [0, 1, ctypes.c_int64(rows), ctypes.c_int64(rows), documents, width]
    read = [at["x"], at["last"], pointer(cu_seqlens), listed["mix"]]
    shift_kernels = libraries["token_shift"]
    assert shift_kernels.token_shift_forward(*sizes, *read, listed["y"], ctypes.c_int64(0)) == 0
    written = [at["dx"], at["dlast"], listed["dmix"], pointer(partial), ctypes.c_int64(0)]
    assert shift_kernels.token_shift_backward(*sizes, listed["d"], *read, *written) == 0
    out.check()
    assert all(inside[name].isfinite().all() for name in ("y", "dx", "dmix"))


@dtypes
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("head_size", [16, 32, 64, 128])
def test_inputs(layer, head_size, dtype):
    def op(*tensors, kernel="auto"):
        return time_mix_inputs(*tensors, *(() if layer else (None,)), head_size, kernel=kernel)

    compare(op, inputs_problem(layer, (2, 35, 256 if head_size == 64 else 128)), dtype)


def test_inputs_of_a_zero_key():
    """The norm is cut at 1e-12 there: finite, and no gradient through the norm."""
    inputs = inputs_problem(1, (1, 5, 64))
    with torch.no_grad():
        inputs[0][0, 3] = 0
    outputs = time_mix_inputs(*inputs, 64)
    assert (outputs[2][0, 3] == 0).all()
    gradients = torch.autograd.grad(sum(x.sum() for x in outputs), inputs)
    assert all(torch.isfinite(g).all() for g in gradients)


def test_inputs_of_keys_whose_norm_is_cut():
    inputs = inputs_problem(1, (1, 5, 64))
    with torch.no_grad():
        inputs[0] *= 1e-14
    compare(lambda *t, kernel="auto": time_mix_inputs(*t, 64, kernel=kernel), inputs)


@dtypes
def test_extreme_gates_are_finite(dtype):
    """Sigmoids of numbers so large that their exponential overflows."""
    k, v, a, first, residual, *vectors = (x.detach().to(dtype) for x in inputs_problem(1, (1, 4, 64)))
    a[0, :2], residual[0, :2] = 30000, -30000
    a[0, 2:], residual[0, 2:] = -30000, 30000
    inputs = [x.requires_grad_() for x in (k, v, a, first, residual, *vectors)]
    outputs = time_mix_inputs(*inputs, 64)
    assert torch.equal(outputs[1][0, :2], v[0, :2])
    assert (outputs[3][0, 2:] == 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(sum(x.float().sum() for x in outputs), inputs))


@dtypes
@pytest.mark.parametrize("head_size", [16, 32, 64, 128])
def test_output(head_size, dtype):
    width = 192 if head_size == 64 else 128
    activations = [torch.randn(2, 35, width, requires_grad=True) for _ in range(5)]
    parameters = [torch.randn(width // head_size, head_size), torch.randn(width), torch.randn(width)]
    inputs = [*activations, *(p.requires_grad_() for p in parameters)]
    compare(lambda *t, kernel="auto": time_mix_output(*t, 64e-5, head_size, kernel=kernel), inputs, dtype)


@dtypes
@pytest.mark.parametrize("shape", [(), (1,), (17,), (2, 3, 64), (5, 333)], ids=str)
def test_relu_squared(shape, dtype):
    compare(relu_squared, [torch.randn(shape, requires_grad=True)], dtype)


def test_relu_squared_of_infinities_and_nan():
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0])
    assert torch.equal(relu_squared(x).nan_to_num(nan=7), torch.tensor([float("inf"), 0.0, 7.0, 0.0]).nan_to_num(nan=7))


ROWS, VECTOR = (1, 75, 192), (1, 1, 192)
PROBLEMS = {
    "shift": (lambda x, last, *mixes: shift(x, last, None, *mixes), [ROWS, (1, 192), *[VECTOR] * 6]),
    "inputs": (lambda *t: time_mix_inputs(*t, 64), [*[ROWS] * 5, *[VECTOR] * 4]),
    "output": (lambda *t: time_mix_output(*t, 64e-5, 64), [*[ROWS] * 5, (3, 64), (192,), (192,)]),
}


@pytest.mark.parametrize(("op", "shapes"), PROBLEMS.values(), ids=PROBLEMS)
def test_equal_bits_in_every_lane_order(libraries, op, shapes):
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    runs = []
    for order in ORDERS.values():
        for library in libraries.values():
            library.host_cuda_order(*order)
        outputs = op(*inputs)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        runs.append(outputs + list(torch.autograd.grad(outputs, inputs, [x.detach() for x in outputs])))
    for library in libraries.values():
        library.host_cuda_order(*ORDERS["forward"])
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(run, runs[0], strict=True))


def test_layouts_that_are_not_dense_or_not_aligned():
    inputs = inputs_problem(1, (2, 9, 64))
    strided = [x.detach().transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    shifted = [torch.cat([x.new_zeros(1), x.detach().flatten()])[1:].view(x.shape) for x in inputs]
    for other in (strided, shifted):
        for x, y in zip(time_mix_inputs(*inputs, 64), time_mix_inputs(*other, 64), strict=True):
            assert torch.equal(x, y)


def test_opcheck():
    def leaf(*shape):
        return torch.randn(*shape, requires_grad=True)

    native = torch.ops.rwkv7_host
    x, mixes = leaf(1, 9, 32), [leaf(1, 1, 32) for _ in range(6)]
    bounds = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    torch.library.opcheck(native.token_shift_1.default, (x, None, None, mixes[0]))
    torch.library.opcheck(native.token_shift_3.default, (x, leaf(3, 32), bounds, *mixes[:3]))
    torch.library.opcheck(native.token_shift_6.default, (x, leaf(3, 32), bounds, *mixes))
    torch.library.opcheck(native.time_mix_inputs.default, (*inputs_problem(1, (2, 9, 32)), 16))
    output = [leaf(2, 9, 32) for _ in range(5)] + [leaf(2, 16), leaf(32), leaf(32)]
    torch.library.opcheck(native.time_mix_output.default, (*output, 64e-5, 16))
    torch.library.opcheck(native.relu_squared.default, (leaf(3, 20),))


def test_wrong_inputs_are_refused():
    x, mix, ops = torch.randn(1, 6, 32), torch.rand(1, 1, 32), torch.ops.rwkv7_host
    for bounds in (torch.tensor([0, 6]), torch.tensor([0], dtype=torch.int32)):
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            ops.token_shift_1(x, None, bounds, mix)
    with pytest.raises(RuntimeError, match="are needed"):
        ops.token_shift_1(x, torch.randn(2, 32), None, mix)
    with pytest.raises(RuntimeError, match="one dtype"):
        ops.token_shift_1(x, None, None, mix.bfloat16())
    with pytest.raises(RuntimeError, match="multiple of 4"):
        ops.token_shift_1(x[..., :6], None, None, mix[..., :6])
    with pytest.raises(RuntimeError, match="head size"):
        ops.time_mix_output(*[torch.randn(1, 2, 96)] * 5, *[torch.randn(96)] * 3, 1e-5, 48)
    with pytest.raises(RuntimeError, match="float16"):
        ops.relu_squared(x.double())

"""A block's fused elementwise ops: values and gradients against plain PyTorch in float64, registered shapes."""

import importlib
import itertools

import pytest
import torch

from src.model import RWKV7, ModelConfig
from src.ops import add_layer_norm, reference, relu_squared, time_mix_inputs, time_mix_output, token_shift

module = importlib.import_module("src.ops.elementwise")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def native():
    if not module._native("cpu"):
        pytest.skip("no native library on this machine")
    return torch.ops.rwkv7


def compare(op, inputs, dtype=torch.float32):
    """Outputs and gradients of `op` and of its plain form in `dtype`, both against the plain form in float64."""

    def outputs_and_gradients(function, tensors):
        outputs = function(*tensors)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        generator = torch.Generator().manual_seed(1)
        d = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
        leaves = [x for x in tensors if x is not None and x.requires_grad]
        return outputs + list(torch.autograd.grad(outputs, leaves, d))

    def cast(x, dtype):
        return x.detach().to(dtype).requires_grad_(x.requires_grad) if x is not None and x.is_floating_point() else x

    inputs = [cast(x, dtype) for x in inputs]
    exact = outputs_and_gradients(lambda *t: op(*t, kernel="reference"), [cast(x, torch.float64) for x in inputs])
    plain = outputs_and_gradients(lambda *t: op(*t, kernel="reference"), inputs)
    got = outputs_and_gradients(op, inputs)
    assert len(got) == len(exact)
    for g, p, e in zip(got, plain, exact, strict=True):
        assert g.shape == e.shape
        assert g.dtype == dtype
        assert torch.isfinite(g).all()
        scale = e.norm().clamp(min=1e-30)
        assert (g - e).norm() / scale <= 2 * (p - e).norm() / scale + 1e-7


def norm(x, added, weight, bias, kernel="auto"):
    total, out = add_layer_norm(x, added, weight, bias, 1e-5, kernel=kernel)
    return (total, out) if added is not None else (out,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 5, 48), (3, 70, 64)], ids=str)
@pytest.mark.parametrize("adds", [True, False], ids=["sum", "one"])
def test_add_layer_norm(adds, shape, dtype, native):
    x, added = (3 + torch.randn(shape, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], requires_grad=True) for _ in range(2))
    compare(norm, [x, added if adds else None, weight, bias], dtype)


def test_add_layer_norm_where_only_one_output_is_used(native):
    x, added, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((2, 3, 16), (2, 3, 16), (16,), (16,)))
    total, out = add_layer_norm(x, added, weight, bias, 1e-5)
    for got in torch.autograd.grad(total.sum(), (x, added), retain_graph=True):
        assert torch.equal(got, torch.ones_like(x))
    plain = torch.nn.functional.layer_norm(x + added, (16,), weight, bias)
    for got, wanted in zip(
        torch.autograd.grad(out.square().sum(), (x, added)),
        torch.autograd.grad(plain.square().sum(), (x, added)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def shift(x, last, bounds, *mixes, kernel="auto"):
    return token_shift(x, last, bounds, mixes, kernel=kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mixes", [1, 3, 6])
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 7), (2, 150)])
def test_token_shift(dtype, mixes, carried, batch, length):
    x = torch.randn(batch, length, 48, requires_grad=True)
    last = torch.randn(batch, 48, requires_grad=True) if carried else None
    compare(shift, [x, last, None, *(torch.rand(1, 1, 48, requires_grad=True) for _ in range(mixes))], dtype)


@pytest.mark.parametrize("mixes", [1, 6])
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("bounds", [[0, 5, 6, 40], [0, 170], [0, 64, 128, 192, 193]], ids=str)
def test_token_shift_of_packed_documents(mixes, carried, bounds):
    x = torch.randn(1, bounds[-1], 32, requires_grad=True)
    last = torch.randn(len(bounds) - 1, 32, requires_grad=True) if carried else None
    bounds = torch.tensor(bounds, dtype=torch.int32)
    compare(shift, [x, last, bounds, *(torch.rand(1, 1, 32, requires_grad=True) for _ in range(mixes))])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5, 64), (2, 0, 64)])
def test_empty_inputs(shape, dtype):
    """Of no sequences, and of no tokens: empty outputs of the right shapes, and gradients."""
    operands = [torch.randn(shape, requires_grad=True) for _ in range(5)]
    vectors = [torch.randn(1, 1, 64, requires_grad=True) for _ in range(4)]
    norm = [torch.randn(2, 32).requires_grad_(), *(torch.randn(64, requires_grad=True) for _ in range(2))]
    last = torch.randn(shape[0], 64, requires_grad=True)
    for kernel in ("auto", "portable"):
        cast = [[t.detach().to(dtype).requires_grad_() for t in group] for group in (operands, vectors, norm, [last])]
        activations, scales, of_norm, before = cast
        outputs = [
            *token_shift(activations[0], before[0], None, tuple(scales[:2]), kernel=kernel),
            *time_mix_inputs(*activations, *scales, 32, kernel=kernel),
            time_mix_output(*activations, *of_norm, 64e-5, 32, kernel=kernel),
            relu_squared(activations[0], kernel=kernel),
        ]
        assert all(output.shape == shape and output.dtype == dtype for output in outputs)
        inputs = [tensor for group in cast for tensor in group]
        grads = torch.autograd.grad(sum(output.float().sum() for output in outputs), inputs, materialize_grads=True)
        for tensor, grad in zip(inputs, grads, strict=True):
            assert grad.shape == tensor.shape
            assert (grad == 0).all()


def inputs_problem(layer, shape=(2, 67, 128)):
    activations = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    first = [torch.randn(shape, requires_grad=True) if layer else None for _ in range(2)]
    return [*activations, *first, *(torch.randn(1, 1, shape[-1], requires_grad=True) for _ in range(4 if layer else 3))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("head_size", [16, 32, 64, 128])
def test_inputs(layer, head_size, dtype):
    inputs = inputs_problem(layer)
    compare(
        lambda *t, kernel="auto": time_mix_inputs(*t, *(() if layer else (None,)), head_size, kernel=kernel),
        inputs,
        dtype,
    )


def test_inputs_of_a_zero_key():
    """The norm is cut at 1e-12 there: finite, and no gradient through the norm."""
    inputs = inputs_problem(1)
    with torch.no_grad():
        inputs[0][0, 3] = 0
    outputs = time_mix_inputs(*inputs, 64)
    assert (outputs[2][0, 3] == 0).all()
    gradients = torch.autograd.grad(sum(x.sum() for x in outputs), inputs)
    assert all(torch.isfinite(g).all() for g in gradients)


def test_inputs_of_keys_whose_norm_is_cut():
    """Shorter than 1e-12, but not zero: the gradient through the norm would be seen."""
    inputs = inputs_problem(1)
    with torch.no_grad():
        inputs[0] *= 1e-14
    compare(lambda *t, kernel="auto": time_mix_inputs(*t, 64, kernel=kernel), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [16, 32, 64, 128])
def test_output(head_size, dtype):
    activations = [torch.randn(2, 67, 128, requires_grad=True) for _ in range(5)]
    parameters = [torch.randn(128 // head_size, head_size), torch.randn(128), torch.randn(128)]
    inputs = [*activations, *(p.requires_grad_() for p in parameters)]
    compare(lambda *t, kernel="auto": time_mix_output(*t, 64e-5, head_size, kernel=kernel), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (17,), (2, 3, 64), (0, 4), (5, 33)])
def test_relu_squared(shape, dtype):
    compare(relu_squared, [torch.randn(shape, requires_grad=True)], dtype)


def test_relu_squared_of_infinities_and_nan():
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0])
    assert torch.equal(relu_squared(x).nan_to_num(nan=7), torch.tensor([float("inf"), 0.0, 7.0, 0.0]).nan_to_num(nan=7))


def test_kernel_reference_calls_no_native_op():
    """The whole model, forward and backward: it needs no library, and a suspect kernel can be ruled out."""
    tokens = torch.arange(10).view(1, 10)
    names = {}
    for kernel in ("auto", "reference"):
        model = RWKV7(ModelConfig(2, 64, 16, kernel=kernel))
        with torch.profiler.profile() as profile:
            model(tokens)[0].sum().backward()
        names[kernel] = {event.key for event in profile.key_averages() if event.key.startswith("rwkv7::")}
    assert not names["reference"]
    assert not module._native("cpu") or "rwkv7::relu_squared_backward" in names["auto"]


def test_layouts_that_are_not_dense():
    inputs = inputs_problem(1)
    strided = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in inputs]
    for x, y in zip(time_mix_inputs(*inputs, 64), time_mix_inputs(*strided, 64), strict=True):
        assert torch.equal(x, y)
    x = torch.randn(7, 40).t().requires_grad_()
    for kernel in ("auto", "reference"):  # the gradient of a sum is one number seen everywhere
        (gradient,) = torch.autograd.grad(relu_squared(x, kernel=kernel).sum(), x)
        assert torch.equal(gradient, 2 * x.detach().clamp(min=0))


def test_every_run_gives_the_same_bits():
    inputs = inputs_problem(1, (2, 200, 64))
    runs = []
    for _ in range(3):
        outputs = time_mix_inputs(*inputs, 64)
        runs.append(torch.autograd.grad(sum(x.square().sum() for x in outputs), inputs))
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(run, runs[0], strict=True))


ROWS, VECTOR = (3, 500, 64), (1, 1, 64)
OPS = {
    "shift-1": (lambda x, last, mix: shift(x, last, None, mix), [ROWS, (3, 64), VECTOR]),
    "shift-6": (lambda x, last, *mixes: shift(x, last, None, *mixes), [ROWS, (3, 64), *[VECTOR] * 6]),
    "inputs": (lambda *t: time_mix_inputs(*t, 32), [*[ROWS] * 5, *[VECTOR] * 4]),
    "output": (lambda *t: time_mix_output(*t, 64e-5, 32), [*[ROWS] * 5, (2, 32), (64,), (64,)]),
    "relu-squared": (relu_squared, [ROWS]),
    "norm": (norm, [ROWS, ROWS, (64,), (64,)]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "shapes"), OPS.values(), ids=OPS)
def test_the_number_of_threads_changes_no_bit(native, op, shapes, dtype):
    inputs = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]

    def outputs_and_gradients(threads):
        torch.set_num_threads(threads)
        outputs = op(*inputs)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        return outputs + list(torch.autograd.grad(outputs, inputs, [x.detach() for x in outputs]))

    before = torch.get_num_threads()
    try:
        one, *others = (outputs_and_gradients(threads) for threads in (1, 2, 3))
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(other, one, strict=True))


def test_other_dtypes_are_plain():
    x, mix = torch.randn(2, 5, 32).double(), torch.rand(1, 1, 32).double()
    got, want = token_shift(x, None, None, (mix,)), reference.token_shift_reference(x, None, None, (mix,))
    assert torch.equal(got[0], want[0])


def test_opcheck(native):
    def leaf(*shape):
        return torch.randn(*shape, requires_grad=True)

    x, mixes = leaf(2, 9, 32), [leaf(1, 1, 32) for _ in range(6)]
    torch.library.opcheck(native.token_shift_1.default, (x, None, None, mixes[0]))
    torch.library.opcheck(native.token_shift_6.default, (x, leaf(2, 32), None, *mixes))
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    torch.library.opcheck(native.token_shift_6.default, (leaf(1, 9, 32), leaf(2, 32), bounds, *mixes))
    torch.library.opcheck(native.time_mix_inputs.default, (*inputs_problem(1, (2, 9, 32)), 16))
    k, v, a, _, _, *parameters = inputs_problem(0, (2, 9, 32))
    torch.library.opcheck(native.time_mix_inputs.default, (k, v, a, None, None, *parameters, None, 16))
    output = [leaf(2, 9, 32) for _ in range(5)] + [leaf(2, 16), leaf(32), leaf(32)]
    torch.library.opcheck(native.time_mix_output.default, (*output, 64e-5, 16))
    torch.library.opcheck(native.relu_squared.default, (leaf(3, 20),))
    torch.library.opcheck(native.add_layer_norm.default, (x, leaf(2, 9, 32), leaf(32), leaf(32), 1e-5))


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_a_document_without_tokens_returns_its_initial_state(kernel):
    """First, in the middle and last: the same as each document alone, its state and the state's gradient too."""
    from src.model import ChannelMix, ModelConfig

    torch.manual_seed(0)
    mix = ChannelMix(ModelConfig(n_layer=2, n_embd=64, vocab_size=8, head_size=32, kernel=kernel))
    with torch.no_grad():
        for parameter in mix.parameters():
            parameter.uniform_(0.1, 0.9)
    bounds = [0, 0, 5, 5, 12, 12]
    x = torch.randn(1, 12, 64)
    shift = torch.randn(5, 64, requires_grad=True)
    y, after = mix(x, shift, torch.tensor(bounds, dtype=torch.int32))
    (y.square().sum() + (after * torch.arange(1.0, 6.0)[:, None]).sum()).backward()
    alone = shift.detach().clone().requires_grad_()
    total = torch.zeros(())
    for d, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin == end:
            last = alone[d]
        else:
            part, last = mix(x[:, begin:end], alone[d : d + 1])
            torch.testing.assert_close(y[:, begin:end], part)
            total = total + part.square().sum()
        torch.testing.assert_close(after[d], last.reshape(-1))
        total = total + (last * (d + 1)).sum()
    total.backward()
    torch.testing.assert_close(shift.grad, alone.grad)


@pytest.mark.parametrize("bounds", [[3, 12], [0, 7], [0], [], [0, 9, 4, 12]], ids=str)
def test_wrong_bounds_are_refused(bounds):
    from src.ops import token_shift

    x, mix = torch.randn(1, 12, 64), torch.rand(1, 1, 64)
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        token_shift(x, None, torch.tensor(bounds, dtype=torch.int32), (mix,))

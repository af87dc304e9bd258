"""The CUDA kernels of wkv7, executed on a CPU: against float64, in every lane order, within their buffers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from host_cuda.harness import CUDA, GROUP_ORDERS, ORDERS, HostLibrary, Wkv7, build, compiler, shared_folder
from host_cuda.problems import answer, error, incoming, problem

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
EXACT = {FP32: 1e-6, BF16: 2.2e-3, FP16: 4e-4}  # rounding of the outputs is most of the last two
SHAPES = [
    pytest.param({}, id="whole"),
    pytest.param({"state": True}, id="state"),
    pytest.param({"cu_seqlens": [0, 5, 5, 22, 37], "state": True}, id="packed, one empty"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices of 64 x 64 gain nothing from more, and other test processes run beside
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory):
    return Wkv7(HostLibrary(build(shared_folder(tmp_path_factory), CUDA / "wkv7_recurrent.cu")), "recurrent")


def outcome(kernel, x, with_final=True):
    """Every output and gradient of a kernel, and their errors against float64."""
    dy, dfinal_state = incoming(x)
    if not with_final:
        dfinal_state = None
    saved = kernel.forward(x)
    got = {"y": saved["y"], "final_state": saved["final_state"], **kernel.backward(x, saved, dy, dfinal_state)}
    true = answer(x, dy, dfinal_state)
    return got, {name: error(got[name], true[name]) for name in true}


def assert_within(errors, bound):
    worst = {name: f"{value:.2e}" for name, value in errors.items() if not value <= bound.get(name, bound["all"])}
    assert not worst, f"beyond {bound}: {worst}"


SANITIZED = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch
from host_cuda.harness import HostLibrary, Wkv7
from host_cuda.problems import incoming, problem
kernel = Wkv7(HostLibrary(sys.argv[3]), sys.argv[4])
others = [(torch.float32, 32), (torch.float16, 128)] if sys.argv[4] == "recurrent" else []
for dtype, head_size in [(torch.bfloat16, 64), *others]:
    for shape in ({}, {"cu_seqlens": [0, 5, 5, 54], "state": True}, {"cu_seqlens": [-9, 99, 7, 999], "state": True}):
        x = problem(1, 54, 1, head_size, dtype, **shape)
        dy, dfinal_state = incoming(x)
        kernel.backward(x, kernel.forward(x), dy, dfinal_state)
print("clean", flush=True)
# The control: a buffer that has fewer tokens than the kernel reads.
x = problem(1, 30, 1, 64, torch.bfloat16)
kernel.forward({**x, "v": x["v"][:, :20].clone()})
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recurrent", "chunked", "wgmma"])
def test_address_sanitizer_finds_nothing_out_of_bounds(name, tmp_path_factory):
    runtime = subprocess.run([compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_file():
        pytest.skip("no AddressSanitizer")
    flags = ("-fsanitize=address", "-O1")
    library = build(shared_folder(tmp_path_factory), CUDA / f"wkv7_{name}.cu", *flags)
    # The stack that a fiber leaves is none that the sanitizer knows as such; leaks are Python's own.
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", SANITIZED, str(CUDA.parent), str(CUDA.parent / "tests"), str(library), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout == "clean\n", done.stderr[-4000:]
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("head_size", [32, 64, 128])
def test_recurrent_is_exact(recurrent, head_size, dtype, shape):
    batch = 1 if "cu_seqlens" in shape else 2
    _, errors = outcome(recurrent, problem(batch, 37, 1 if head_size == 128 else 2, head_size, dtype, **shape))
    bound = EXACT[dtype]
    assert_within(errors, {"all": bound, "final_state": 1e-6, "dstate": 1e-6})


@pytest.mark.parametrize("kind", ["usual", "fast", "slow", "correlated"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 200])
def test_recurrent_at_any_length_and_decay(recurrent, length, kind):
    _, errors = outcome(recurrent, problem(1, length, 1, 64, FP32, kind=kind, state=True), with_final=False)
    assert_within(errors, {"all": 3e-6})


@pytest.mark.parametrize("head_size", [32, 64, 128])
def test_recurrent_gives_equal_bits_in_every_lane_order(recurrent, head_size):
    # The second window is whole: a warp that runs ahead overwrites what another one still reads of the first.
    x = problem(1, 33, 2, head_size, BF16, cu_seqlens=[0, 32, 33], state=True)
    runs = []
    for order in ORDERS:
        recurrent.host.order(order)
        runs.append(outcome(recurrent, x)[0])
    recurrent.host.order("forward")
    for name, first in runs[0].items():
        assert first.isfinite().all(), name
        assert all(torch.equal(run[name], first) for run in runs), name


def test_recurrent_without_saving_gives_the_same(recurrent):
    x = problem(2, 20, 1, 64, BF16)
    kept, lean = recurrent.forward(x), recurrent.forward(x, save=False)
    assert torch.equal(kept["y"], lean["y"])
    assert torch.equal(kept["final_state"], lean["final_state"])


@pytest.fixture(params=["recurrent", "chunked", "wgmma"])
def kernel(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("bounds", "clamped"),
    [
        ([0, 99, 20], [0, 20, 20]),
        ([0, -3, 20], [0, 0, 20]),
        ([-5, 7, 2**31 - 1], [0, 7, 20]),
        ([30, 40, 50], [20, 20, 20]),
    ],
    ids=["too large", "negative", "both ends", "all outside"],
)
def test_bounds_outside_of_the_tokens_are_clamped(kernel, bounds, clamped):
    """Nothing outside of a buffer is written (the guards), and the tokens inside give what clamped bounds give."""
    runs = []
    for cu_seqlens in (bounds, clamped):
        x = problem(1, 20, 1, 64, BF16, state=True, cu_seqlens=cu_seqlens)
        dy, dfinal_state = incoming(x)
        saved = kernel.forward(x)
        gradients = kernel.backward(x, saved, dy, dfinal_state)
        runs.append({"y": saved["y"], "final_state": saved["final_state"], **gradients})
    for name, tensor in runs[0].items():
        assert torch.equal(tensor.nan_to_num(nan=7), runs[1][name].nan_to_num(nan=7)), name  # NaN: in no document


def test_decreasing_bounds_write_nothing_outside(kernel):
    x = problem(1, 40, 1, 64, BF16, cu_seqlens=[0, 35, 5, 40])
    saved = kernel.forward(x)
    kernel.backward(x, saved, *incoming(x))
    assert saved["final_state"].isfinite().all()


@pytest.mark.parametrize(
    "name", ["chunked", *(pytest.param(n, marks=pytest.mark.slow) for n in ("recurrent", "wgmma"))]
)
def test_debug_build_stops_at_wrong_bounds(name, tmp_path_factory):
    library = build(shared_folder(tmp_path_factory), CUDA / f"wkv7_{name}.cu", "-DPORT_DEBUG", "-O1")
    kernel = Wkv7(HostLibrary(library), name)
    kernel.forward(problem(1, 20, 1, 64, BF16, cu_seqlens=[0, 5, 5, 20]))
    for bounds in ([0, 99, 20], [0, -3, 20], [0, 15, 5, 20], [0, 21]):
        with pytest.raises(AssertionError, match="cu_seqlens decreases or leaves the range"):
            kernel.forward(problem(1, 20, 1, 64, BF16, cu_seqlens=bounds))


def test_a_head_size_without_kernel_is_refused(recurrent):
    with pytest.raises(AssertionError, match="-1"):
        recurrent.forward(problem(1, 4, 1, 48, FP32))


# --- The kernels for tensor cores: chunked, and by warpgroups --------------------------------------------------

CHUNKED = {"all": 5e-3, "final_state": 5e-3}
CORRELATED = {**CHUNKED, "da": 7e-3, "db": 7e-3}


@pytest.fixture(scope="module")
def chunked(tmp_path_factory):
    return Wkv7(HostLibrary(build(shared_folder(tmp_path_factory), CUDA / "wkv7_chunked.cu")), "chunked")


@pytest.fixture(scope="module")
def wgmma(tmp_path_factory):
    return Wkv7(HostLibrary(build(shared_folder(tmp_path_factory), CUDA / "wkv7_wgmma.cu")), "wgmma")


@pytest.mark.parametrize("kind", ["usual", "fast", "slow", "correlated"])
@pytest.mark.parametrize(
    ("name", "length"),
    [*(("chunked", n) for n in (1, 15, 16, 17, 48, 49, 200)), *(("wgmma", n) for n in (1, 31, 32, 33, 65, 200))],
)
def test_tensor_core_error_at_any_length_and_decay(request, name, length, kind):
    kernel = request.getfixturevalue(name)
    _, errors = outcome(kernel, problem(1, length, 2, 64, BF16, kind=kind, state=True))
    assert_within(errors, CORRELATED if kind == "correlated" else CHUNKED)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["chunked", "wgmma"])
def test_one_token_has_the_error_of_its_rounded_operands(request, name, seed):
    """y = q v and dv = D k + q dy, with q = r . k: a single sum, whose cancellation no other token or head averages
    out. Both kernels multiply r and k rounded to bf16, so q is as exact as its summands are large, not as itself: for
    seeds 0 and 2 q is 0.2 and 0.3, and the errors of dv are 6e-3 and more, beyond CHUNKED."""
    x = problem(1, 1, 1, 64, BF16, kind="correlated", seed=seed)
    dy, dfinal_state = incoming(x)
    kernel = request.getfixturevalue(name)
    saved = kernel.forward(x)
    dv = kernel.backward(x, saved, dy, dfinal_state)["dv"]
    true = answer(x, dy, dfinal_state)
    off = 2**-8 * (x["r"].double() * x["k"].double()).abs().sum()  # of q: two roundings of at most 2^-9 each
    for got, exact, factor in ((saved["y"], true["y"], x["v"]), (dv, true["dv"], dy)):
        assert (got - exact).norm() <= off * factor.double().norm() + CHUNKED["all"] * exact.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chunked", "wgmma"])
@pytest.mark.parametrize("kind", ["usual", "fast", "slow", "correlated"])
@pytest.mark.parametrize("length", [1024, 4096])
def test_tensor_core_error_of_long_sequences(request, name, length, kind):
    _, errors = outcome(request.getfixturevalue(name), problem(1, length, 1, 64, BF16, kind=kind))
    assert_within(errors, CORRELATED if kind == "correlated" else CHUNKED)


@pytest.mark.parametrize("name", ["chunked", "wgmma"])
@pytest.mark.parametrize("shape", SHAPES)
def test_tensor_core_kernels_with_states_and_packed_documents(request, name, shape):
    batch = 1 if "cu_seqlens" in shape else 2
    _, errors = outcome(request.getfixturevalue(name), problem(batch, 37, 2, 64, BF16, **shape))
    assert_within(errors, CHUNKED)


@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("shifted", ["state", "dfinal_state"])
def test_chunked_keeps_the_low_parts_of_states(chunked, shifted, length):
    """64 is added to every element of a state, and cancels in all sums over it, as each vector is (x, -x): what is left
    is smaller than the rounding of 64 + x to bf16, so a dropped low part is an error of 10 % and more."""
    x = problem(1, length, 1, 64, BF16, state=True)
    dy, dfinal_state = incoming(x)
    mirrored = {name: torch.cat([y[..., :32], (1 if name == "w" else -1) * y[..., :32]], -1) for name, y in x.items()}
    x = {name: x[name] if name == "state" else y.contiguous() for name, y in mirrored.items()}
    dy = torch.cat([dy[..., :32], -dy[..., :32]], -1).contiguous()
    state = x["state"] if shifted == "state" else dfinal_state
    state += 64
    saved = chunked.forward(x)
    got = {"y": saved["y"], "final_state": saved["final_state"], **chunked.backward(x, saved, dy, dfinal_state)}
    true = answer(x, dy, dfinal_state)
    errors = {name: error(got[name], true[name]) for name in true}
    if shifted == "state":  # by design backward reads the high part of the states alone: dr, dw, da and db
        errors = {name: errors[name] for name in ("y", "final_state", "dk", "dv", "dstate")}
    assert_within(errors, {"all": 6e-3, "dw": 2e-2, "db": 2e-2})


@pytest.mark.parametrize(("name", "orders"), [("chunked", ORDERS), ("wgmma", {**ORDERS, **GROUP_ORDERS})])
def test_tensor_core_kernels_give_equal_bits_in_every_order(request, name, orders):
    kernel = request.getfixturevalue(name)
    x = problem(1, 165, 1, 64, BF16, cu_seqlens=[0, 130, 130, 165], state=True)
    dy, dfinal_state = incoming(x)
    runs = []
    for order in orders:
        kernel.host.order(order)
        saved = kernel.forward(x)
        gradients = kernel.backward(x, saved, dy, dfinal_state)
        runs.append({"y": saved["y"], "final_state": saved["final_state"], **gradients})
    kernel.host.order("forward")
    for name, first in runs[0].items():
        assert first.isfinite().all(), name
        assert all(torch.equal(run[name], first) for run in runs), name


def test_chunked_does_not_grow_in_barriers_or_products(chunked):
    """Per chunk of 16 tokens, in a whole segment of 3: a change that costs more is seen here."""
    x = problem(1, 48 * 4, 1, 64, BF16)
    dy, dfinal_state = incoming(x)
    chunked.host.take_counts()
    saved = chunked.forward(x)
    forward = chunked.host.take_counts()
    chunked.backward(x, saved, dy, dfinal_state)
    backward = chunked.host.take_counts()
    assert forward["block_barriers"] == 4  # one a segment
    assert backward["block_barriers"] == 4 * (2 + 3 * 3)
    assert forward["matrix_products"] == 12 * 354
    assert backward["matrix_products"] == 4 * 2830  # 943 a chunk; a segment's last chunk has no state to step to
    assert backward["shuffles"] == 4 * 3 * 4 * 66  # of a segment: 3 chunks, 4 warps


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """The kernel by warpgroups with documents cut into parts of 64 tokens and more, where they are cut."""
    folder = shared_folder(tmp_path_factory)
    return Wkv7(HostLibrary(build(folder, CUDA / "wkv7_wgmma.cu", "-DWKV7_LEAST_PART=64")), "wgmma")


@pytest.mark.parametrize("kind", ["usual", "fast", "slow", "correlated"])
@pytest.mark.parametrize(("batch", "length"), [(1, 300), (2, 256)])
def test_cut_documents(cut, batch, length, kind):
    x = problem(batch, length, 1, 64, BF16, kind=kind, state=batch == 1)
    assert cut.saved_bytes(x)[1] == 3 * batch * 4 * 64 * 64 * 4  # four parts; 300 is not a multiple of their lengths
    _, errors = outcome(cut, x)
    assert_within(errors, CORRELATED if kind == "correlated" else CHUNKED)


def test_cut_documents_twice_backward_and_in_every_order(cut):
    """Backward writes over forward's scratch memory: a second one must give the same."""
    x = problem(1, 257, 1, 64, BF16, state=True)
    dy, dfinal_state = incoming(x)
    first = None
    for order in (*ORDERS, *GROUP_ORDERS):
        cut.host.order(order)
        saved = cut.forward(x)
        for _ in range(2):
            got = {"y": saved["y"], "final_state": saved["final_state"], **cut.backward(x, saved, dy, dfinal_state)}
            first = first or got
            assert all(torch.equal(got[name], first[name]) for name in first)
    cut.host.order("forward")


def test_packed_documents_are_not_cut(cut, wgmma):
    x = problem(1, 300, 1, 64, BF16, state=True, cu_seqlens=[0, 300])
    assert torch.equal(cut.forward(x)["y"], wgmma.forward(x)["y"])


def test_wgmma_does_not_grow_in_barriers_or_products(wgmma):
    """Per chunk of 32 tokens, by one warpgroup each: a change that costs more is seen here."""
    x = problem(1, 32 * 4, 1, 64, BF16)
    dy, dfinal_state = incoming(x)
    wgmma.host.take_counts()
    saved = wgmma.forward(x)
    forward = wgmma.host.take_counts()
    wgmma.backward(x, saved, dy, dfinal_state)
    backward = wgmma.host.take_counts()
    assert forward["block_barriers"] == 1 + 4 * (3 + 1)  # prepare and state
    assert backward["block_barriers"] == 1 + 4 * (3 + 0 + 2)  # prepare, recur and collect
    assert (forward["group_products"], backward["group_products"]) == (4 * 36, 4 * 92)
    assert (forward["matrix_products"], backward["matrix_products"]) == (4 * 12, 4 * 12)
    assert backward["shuffles"] == 4 * 4 * 30


@pytest.mark.parametrize("name", ["chunked", "wgmma"])
def test_tensor_core_kernels_keep_little_for_backward(request, name):
    x = problem(1, 4096, 1, 64, BF16)
    assert (
        sum(request.getfixturevalue(name).saved_bytes(x)) <= 300 * 4096 + (name == "wgmma") * 3 * 8 * 64 * 64 * 4
    )  # parts

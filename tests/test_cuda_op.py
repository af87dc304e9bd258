"""The CUDA ops: their bindings run on a CPU, nvcc's report, the translation for AMD, and the ops on a GPU."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from host_cuda.harness import CUDA, build, build_ops, compiler, shared_folder
from host_cuda.problems import answer, error, incoming, problem
from torch.utils.checkpoint import checkpoint

from src.ops import recurrence, wkv7
from src.ops.build import build as build_library
from src.ops.cuda import cuda_recipe, gpu_targets
from src.ops.recurrence_op import KERNEL_NUMBERS, kept_floats
from src.ops.rocm import rocm_recipe
from src.ops.toolchain import BuildError, find_hipcc, find_nvcc, version_of

NAMES = "rwkvab"
TESTS = Path(__file__).parent


# --- On a CPU: the bindings' own code, on top of host_cuda.h ------------------------------------------------


@pytest.fixture(scope="module")
def host_op(tmp_path_factory):
    """The ops of cuda/wkv7_cuda.cpp, as the CPU implementation of rwkv7's ops while a test runs."""
    if compiler() is None:
        pytest.skip("no C++ compiler")
    folder = shared_folder(tmp_path_factory)
    for name in KERNEL_NUMBERS:
        ctypes.CDLL(str(build(folder, CUDA / f"wkv7_{name}.cu")), mode=ctypes.RTLD_GLOBAL)
    build_ops(folder, CUDA / "wkv7_cuda.cpp")
    return torch.ops.rwkv7_host


class HostWkv7(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, cu_seqlens, state, *inputs):
        y, final_state, *saved = torch.ops.rwkv7_host.wkv7_forward(
            *inputs, state, cu_seqlens, True, KERNEL_NUMBERS[kernel]
        )
        ctx.kernel = KERNEL_NUMBERS[kernel]
        ctx.save_for_backward(*inputs, state, cu_seqlens, *saved)
        return y, final_state

    @staticmethod
    def backward(ctx, dy, dfinal_state):
        *grads, dstate = torch.ops.rwkv7_host.wkv7_backward(dy, dfinal_state, *ctx.saved_tensors, ctx.kernel)
        return None, None, dstate, *grads


@pytest.mark.parametrize("kernel", KERNEL_NUMBERS)
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_op_gives_values_and_gradients(host_op, kernel, packed):
    shape = {"cu_seqlens": [0, 5, 20]} if packed else {}
    x = problem(1 if packed else 2, 20, 2, 64, torch.bfloat16, state=True, **shape)
    # Views of one projection: rows that are not dense, at addresses that 16-byte loads can't use.
    joint = torch.empty(*x["r"].shape[:2], 6, 2, 64 + 1, dtype=torch.bfloat16)
    leaves = []
    for i, name in enumerate(NAMES):
        joint[:, :, i, :, 1:] = x[name]
        leaves.append(joint[:, :, i, :, 1:].detach().requires_grad_())
    state = x["state"].clone().requires_grad_()
    y, final_state = HostWkv7.apply(kernel, x.get("cu_seqlens"), state, *leaves)
    dy, dfinal_state = incoming(x)
    grads = torch.autograd.grad([y, final_state], [*leaves, state], [dy, dfinal_state])
    true = answer(x, dy, dfinal_state)
    got = {"y": y, "final_state": final_state, **{f"d{n}": g for n, g in zip([*NAMES, "state"], grads, strict=True)}}
    for name, value in got.items():
        assert error(value.detach(), true[name]) < 5e-3, name


@pytest.mark.parametrize("number", KERNEL_NUMBERS.values(), ids=KERNEL_NUMBERS)
def test_op_is_lean_and_keeps_its_schema(host_op, number):
    x = problem(1, 17, 1, 64, torch.bfloat16)
    inputs = [x[name] for name in NAMES]
    assert host_op.wkv7_forward(*inputs, None, None, False, number)[2].numel() == 0
    torch.library.opcheck(host_op.wkv7_forward.default, (*inputs, None, None, True, number), test_utils="test_schema")


@pytest.mark.parametrize(
    ("kernel", "head_size"), [("recurrent", 32), ("recurrent", 64), ("recurrent", 128), ("chunked", 64), ("wgmma", 64)]
)
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_kept_tensors_have_the_sizes_registered_for_torch_compile(host_op, kernel, head_size, packed):
    x = problem(1 if packed else 3, 100, 2, head_size, torch.bfloat16, cu_seqlens=[0, 1, 50, 100] if packed else None)
    inputs = [x[name] for name in NAMES]
    real = host_op.wkv7_forward(*inputs, None, x.get("cu_seqlens"), True, KERNEL_NUMBERS[kernel])
    documents = 3
    tokens, heads = x["r"].shape[0] * x["r"].shape[1], x["r"].shape[2]
    sizes = kept_floats(KERNEL_NUMBERS[kernel], tokens, documents, heads, head_size)
    assert (real[2].numel(), real[3].numel()) == sizes


@pytest.mark.parametrize(
    ("dtype", "head_size", "kernel"),
    [
        *((torch.float32, 64, kernel) for kernel in ("chunked", "wgmma")),
        *((torch.bfloat16, 32, kernel) for kernel in ("chunked", "wgmma")),
        *((dtype, size, "recurrent") for dtype, size in ((torch.bfloat16, 48), (torch.float64, 64))),
    ],
)
def test_op_refuses_inputs_without_a_kernel(host_op, dtype, head_size, kernel):
    x = problem(1, 4, 1, head_size, dtype)
    with pytest.raises(RuntimeError, match=f"no {kernel} kernel for head size {head_size}"):
        host_op.wkv7_forward(*(x[name] for name in NAMES), None, None, False, KERNEL_NUMBERS[kernel])


def test_op_refuses_a_kernel_that_is_none(host_op):
    x = problem(1, 4, 1, 64, torch.bfloat16)
    for number in (-1, 3):
        with pytest.raises(RuntimeError, match=f"no kernel {number}"):
            host_op.wkv7_forward(*(x[name] for name in NAMES), None, None, False, number)


@pytest.mark.parametrize("kernel", KERNEL_NUMBERS)
@pytest.mark.parametrize(("name", "change"), [
    ("saved_state", lambda x: x[:-1]), ("saved_state", lambda x: x.half()), ("saved_state", lambda x: x[:0]),
    ("saved_sa", lambda x: torch.cat([x, x.new_zeros(1)])), ("saved_sa", lambda x: x.bfloat16()),
    ("dfinal_state", lambda x: x[1:]), ("dfinal_state", lambda x: x.double()),
])  # fmt: skip
def test_backward_refuses_what_forward_did_not_keep(host_op, kernel, name, change):
    x = problem(2, 20, 1, 64, torch.bfloat16)
    inputs, number = [x[letter] for letter in NAMES], KERNEL_NUMBERS[kernel]
    y, final_state, saved_state, saved_sa = host_op.wkv7_forward(*inputs, None, None, True, number)
    kept = {"dfinal_state": final_state, "saved_state": saved_state, "saved_sa": saved_sa}

    def backward(dfinal_state, saved_state, saved_sa):
        return host_op.wkv7_backward(y, dfinal_state, *inputs, None, None, saved_state, saved_sa, number)

    backward(**kept)
    with pytest.raises(RuntimeError, match=name):
        backward(**{**kept, name: change(kept[name])})


LAUNCH_ERRORS = """
import ctypes, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import torch
from host_cuda.harness import CUDA, build, build_ops
folder = Path(sys.argv[3])
stub = folder / "stub.cpp"
stub.write_text('#include <cstdlib>\\nextern "C" int cross_entropy_l2wrap_forward() '
                '{ return std::atoi(std::getenv("CODE")); }\\n'
                'extern "C" int cross_entropy_l2wrap_backward() { return 0; }\\n'
                'extern "C" const char* host_cuda_last_fault() { return ""; }\\n')
ctypes.CDLL(str(build(folder, stub)), mode=ctypes.RTLD_GLOBAL)
build_ops(folder, CUDA / "cross_entropy_cuda.cpp")
setenv = ctypes.CDLL(None).setenv
for code in (0, 1, 209, 700, 719):
    setenv(b"CODE", str(code).encode(), 1)
    try:
        torch.ops.rwkv7_host.cross_entropy_l2wrap_forward(torch.zeros(1, 4), torch.zeros(1, dtype=torch.long), -100)
        print(code, "no error")
    except RuntimeError as error:
        print(code, str(error).splitlines()[0])
"""


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_launch_errors_name_their_cause(tmp_path):
    """An error of work that was started before isn't blamed on the kernel that hears of it."""
    command = [sys.executable, "-c", LAUNCH_ERRORS, str(TESTS.parent), str(TESTS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    messages = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert messages["0"] == "no error"
    assert "the launch failed with CUDA error 1" in messages["1"]
    assert "built for other GPUs" in messages["209"]
    for code in ("700", "719"):
        assert "work that was started before" in messages[code]
        assert "launch failed" not in messages[code]


# --- Reports of compilers -----------------------------------------------------------------------------------


def spills(target, source, tmp_path):
    """Bytes that each kernel spills to memory, by its mangled name, as nvcc reports it."""
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, timeout=60).stdout.split()
    if f"sm_{target.rstrip('a')}" not in known:
        pytest.skip(f"this nvcc doesn't know sm_{target}")
    options = ["-std=c++17", "-O3", "-gencode", f"arch=compute_{target},code=sm_{target}", "-Xptxas", "-v"]
    command = ["nvcc", *options, "-c", CUDA / source, "-o", tmp_path / "x.o"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "C751" not in done.stderr  # wgmma that the compiler serialises
    report = re.findall(
        r"Function properties for (\w+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    )
    return {name: int(stores) + int(loads) for name, stores, loads in report}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(
    "target", ["90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("80", "100", "120"))]
)
@pytest.mark.parametrize(("source", "kernels"), [
    ("wkv7_chunked.cu", 2), ("cross_entropy.cu", 6),
    pytest.param("token_shift.cu", 21, marks=pytest.mark.slow), pytest.param("time_mix.cu", 15, marks=pytest.mark.slow),
    pytest.param("relu_squared.cu", 3, marks=pytest.mark.slow), pytest.param("adamw.cu", 3, marks=pytest.mark.slow),
])  # fmt: skip
def test_nvcc_keeps_kernels_in_registers(target, source, kernels, tmp_path):
    report = spills(target, source, tmp_path)
    assert len(report) == kernels
    assert not any(report.values()), report


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_keeps_the_warpgroup_kernels_in_registers(tmp_path):
    report = spills("90a", "wkv7_wgmma.cu", tmp_path)
    assert len(report) == 5
    assert not any(report.values()), report


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.slow
@pytest.mark.parametrize("target", ["75", "80", "90", "100", "120"])
def test_nvcc_keeps_the_recurrent_kernel_in_registers(target, tmp_path):
    report = spills(target, "wkv7_recurrent.cu", tmp_path)
    assert len(report) == 18
    assert not any(report.values()), report


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_whole_library_builds_for_a_gpu_within_a_minute(tmp_path, monkeypatch):
    release = re.search(r"release (\d+\.\d+)", version_of(find_nvcc()))
    monkeypatch.setattr(torch.version, "cuda", release[1])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    recipe = cuda_recipe()
    if not torch.cuda.is_available():  # a PyTorch for CPUs has no such library
        recipe = replace(recipe, link=tuple(word for word in recipe.link if word != "-ltorch_cuda"))
    start = time.monotonic()
    library = build_library(recipe, tmp_path / "cache")
    seconds = time.monotonic() - start
    assert seconds < (60 if len(os.sched_getaffinity(0)) > 1 else 120)
    listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    for entry in (
        "wkv7_recurrent_backward",
        "wkv7_chunked_backward",
        "wkv7_wgmma_backward",
        "cross_entropy_l2wrap_backward",
        "token_shift_backward",
    ):
        assert entry in listed


def fake_hipcc(folder, monkeypatch):
    """A compiler that checks nothing and makes an empty object, for what happens around it."""
    tool = folder / "rocm" / "bin" / "hipcc"
    tool.parent.mkdir(parents=True)
    tool.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "HIP version 9" && exit\necho "$@" >> {folder}/calls\n'
        f'while [ "$1" != -o ]; do shift; done\necho | {compiler()} -x c++ -fPIC -c - -o "$2"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("ROCM_HOME", str(folder / "rocm"))
    monkeypatch.setenv("PYTORCH_ROCM_ARCH", "gfx90a;gfx942")
    monkeypatch.setattr(torch.version, "hip", "9.0")


def test_translation_for_amd_leaves_no_cuda_name(tmp_path, monkeypatch):
    fake_hipcc(tmp_path, monkeypatch)
    recipe = rocm_recipe()
    translated = recipe.prepare(recipe, tmp_path)
    kernels = {path.name for path in translated.sources if path.suffix == ".hip"}
    assert kernels == {f"{path.stem}.hip" for path in CUDA.glob("*.cu")}
    assert not [path for path in translated.sources if path.suffix == ".cu"]
    written = [path for path in (tmp_path / "hip").rglob("*") if path.suffix == ".hip" or path.stem.endswith("_hip")]
    assert len(written) == len(list(CUDA.glob("*.cu*")))
    for path in written:
        code = re.sub(r"//[^\n]*", "", path.read_text())
        left = set(re.findall(r"\bcuda[A-Z]\w*|\bcu[A-Z]\w*|cuda_\w+\.h", code)) - {"host_cuda.h"}
        assert not left, (path.name, left)
        for included in re.findall(r'#include "(\w+\.cuh)"', code):
            assert (path.parent / included).is_file(), (path.name, included)


def test_build_for_amd_compiles_the_translation_with_hipcc(tmp_path, monkeypatch):
    fake_hipcc(tmp_path, monkeypatch)
    recipe = rocm_recipe("baseline")
    # Only the kernels, and no libraries of ROCm to link with.
    recipe = replace(recipe, sources=tuple(x for x in recipe.sources if x.suffix == ".cu"), link=recipe.link[:2])
    assert build_library(recipe, tmp_path / "cache").is_file()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == len(list(CUDA.glob("*.cu")))
    assert all("--offload-arch=gfx90a --offload-arch=gfx942" in call and ".hip" in call for call in calls)


def build_error(function):
    with pytest.raises(BuildError) as caught:
        function()
    return caught.value


def test_missing_hipcc_comes_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "9.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ROCM_HOME", raising=False)
    assert "ROCm 9.0" in build_error(find_hipcc).advice
    monkeypatch.setenv("ROCM_HOME", str(tmp_path))
    assert build_error(find_hipcc).problem.startswith("ROCM_HOME is ")


# --- Build and choice ---------------------------------------------------------------------------------------


def targets(monkeypatch, listed, present=()):
    """The numbers in nvcc's options for this TORCH_CUDA_ARCH_LIST on a machine with GPUs of these capabilities."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(present))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: present[index])
    return [option.split("code=")[1] for option in gpu_targets() if option != "-gencode"]


@pytest.mark.parametrize(
    ("listed", "present", "expected"),
    [
        ("", [(9, 0), (8, 0), (9, 0)], ["sm_80", "sm_90a"]),
        ("8.0;9.0+PTX", [], ["sm_80", "sm_90a", "compute_90"]),
        ("5.2 6.1 8.0", [(8, 6)], ["sm_80"]),  # sm_80's code runs on 8.6
        ("7.5 8.0", [(9, 0)], ["sm_75", "sm_80", "sm_90a"]),
        ("7.5+PTX", [(9, 0)], ["sm_75", "compute_75"]),
        ("8.6", [(8, 0)], ["sm_86", "sm_80"]),
        ("10.0f", [(12, 0)], ["sm_100f", "sm_120"]),
    ],
    ids=["present", "listed", "old ones left out", "a GPU forgotten", "PTX", "older minor version", "variant"],
)
def test_targets_are_the_gpus_present_or_those_listed(monkeypatch, listed, present, expected):
    assert targets(monkeypatch, listed, present) == expected


@pytest.mark.parametrize(
    ("listed", "present", "problem"),
    [("hopper", [], "'hopper'"), ("6.1", [], "got 6.1"), ("", [(7, 0)], "7.5 or later, got 7.0"), ("", [], "no GPU")],
)
def test_targets_without_a_kernel_are_refused(monkeypatch, listed, present, problem):
    error = build_error(lambda: targets(monkeypatch, listed, present))
    assert problem in error.problem
    assert error.advice


def test_a_missing_or_wrong_nvcc_comes_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build_error(cuda_recipe).problem.startswith("CUDA_HOME is ")
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    for version, expected in (("release 12.4, V12.4.131", "CUDA 12.4,"), ("something else", "unknown version")):
        nvcc.write_text(f"#!/bin/sh\necho '{version}'\n")
        nvcc.chmod(0o755)
        error = build_error(cuda_recipe)
        assert expected in error.problem
        assert "CUDA toolkit 13.0" in error.advice
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    assert "CUDA toolkit 13.0" in build_error(find_nvcc).advice


def test_the_choice_follows_the_device_of_the_tensors(monkeypatch):
    """The first GPU has no tensor cores for bf16, the others have, and the second has warpgroups too; which one is
    current doesn't matter."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: [(7, 5), (9, 0), (8, 9)][index or 0])
    monkeypatch.setattr(recurrence.build, "load_native", lambda register: None)
    monkeypatch.setattr(recurrence.build, "why_no_cuda", lambda: None)

    def choices(kernel, *indices):
        return [recurrence._choose("cuda", index, torch.bfloat16, 64, kernel) for index in indices]

    assert choices("auto", None, 0, 1, 2) == ["recurrent", "recurrent", "chunked", "chunked"]
    monkeypatch.setenv("RWKV7_WGMMA", "1")
    assert choices("auto", None, 0, 1, 2) == ["recurrent", "recurrent", "wgmma", "chunked"]
    assert choices("chunked", 1, 2) == ["wgmma", "chunked"]
    assert choices("recurrent", 1, 2) == ["recurrent", "recurrent"]
    assert "tensor cores by warpgroups" in recurrence.describe_kernel("cuda:1", torch.bfloat16, 64, "auto")
    assert recurrence.describe_kernel("cuda:2", torch.bfloat16, 64, "auto").endswith("tensor cores")
    error = build_error(lambda: recurrence.describe_kernel("cuda", torch.bfloat16, 64, "chunked"))
    assert (error.kernel, error.problem.count("7.5")) == ("chunked", 1)
    assert str(error).count("--kernel") == 1


# --- On a GPU -----------------------------------------------------------------------------------------------


def on_gpu(x, kernel, dy, dfinal_state, device="cuda"):
    leaves = [x[name].to(device).requires_grad_() for name in NAMES]
    state = x["state"].to(device).requires_grad_() if "state" in x else None
    bounds = x["cu_seqlens"].to(device) if "cu_seqlens" in x else None
    y, final_state = wkv7(*leaves, state, bounds, kernel=kernel)
    if state is not None:
        leaves.append(state)
    grads = torch.autograd.grad([y, final_state], leaves, [dy.to(device), dfinal_state.to(device)])
    return {"y": y, "final_state": final_state, **{f"d{n}": g for n, g in zip([*NAMES, "state"], grads, strict=False)}}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kernel", ["recurrent", "chunked"])
@pytest.mark.parametrize("kind", ["usual", "fast", "slow", "correlated"])
@pytest.mark.parametrize("length", [1, 17, 49, 1024])
def test_gpu_is_right_and_repeats_its_bits(kernel, kind, length):
    x = problem(2, length, 3, 64, torch.bfloat16, kind=kind, state=True)
    dy, dfinal_state = incoming(x)
    first, second = (on_gpu(x, kernel, dy, dfinal_state) for _ in range(2))
    true = answer(x, dy, dfinal_state)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        bound = 7e-3 if kind == "correlated" and name in ("da", "db") else 5e-3
        assert error(value.detach().cpu(), true[name]) <= bound, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kernel", ["recurrent", "chunked"])
def test_gpu_captures_into_a_graph_and_compiles(kernel):
    x = problem(2, 64, 2, 64, torch.bfloat16)
    inputs = [x[name].cuda() for name in NAMES]
    plain = wkv7(*inputs, kernel=kernel)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = wkv7(*inputs, kernel=kernel)[0]
    graph.replay()
    assert torch.equal(captured, plain)
    compiled = torch.compile(lambda *tensors: wkv7(*tensors, kernel=kernel)[0])
    assert torch.equal(compiled(*inputs), plain)
    checks = (
        *(x.requires_grad_() for x in inputs),
        None,
        None,
        True,
        KERNEL_NUMBERS[recurrence._choose("cuda", None, torch.bfloat16, 64, kernel)],
    )
    # not the values of compiled outputs: what is kept has room that no document fills
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.rwkv7.wkv7_forward.default, checks, test_utils=utils)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kernel", ["recurrent", "chunked"])
def test_gpu_recomputes_under_activation_checkpointing(kernel):
    x = problem(2, 64, 2, 64, torch.bfloat16)
    inputs = [x[name].cuda().requires_grad_() for name in NAMES]
    plain = torch.autograd.grad(wkv7(*inputs, kernel=kernel)[0].float().sum(), inputs)
    recomputed = checkpoint(lambda *tensors: wkv7(*tensors, kernel=kernel)[0], *inputs, use_reentrant=False)
    for one, two in zip(plain, torch.autograd.grad(recomputed.float().sum(), inputs), strict=True):
        assert torch.equal(one, two)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kernel", ["recurrent", "chunked"])
def test_gpu_works_on_the_current_stream(kernel):
    """After the work queued on that stream, without waiting for another: here the default one is busy for a second."""
    x = problem(2, 64, 2, 64, torch.bfloat16)
    true = [x[name].cuda() for name in NAMES]
    side = torch.cuda.Stream()

    def run(late):
        leaves = [torch.zeros_like(tensor).requires_grad_() for tensor in true]
        torch.cuda._sleep(late)
        with torch.no_grad():
            for to, tensor in zip(leaves, true, strict=True):
                to.copy_(tensor)
        y = wkv7(*leaves, kernel=kernel)[0]
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    expected = run(0)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        run(0)  # memory is taken and kernels are loaded, for which the device may be waited for
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    busy, done = torch.cuda.Event(), torch.cuda.Event()
    busy.record()
    with torch.cuda.stream(side):
        got = run(50_000_000)
        done.record()
    done.synchronize()
    assert not busy.query()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than 2 GPUs")
@pytest.mark.parametrize("kernel", ["recurrent", "chunked"])
def test_gpu_works_where_the_tensors_are(kernel):
    """On the second GPU, while the first is the current one."""
    x = problem(2, 64, 2, 64, torch.bfloat16, state=True)
    dy, dfinal_state = incoming(x)
    true = answer(x, dy, dfinal_state)
    with torch.cuda.device(0):
        got = on_gpu(x, kernel, dy, dfinal_state, "cuda:1")
        assert torch.cuda.current_device() == 0
    for name, value in got.items():
        assert value.device == torch.device("cuda:1")
        assert error(value.detach().cpu(), true[name]) <= 5e-3, name

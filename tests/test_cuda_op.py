"""The CUDA kernels as PyTorch sees them: through the dispatcher's code on a CPU, by nvcc's report, translated for AMD, and on a GPU where there is one."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from host_cuda.harness import CUDA, build, compiler, shared_folder
from host_cuda.problems import answer, error, incoming, problem

from src.ops import wkv7
from src.ops.build import STABLE_ABI, BuildError, gpu_targets

NAMES = "rwkvab"


# --- On a CPU: the dispatcher's own code, with host_cuda.h beneath -------------------------------------------------------------


@pytest.fixture(scope="module")
def host_op(tmp_path_factory):
    """The ops of cuda/wkv7_cuda.cpp, as the CPU implementation of rwkv7's ops while a test runs."""
    if compiler() is None:
        pytest.skip("no C++ compiler")
    folder = shared_folder(tmp_path_factory)
    for name in ("recurrent", "chunked"):
        ctypes.CDLL(str(build(folder, CUDA / f"wkv7_{name}.cu")), mode=ctypes.RTLD_GLOBAL)
    include = Path(torch.__file__).parent / "include"
    libraries = (f"-L{include.parent / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch", "-lc10")
    flags = ("-DHOST_CUDA", f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-isystem", str(include), *libraries)
    torch.ops.load_library(build(folder, CUDA / "wkv7_cuda.cpp", *flags))
    return torch.ops.rwkv7_host


class HostWkv7(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, cu_seqlens, state, *inputs):
        y, final_state, *saved = torch.ops.rwkv7_host.wkv7_forward(
            *inputs, state, cu_seqlens, True, kernel == "chunked"
        )
        ctx.chunked = kernel == "chunked"
        ctx.save_for_backward(*inputs, state, cu_seqlens, *saved)
        return y, final_state

    @staticmethod
    def backward(ctx, dy, dfinal_state):
        *grads, dstate = torch.ops.rwkv7_host.wkv7_backward(dy, dfinal_state, *ctx.saved_tensors, ctx.chunked)
        return None, None, dstate, *grads


@pytest.mark.parametrize("kernel", ["recurrent", "chunked"])
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
    y, final_state = HostWkv7.apply(kernel == "chunked", x.get("cu_seqlens"), state, *leaves)
    dy, dfinal_state = incoming(x)
    grads = torch.autograd.grad([y, final_state], [*leaves, state], [dy, dfinal_state])
    true = answer(x, dy, dfinal_state)
    got = {"y": y, "final_state": final_state, **{f"d{n}": g for n, g in zip([*NAMES, "state"], grads, strict=True)}}
    for name, value in got.items():
        assert error(value.detach(), true[name]) < 5e-3, name


@pytest.mark.parametrize("chunked", [False, True], ids=["recurrent", "chunked"])
def test_op_is_lean_and_keeps_its_schema(host_op, chunked):
    x = problem(1, 17, 1, 64, torch.bfloat16)
    inputs = [x[name] for name in NAMES]
    assert host_op.wkv7_forward(*inputs, None, None, False, chunked)[2].numel() == 0
    torch.library.opcheck(host_op.wkv7_forward.default, (*inputs, None, None, True, chunked), test_utils="test_schema")


@pytest.mark.parametrize(("change", "words"), [
    ({"w": torch.float32}, "one dtype"), ({name: torch.float32 for name in NAMES}, "no chunked kernel"),
], ids=["dtypes differ", "fp32 chunked"])  # fmt: skip
def test_op_refuses_what_it_cannot_do(host_op, change, words):
    x = problem(1, 4, 1, 64, torch.bfloat16)
    inputs = [x[name].to(change.get(name, torch.bfloat16)) for name in NAMES]
    with pytest.raises(RuntimeError, match=words):
        host_op.wkv7_forward(*inputs, None, None, False, True)


# --- What compilers say -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("target", ["80", "90", "100"])
def test_nvcc_keeps_the_chunked_kernel_in_registers(target, tmp_path):
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        "-gencode",
        f"arch=compute_{target},code=sm_{target}",
        "-Xptxas",
        "-v",
        "-c",
    ]
    done = subprocess.run(
        [*command, CUDA / "wkv7_chunked.cu", "-o", tmp_path / "x.o"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    report = re.findall(
        r"wkv7_chunked_(forward|backward)E.*?(\d+) bytes spill stores.*?Used (\d+) registers", done.stderr, re.DOTALL
    )
    spills = {name: int(bytes_) for name, bytes_, _ in report}
    assert spills["forward"] == 0
    # 60 bytes of loop-wide values spill on sm_80 and 4 on sm_100; none on sm_90. More would be a mistake.
    assert spills["backward"] <= {"80": 64, "90": 0, "100": 8}[target]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.slow
@pytest.mark.parametrize("target", ["75", "90"])
def test_nvcc_keeps_the_recurrent_kernel_in_registers(target, tmp_path):
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        "-gencode",
        f"arch=compute_{target},code=sm_{target}",
        "-Xptxas",
        "-v",
        "-c",
    ]
    done = subprocess.run(
        [*command, CUDA / "wkv7_recurrent.cu", "-o", tmp_path / "x.o"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores", done.stderr)
    assert len(spills) == 18
    assert set(spills) == {"0"}


def test_translation_for_amd_leaves_no_cuda_name(tmp_path):
    from torch.utils.hipify import hipify_python

    for source in CUDA.glob("*.cu*"):
        shutil.copy(source, tmp_path)
    sources = [str(path) for path in tmp_path.glob("*.cu*")]
    hipify_python.hipify(
        project_directory=str(tmp_path),
        output_directory=str(tmp_path / "out"),
        includes=[f"{tmp_path}/*"],
        extensions=(".cu", ".cuh"),
        extra_files=sources,
        is_pytorch_extension=True,
        show_detailed=False,
    )
    translated = [path for path in (tmp_path / "out").rglob("*") if path.suffix == ".hip" or path.stem.endswith("_hip")]
    assert {path.name for path in translated} == {"port_hip.cuh", "wkv7_recurrent.hip", "wkv7_chunked.hip"}
    for path in translated:
        code = re.sub(r"//[^\n]*", "", path.read_text())
        left = set(re.findall(r"\bcuda[A-Z]\w*|\bcu[A-Z]\w*|cuda_\w+\.h", code)) - {"host_cuda.h"}
        assert not left, (path.name, left)


# --- Build and choice ---------------------------------------------------------------------------------------------------------------


def test_gpu_targets_follow_the_list(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    options = gpu_targets()
    assert "arch=compute_80,code=sm_80" in options
    assert options[-1] == "arch=compute_90,code=compute_90"
    for wrong, words in (("hopper", "expected capabilities"), ("6.1", "7.5 or later")):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wrong)
        with pytest.raises(BuildError, match=words):
            gpu_targets()


# --- On a GPU -------------------------------------------------------------------------------------------------------------------------


def on_gpu(x, kernel, dy, dfinal_state):
    leaves = [x[name].cuda().requires_grad_() for name in NAMES]
    state = x["state"].cuda().requires_grad_() if "state" in x else None
    bounds = x["cu_seqlens"].cuda() if "cu_seqlens" in x else None
    y, final_state = wkv7(*leaves, state, bounds, kernel=kernel)
    wanted = [*leaves, *([] if state is None else [state])]
    grads = torch.autograd.grad([y, final_state], wanted, [dy.cuda(), dfinal_state.cuda()])
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
    compiled = torch.compile(lambda *given: wkv7(*given, kernel=kernel)[0])
    assert torch.equal(compiled(*inputs), plain)
    checks = (*inputs, None, None, True, kernel == "chunked")
    torch.library.opcheck(torch.ops.rwkv7.wkv7_forward.default, checks)

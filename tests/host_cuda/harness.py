"""Runs cuda/*.cu on a CPU: builds them with g++ against host_cuda.h and calls their entry points on torch tensors.

Outputs are filled with NaN beforehand and stand between sentinel bands, so that an element that no thread wrote, or one
beyond the end, is seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from src.ops.build import STABLE_ABI, cache_folder
from src.ops.toolchain import version_of

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "cuda"
HERE = ROOT / "tests" / "host_cuda"
FLAGS = [
    "-std=c++17",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-pthread",
    "-I",
    str(HERE),
    "-I",
    str(CUDA),
]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ORDERS = {
    **{"forward": (0, 0), "reverse": (1, 0), "random": (2, 1), "another random": (2, 2)},
    **{"last warp ahead": (3, 0), "last but one ahead": (3, 1)},
}
GROUP_ORDERS = {  # of warpgroups
    **{"groups at random": (4, 1), "again": (4, 2), "and again": (4, 3)},
    **{"first group ahead": (5, 0), "second group ahead": (5, 1), "third group ahead": (5, 2)},
}
BAND = 64  # sentinel elements on each side of an output
SENTINEL = 12345.0
WEEK = 7 * 24 * 3600  # seconds

Tensors = dict[str, torch.Tensor]


def shared_folder(tmp_path_factory) -> Path:
    """Where builds go: one folder for all workers of a parallel test run, gone with pytest's other temporary files."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(folder: Path, source: Path, *extra: str, shared: bool = True) -> Path:
    """Compiles `source` into `folder` once, however many test processes ask for it; a file that an earlier test run
    compiled of the same sources is copied."""
    cxx = compiler()
    assert cxx is not None
    sources = [source, *sorted(CUDA.glob("*.cu*")), *sorted(CUDA.glob("*.h")), *sorted(HERE.glob("*.h"))]
    tools = (extra, FLAGS, version_of(cxx), torch.__version__)
    content = b"".join(path.read_bytes() for path in sources) + repr(tools).replace(str(ROOT), "").encode()
    out = folder / f"{source.stem}-{hashlib.sha256(content).hexdigest()[:16]}{'.so' if shared else ''}"
    kept = cache_folder().parent / "rwkv7-host-cuda" / out.name
    with open(folder / f"{source.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            partial = out.with_suffix(".building")
            if kept.exists():
                shutil.copy(kept, partial)
            else:
                kind = ["-shared", "-fPIC", "-ftls-model=initial-exec"] if shared else []
                command = [cxx, "-x", "c++", *FLAGS, *kind, *extra, str(source), "-o", str(partial)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=600)
                assert done.returncode == 0, done.stderr[-4000:]
                _keep(partial, kept)
            partial.rename(out)
    return out


def _keep(built: Path, kept: Path) -> None:
    """Copies a file for later test runs, and deletes those of the same source that are a week old."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    for old in kept.parent.glob(f"{kept.name.rpartition('-')[0]}-*"):
        with contextlib.suppress(FileNotFoundError):  # another test run was first
            if time.time() - old.stat().st_mtime > WEEK:
                old.unlink()
    temporary = kept.with_name(f".{kept.name}.{os.getpid()}")
    shutil.copy(built, temporary)
    temporary.rename(kept)


def build_ops(folder: Path, source: Path) -> None:
    """Registers the ops of a cuda/*_cuda.cpp in torch.ops.rwkv7_host, for CPU tensors.

    The kernels that it calls must have been loaded with RTLD_GLOBAL.
    """
    include = Path(torch.__file__).parent / "include"
    libraries = (f"-L{include.parent / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch", "-lc10")
    flags = ("-DHOST_CUDA", f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-isystem", str(include), *libraries)
    torch.ops.load_library(build(folder, source, *flags))


class Guarded:
    """Outputs that start as NaN, each between two sentinel bands."""

    def __init__(self) -> None:
        self.whole: list[torch.Tensor] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        count = int(torch.Size(shape).numel())
        whole = torch.full((count + 2 * BAND,), float("nan"), dtype=dtype)
        whole[:BAND] = SENTINEL
        whole[count + BAND :] = SENTINEL
        self.whole.append(whole)
        return whole[BAND : count + BAND].view(shape)

    def check(self) -> None:
        for whole in self.whole:
            edge = torch.cat([whole[:BAND], whole[-BAND:]])
            assert (edge == torch.tensor(SENTINEL, dtype=whole.dtype)).all(), "wrote outside of an output"


class Pointer(ctypes.c_void_p):
    """An address that keeps its tensor: the memory of `pointer(torch.empty(8))` must live until the call."""

    tensor: torch.Tensor


def pointer(tensor: torch.Tensor | None) -> Pointer:
    if tensor is None:
        return Pointer(0)
    assert tensor.is_contiguous()
    address = Pointer(tensor.data_ptr())
    address.tensor = tensor
    return address


class HostLibrary:
    """A shared library made of a .cu file, and the calls that tests make to it."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.host_cuda_last_fault.restype = ctypes.c_char_p

    def order(self, name: str) -> None:
        self.library.host_cuda_order(*{**ORDERS, **GROUP_ORDERS}[name])

    def call(self, entry: str, *arguments: object) -> None:
        """Calls an entry point; AssertionError for a fault that the host run finds (mismatched collective,
        deadlock)."""
        converted = [ctypes.c_int64(x) if isinstance(x, int) and abs(x) >= 2**31 else x for x in arguments]
        code = getattr(self.library, entry)(*converted)
        # 1 is a fault's code; with another code the message is that of an earlier call.
        fault = self.library.host_cuda_last_fault().decode() if code == 1 else ""
        assert code == 0, fault or f"{entry} returned {code}"

    def take_counts(self) -> dict[str, int]:
        """What the launches since the last call have done, summed over blocks."""
        six = (ctypes.c_long * 6)()
        self.library.host_cuda_take_counts(six)
        names = ("block_barriers", "warp_barriers", "shuffles", "matrix_loads", "matrix_products", "group_products")
        return dict(zip(names, six, strict=True))


class Wkv7:
    """One of the two kernels, called as the op calls it: forward(...) then backward(...), on CPU tensors."""

    def __init__(self, host: HostLibrary, kernel: str) -> None:
        self.host, self.kernel = host, kernel

    def _call(self, direction: str, x: Tensors, *arguments: object) -> None:
        _, length, heads, head_size = x["r"].shape
        pointers = [pointer(y) for y in arguments]
        sizes = [DTYPES[x["r"].dtype], head_size, documents_of(x), ctypes.c_int64(length), heads]
        self.host.call(f"wkv7_{self.kernel}_{direction}", *sizes, *pointers, ctypes.c_int64(0))

    def saved_bytes(self, x: Tensors) -> tuple[int, int]:
        """Bytes of saved_state and saved_sa."""
        batch, length, heads, head_size = x["r"].shape
        sizes = [ctypes.c_int64(size) for size in (documents_of(x), batch * length, heads)]
        functions = [getattr(self.host.library, f"wkv7_{self.kernel}_saved_{what}_bytes") for what in ("state", "sa")]
        for function in functions:
            function.restype = ctypes.c_int64
        return functions[0](head_size, *sizes), functions[1](head_size, *sizes)

    def forward(self, x: Tensors, save: bool = True) -> Tensors:
        _, _, heads, head_size = x["r"].shape
        out = Guarded()
        y = out.empty(x["r"].shape, x["r"].dtype)
        final_state = out.empty((documents_of(x), heads, head_size, head_size), torch.float32)
        saved = [out.empty((size // 4,), torch.float32) if save else None for size in self.saved_bytes(x)]
        inputs = [x[name] for name in "rwkvab"]
        self._call("forward", x, *inputs, x.get("state"), x.get("cu_seqlens"), y, final_state, *saved)
        out.check()
        return {"y": y, "final_state": final_state, "saved_state": saved[0], "saved_sa": saved[1]}

    def backward(self, x: Tensors, saved: Tensors, dy: torch.Tensor, dfinal_state: torch.Tensor | None) -> Tensors:
        _, _, heads, head_size = x["r"].shape
        out = Guarded()
        grads = {f"d{name}": out.empty(x["r"].shape, x["r"].dtype) for name in "rwkvab"}
        grads["dstate"] = out.empty((documents_of(x), heads, head_size, head_size), torch.float32)
        inputs = [
            dy,
            dfinal_state,
            *(x[name] for name in "rwkvab"),
            x.get("cu_seqlens"),
            saved["saved_state"],
            saved["saved_sa"],
        ]
        self._call("backward", x, *inputs, *grads.values())
        out.check()
        return grads


def documents_of(x: Tensors) -> int:
    return x["r"].shape[0] if x.get("cu_seqlens") is None else x["cu_seqlens"].numel() - 1

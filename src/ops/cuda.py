"""The native library for NVIDIA GPUs: the CPU ops and cuda/*.cu, compiled by nvcc."""

from __future__ import annotations

import os
import re

import torch

from src.ops.recipe import Recipe, cpu_recipe, gpu_headers, gpu_sources
from src.ops.toolchain import BuildError, find_nvcc, version_of

# CUDA 13 dropped Volta (7.0): its nvcc compiles for Turing (7.5) and later.
OLDEST_GPU, OLDEST_GPU_OF_CUDA_13 = (7, 0), (7, 5)


def cuda_recipe(instruction_set: str = "native") -> Recipe:
    """The recipe of the CPU and CUDA ops, for the GPUs present (or those in TORCH_CUDA_ARCH_LIST)."""
    base = cpu_recipe(instruction_set)
    nvcc = find_nvcc()
    version = version_of(nvcc)
    release = re.search(r"release (\d+)\.(\d+)", version)
    torch_cuda = torch.version.cuda or ""
    # Toolkits of one major version share their runtime; another major version's would be a second one in this process.
    if release is None or release[1] != torch_cuda.split(".")[0]:
        raise BuildError(
            f"nvcc ({nvcc}) is of CUDA {'.'.join(release.groups()) if release else '(unknown version)'}, "
            f"but this PyTorch was built for CUDA {torch_cuda}",
            advice=f"install the CUDA toolkit {torch_cuda} (and point CUDA_HOME at it), or a PyTorch for your CUDA",
        )
    # -lineinfo costs nothing at run time and lets profilers and compute-sanitizer name source lines.
    flags = ("-std=c++17", "-O3", "-lineinfo", "-ccbin", base.compiler, "-Xcompiler", "-fPIC", *gpu_targets())
    if os.environ.get("RWKV7_DEBUG_KERNELS"):
        flags = (*flags, "-DPORT_DEBUG")
    return Recipe(
        compiler=base.compiler,
        sources=(*base.sources, *gpu_sources()),
        headers=(*base.headers, *gpu_headers()),
        commands={**base.commands, ".cu": (nvcc, *flags)},
        # nvcc knows where its runtime lies, also when it is a wrapper's name; PyTorch has the same one loaded.
        link=(nvcc, "-ccbin", base.compiler, "-cudart=shared", *base.link[1:], "-ltorch_cuda"),
        identity=(*base.identity, version, torch_cuda),
    )


def gpu_targets() -> tuple[str, ...]:
    """nvcc's -gencode options: for the GPUs present, or for TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") where that is set.

    Container images set that list for the programs that they were made for, so what it has too old for these kernels
    is left out, and a GPU of this machine that it forgets is added. BuildError when nothing is left.
    """
    present = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
    oldest = OLDEST_GPU_OF_CUDA_13 if int((torch.version.cuda or "13").split(".")[0]) >= 13 else OLDEST_GPU
    listed = [_parse_target(entry) for entry in os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()]
    targets = [target for target in listed if target[0] >= oldest]
    for capability in present:
        if capability >= oldest and not any(_runs_on(capability, *target) for target in targets):
            targets.append((capability, "", False))
    if not targets:
        too_old = ", ".join(f"{major}.{minor}" for major, minor in [*present, *(target[0] for target in listed)])
        raise BuildError(
            f"the CUDA kernels need a GPU of capability {oldest[0]}.{oldest[1]} or later, got {too_old or 'no GPU'}",
            advice="--kernel portable runs on any GPU",
        )
    options: list[str] = []
    for (major, minor), variant, ptx in targets:
        # Both halves are named: arch=sm_90 alone would add PTX, which takes longer to build and is never used.
        # Code for sm_90a runs on every GPU of capability 9.0 there is, and only it has warpgroups' instructions.
        number = f"{major}{minor}{variant}"
        code = "90a" if number == "90" else number
        options += ["-gencode", f"arch=compute_{code},code=sm_{code}"]
        if ptx:
            options += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return tuple(options)


Capability = tuple[int, int]


def _parse_target(entry: str) -> tuple[Capability, str, bool]:
    """Capability, variant ("a", "f" or "") and whether PTX is kept, of an entry of TORCH_CUDA_ARCH_LIST."""
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
    if match is None:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST has {entry!r}", advice="expected capabilities like '8.0;9.0' or '9.0+PTX'"
        )
    return (int(match[1]), int(match[2])), match[3], bool(match[4])


def _runs_on(gpu: Capability, target: Capability, variant: str, ptx: bool) -> bool:
    """Whether code compiled for `target` runs on a GPU of this capability."""
    # Machine code runs on later minor versions of its major version, PTX on all later GPUs, a variant's code only on
    # the GPU that it was made for.
    if variant:
        return gpu == target
    return gpu >= target and (ptx or gpu[0] == target[0])

"""Facts about this machine: software, compilers and CUDA with their problems; free disk space."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch
from packaging.requirements import Requirement

from src.ops.toolchain import BuildError, find_compiler, find_ninja, find_nvcc
from src.training.preflight.checklist import Finding

REQUIREMENTS = Path(__file__).resolve().parents[3] / "requirements.txt"
OLDEST_PYTHON = (3, 10)


def software() -> Finding:
    """Python and the packages of requirements.txt."""
    versions = [f"Python {platform.python_version()}"]
    problems = []
    if tuple(map(int, platform.python_version_tuple()[:2])) < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        problems.append(f"install Python {oldest} or later; this is {platform.python_version()}")
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        if not (line := line.split("#")[0].strip()):
            continue
        requirement = Requirement(line)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"pip install '{line}': {requirement.name} is missing")
            continue
        if requirement.name in ("torch", "pytorch-lightning"):  # the two that a bug report needs
            versions.append(f"{requirement.name} {version}")
        # prereleases: nightly and locally built versions (2.11.0a0+git) count too
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"pip install '{line}': the installed {requirement.name} is {version}")
    return Finding("software", ", ".join(versions), "; ".join(problems))


def build_tools() -> Finding:
    """The C++ compiler and ninja, which build the native kernels."""
    tools = []
    try:
        compiler = find_compiler()
        tools.append(f"{_first_line([compiler, '--version'])} ({compiler})")
        tools.append(f"ninja {_first_line([find_ninja(), '--version'])}")
    except BuildError as error:
        # No problem yet: a built kernel or --kernel portable needs no compiler, and auto falls back to it.
        tools.append(str(error))
    return Finding("compiler", ", ".join(tools))


def cuda(is_used: bool = True) -> Finding:
    """This PyTorch's CUDA, the driver, nvcc and the GPUs; problems only where a run with these flags uses a GPU."""
    if not is_used:
        return Finding("cuda", "not used (--accelerator)")
    built_for = torch.version.cuda or ""
    if torch.version.hip:
        return Finding("cuda", f"this PyTorch is built for ROCm {torch.version.hip}")
    driver = _driver()
    if not torch.cuda.is_available():
        return _no_gpu(driver, built_for)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    facts += [f"driver {driver or 'unknown'}", f"PyTorch for CUDA {built_for}"]
    # An unsupported GPU comes first: with it no compiler helps.
    problem = _unsupported_architecture()
    try:
        nvcc = find_nvcc()
        release = re.search(r"release ([\d.]+)", _output([nvcc, "--version"]))
        facts.append(f"nvcc {release[1] if release else 'of unknown version'}")
        # Minor versions of CUDA are compatible with each other, major ones are not.
        if release and built_for and release[1].split(".")[0] != built_for.split(".")[0]:
            problem = problem or (
                f"install the CUDA toolkit {built_for} and set CUDA_HOME to its folder: nvcc is {release[1]}, PyTorch "
                f"is built for {built_for}"
            )
    except BuildError as error:
        problem = problem or str(error)
    return Finding("cuda", ", ".join(facts), problem)


def _no_gpu(driver: str, built_for: str) -> Finding:
    """PyTorch finds no GPU. A problem where a driver shows that the machine has one."""
    if driver and built_for:
        return Finding(
            "cuda",
            f"the NVIDIA driver is {driver}, this PyTorch is built for CUDA {built_for} and finds no GPU",
            "update the NVIDIA driver, or install a PyTorch for an older CUDA (pytorch.org/get-started)",
        )
    if driver:
        return Finding(
            "cuda",
            f"there is an NVIDIA GPU (driver {driver}), but this PyTorch is built for CPUs only",
            "for training on the GPU install a PyTorch with CUDA: pip install --force-reinstall torch "
            "(pytorch.org/get-started)",
        )
    return Finding("cuda", "no GPU: training on the CPU")


def _unsupported_architecture() -> str:
    """The problem where this PyTorch has no code for GPU 0; '' where it has."""
    capability = "sm_{}{}".format(*torch.cuda.get_device_capability())
    supported = sorted((name for name in torch.cuda.get_arch_list() if name.startswith("sm_")), key=_number)
    if supported and _number(supported[0]) > _number(capability):
        return f"install an older PyTorch: this one supports GPUs from {supported[0]} on, this GPU is {capability}"
    # Code for sm_90 runs on every later sm_9x, so only a larger major version is too new.
    if supported and _number(supported[-1]) // 10 < _number(capability) // 10:
        return f"install a newer PyTorch: this one supports GPUs up to {supported[-1]}, this GPU is {capability}"
    return ""


def _number(architecture: str) -> int:
    return int(re.sub(r"\D", "", architecture) or 0)


def _driver() -> str:
    """The version of NVIDIA's driver; '' where there is none."""
    file = Path("/proc/driver/nvidia/version")
    if file.is_file():
        version = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", file.read_text(errors="replace"))
        return version[1] if version else "of unknown version"
    if shutil.which("nvidia-smi"):  # WSL and Windows have no such file
        return _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return ""


def _first_line(command: list[str]) -> str:
    return (_output(command).splitlines() or [""])[0].strip()


def _output(command: list[str]) -> str:
    """What a command prints; '' where it fails: a check must not end because of a broken tool."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


# ---- disk ------------------------------------------------------------------------------------------------------------


def free_disk(folder: Path) -> tuple[Path, float]:
    """The nearest existing folder at or above `folder`, and the free bytes of its file system."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return existing, float(shutil.disk_usage(existing).free)

"""What this machine has: versions of the tools and what is wrong with them, free memory, free disk."""

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
    shown = [f"Python {platform.python_version()}"]
    to_do = []
    if tuple(map(int, platform.python_version_tuple()[:2])) < OLDEST_PYTHON:
        to_do.append(
            f"install Python {'.'.join(map(str, OLDEST_PYTHON))} or later; this is {platform.python_version()}"
        )
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        if not (line := line.split("#")[0].strip()):
            continue
        wanted = Requirement(line)
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            to_do.append(f"pip install '{line}': {wanted.name} is missing")
            continue
        if wanted.name in ("torch", "pytorch-lightning"):
            shown.append(f"{wanted.name} {version}")
        if not wanted.specifier.contains(version, prereleases=True):
            to_do.append(f"pip install '{line}': {wanted.name} here is {version}")
    return Finding("software", ", ".join(shown), "; ".join(to_do))


def build_tools() -> Finding:
    """The compiler and ninja, that the native kernels are built with; whether one is needed, the look at the kernel says."""
    shown = []
    try:
        compiler = find_compiler()
        shown.append(f"{_first_line([compiler, '--version'])} ({compiler})")
        shown.append(f"ninja {_first_line([find_ninja(), '--version'])}")
    except BuildError as error:
        shown.append(str(error))
    return Finding("compiler", ", ".join(shown))


def cuda(wanted: bool = True) -> Finding:
    """CUDA as this PyTorch has it, the driver, nvcc and the GPUs; what keeps them from working together, where a GPU is `wanted`."""
    if not wanted:
        return Finding("cuda", "not asked for (--accelerator cpu)")
    built_for = torch.version.cuda or ""
    if torch.version.hip:
        return Finding("cuda", f"this PyTorch is built for ROCm {torch.version.hip}")
    driver = _driver()
    if not torch.cuda.is_available():
        return _no_gpu(driver, built_for)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    shown = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    shown += [f"driver {driver or 'unknown'}", f"PyTorch for CUDA {built_for}"]
    to_do = _other_architecture()
    try:
        nvcc = find_nvcc()
        found = re.search(r"release ([\d.]+)", _output([nvcc, "--version"]))
        shown.append(f"nvcc {found[1] if found else 'of an unknown version'}")
        if found and built_for and found[1].split(".")[0] != built_for.split(".")[0]:
            to_do = (
                to_do
                or f"install the CUDA toolkit {built_for} and point CUDA_HOME at it: nvcc is {found[1]}, PyTorch is for {built_for}"
            )
    except BuildError as error:
        to_do = to_do or str(error)
    return Finding("cuda", ", ".join(shown), to_do)


def _no_gpu(driver: str, built_for: str) -> Finding:
    """PyTorch sees no GPU: whether there is one that it should see."""
    if driver and built_for:
        return Finding(
            "cuda",
            f"the NVIDIA driver is {driver}, PyTorch was built for CUDA {built_for} and sees no GPU",
            "update the NVIDIA driver, or install a PyTorch for an older CUDA (pytorch.org/get-started)",
        )
    if driver:
        return Finding(
            "cuda",
            f"there is an NVIDIA GPU (driver {driver}), but this PyTorch is built for CPUs only",
            "for training on the GPU install a PyTorch with CUDA: pip install --force-reinstall torch (pytorch.org/get-started)",
        )
    return Finding("cuda", "no GPU: training on the CPU")


def _other_architecture() -> str:
    """What to do where this PyTorch has no code for this GPU; '' where it has."""
    capability = "sm_{}{}".format(*torch.cuda.get_device_capability())
    known = [name for name in torch.cuda.get_arch_list() if name.startswith("sm_")]
    if known and min(map(_number, known)) > _number(capability):
        return (
            f"install an older PyTorch: this one knows GPUs from {min(known, key=_number)} on, this one is {capability}"
        )
    if known and max(map(_number, known)) // 10 < _number(capability) // 10:
        return f"install a newer PyTorch: this one knows GPUs up to {max(known, key=_number)}, this one is {capability}"
    return ""


def _number(architecture: str) -> int:
    return int(re.sub(r"\D", "", architecture) or 0)


def _driver() -> str:
    """The version of NVIDIA's driver, '' where there is none."""
    file = Path("/proc/driver/nvidia/version")
    if file.is_file():
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", file.read_text(errors="replace"))
        return found[1] if found else "of an unknown version"
    if shutil.which("nvidia-smi"):
        return _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return ""


def _first_line(command: list[str]) -> str:
    return (_output(command).splitlines() or [""])[0].strip()


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def free_memory(accelerator: str, processes: int, device: int = 0) -> float | None:
    """Bytes that one process may still take: of GPU number `device`, or its share of the machine's. None: not known here."""
    if accelerator == "gpu":
        return float(torch.cuda.mem_get_info(device)[0])
    shared = (_available(), _within_cgroup(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))
    limits = [free / processes for free in shared if free is not None]
    limits += [free for free in (_within_ulimit(),) if free is not None]
    return min(limits, default=None)


def _available(meminfo: Path = Path("/proc/meminfo")) -> float | None:
    if not meminfo.is_file():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    return float(found[1]) * 1024 if found else None


def _within_cgroup(root: Path, own: Path) -> float | None:
    """What the control groups of this process (a container, a job) still allow; the tightest of the nested ones."""
    if not own.is_file():
        return None
    free: list[float] = []
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        limit, usage = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        )
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(base):
                break
            try:
                allowed, used = int((group / limit).read_text()), int((group / usage).read_text())
                kept = re.search(r"^(?:total_)?inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
            except (OSError, ValueError):  # no such file, or "max"
                continue
            free.append(allowed - used + (int(kept[1]) if kept else 0))  # the file cache gives way
    return max(0.0, min(free)) if free else None


def _within_ulimit() -> float | None:
    """What `ulimit -v`, the limit on this process's address space, still allows."""
    own = Path("/proc/self/statm")
    if not own.is_file():
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(own.read_text().split()[0]) * resource.getpagesize()
    return None if limit == resource.RLIM_INFINITY else float(max(0, limit - taken))


def free_disk(folder: Path) -> tuple[Path, float]:
    """The nearest folder that exists, and the bytes free where it lies."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there, float(shutil.disk_usage(there).free)

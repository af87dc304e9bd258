"""What a run ran on: versions, devices, the program's commit. Kept in run.json for the report."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from src.training.hardware.selection import Hardware

PACKAGES = ("torch", "pytorch-lightning", "deepspeed")


def environment(hardware: Hardware) -> dict[str, str]:
    """Names and values in words."""
    found = {"git commit": git_commit(), "Python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if hardware.accelerator == "gpu":
        found["CUDA"] = torch.version.cuda or ""
        found["GPU"] = torch.cuda.get_device_name()
    found["CPU"] = f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"
    found["system"] = platform.platform()
    found["processes"] = hardware.description
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def git_commit() -> str:
    """The commit of this program, with "+" where files differ from it; "" where that can't be known."""
    here = Path(__file__).parent
    try:
        head, changes = (
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return head.strip() + "+" * bool(changes.strip())

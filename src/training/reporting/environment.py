"""Describes what a run is executed on (versions, devices, git commit), for run.json and the report."""

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
# `git status` on a slow network file system may take long, and a run should not wait for a detail of its report.
GIT_TIMEOUT_SECONDS = 10


def environment(hardware: Hardware) -> dict[str, str]:
    """Versions, devices and system, as text by name. The names are part of run.json: the report shows them."""
    entries = {"git commit": git_commit(), "Python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            # from the metadata: deepspeed is imported only by runs that use it
            entries[package] = version(package)
        except PackageNotFoundError:
            continue
    if hardware.accelerator == "gpu":
        entries["CUDA"] = torch.version.cuda or ""
        entries["GPU"] = torch.cuda.get_device_name()
    elif hardware.accelerator != "cpu":
        entries["device"] = hardware.device_name
    entries["CPU"] = f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"
    entries["system"] = platform.platform()
    entries["processes"] = hardware.description
    return entries


def _cpu_name() -> str:
    # platform.processor() gives no more than "x86_64" on Linux
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def git_commit() -> str:
    """The commit of this program, followed by "+" when tracked files were modified; "" outside of a git repository."""
    folder = Path(__file__).parent
    try:
        head, changes = (
            subprocess.run(
                ["git", *arguments],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=GIT_TIMEOUT_SECONDS,
                check=True,
            ).stdout
            # untracked files are left out: data and runs usually lie inside the repository
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return head.strip() + "+" * bool(changes.strip())

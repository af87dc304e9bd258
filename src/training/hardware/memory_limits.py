"""Memory that a process may still allocate: of a GPU, or of this machine within the limits of containers and jobs."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from src.ops.devices import free_device_memory


def free_memory(accelerator: str, processes: int, device: int = 0) -> float | None:
    """Bytes that one process may still allocate: of device number `device`, or its share of CPU memory. None where
    unknown."""
    if accelerator == "gpu":
        return float(torch.cuda.mem_get_info(device)[0])
    if accelerator != "cpu":
        return free_device_memory(accelerator, device)
    shared = (_available(), _cgroup_available(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))
    limits = [free / processes for free in shared if free is not None]
    # A ulimit holds for each process by itself, so it is not divided.
    limits += [free for free in (_address_space_available(),) if free is not None]
    return min(limits, default=None)


def _available(meminfo: Path = Path("/proc/meminfo")) -> float | None:
    if not meminfo.is_file():
        return None
    # MemAvailable rather than MemFree: it counts the file cache, which the kernel gives up when memory is needed
    available = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    return float(available[1]) * 1024 if available else None


def _cgroup_available(root: Path, membership: Path) -> float | None:
    """Bytes left in the control groups of this process (a container, a job): the smallest of the nested ones.

    `root` is where control groups are mounted, `membership` the file that lists those of this process.
    """
    if not membership.is_file():
        return None
    free: list[float] = []
    for line in membership.read_text().splitlines():
        # "0::/path" in version 2, "N:memory:/path" in version 1, which has a hierarchy for each controller
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
                cache = re.search(r"^(?:total_)?inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
            except (OSError, ValueError):  # no such file, or "max"
                continue
            # usage counts the file cache, which the kernel gives up when memory is needed
            free.append(allowed - used + (int(cache[1]) if cache else 0))
    return max(0.0, min(free)) if free else None


def _address_space_available() -> float | None:
    """Bytes left under `ulimit -v`, the limit of this process's address space; None without a limit."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return None
    import resource  # not on Windows

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    return None if limit == resource.RLIM_INFINITY else float(max(0, limit - used))

"""Saving, restarting, and the share of the time in which a run makes progress that it keeps.

A state has 12 bytes per parameter: fp32 weights and two moments. With P parameters that are trained, N disks of v
bytes/s, W processes, a failure somewhere every 1 / f seconds and a state every s seconds:

    stop         12 P / W / COPY_RATE: training stops while each process copies what it holds
    write        12 P / (N v), in the background; the state counts when it is whole
    restart      START_SECONDS + 12 P / (N v): noticing, starting, reading
    goodput      (1 - stop / s) / (1 + f (s / 2 + write + restart)): a failure costs half an interval on average
    best s       sqrt(2 stop / f) (Young, 1974), but no shorter than a write takes

They hold while failures are rare, f (s + restart) << 1. `python -m src.training.simulate` needs no such assumption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

STATE_BYTES = 12  # per parameter
COPY_RATE = 25e9  # bytes/s from a GPU to pinned memory: PCIe 4.0 x16, less its overhead
START_SECONDS = 120.0  # up to a minute until a failure is noticed (--dist_timeout), and as long until the first step


@dataclass(frozen=True)
class Saving:
    """Seconds that a run's states take."""

    stop: float
    write: float
    restart: float


def saving(trained: int, processes: int, disks: float, disk_rate: float) -> Saving:
    """For `trained` parameters; `disk_rate` in bytes/s."""
    size = STATE_BYTES * trained
    write = size / (disks * disk_rate)
    return Saving(size / processes / COPY_RATE, write, START_SECONDS + write)


def failures_per_second(num_nodes: int, mtbf_hours: float) -> float:
    """Of all machines, each of which fails once in `mtbf_hours` on average; 0: none fails."""
    return num_nodes / (mtbf_hours * 3600) if mtbf_hours else 0.0


def goodput(saved: Saving, interval: float, failures: float) -> float:
    """Share of the time whose steps are kept. `interval` in seconds; `failures` per second."""
    lost = failures * (interval / 2 + saved.write + saved.restart)
    return (1 - saved.stop / (interval + saved.stop)) / (1 + lost)


def best_interval(saved: Saving, failures: float) -> float:
    """Seconds between states with the highest goodput; infinite without failures."""
    return max(math.sqrt(2 * saved.stop / failures), saved.write) if failures else math.inf

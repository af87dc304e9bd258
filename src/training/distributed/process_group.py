"""The process group of a run: how its processes start, agree and shut down together.

They come from a launcher (launch.py), or from `python train.py --devices N`, which starts the others itself. Either way
all of them exist before anything is decided: rank 0 decides what has to be decided once, and a watchdog ends all of
them when one fails.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from src.errors import UserError
from src.training.distributed.launch import (
    KnownClusterEnvironment,
    RankInfo,
    environment_variables,
    rank_from_launcher,
    rank_of_first_process,
)
from src.training.distributed.watchdog import GRACE_SECONDS, Watchdog

JOIN_TIMEOUT = timedelta(minutes=10)  # for all processes to come: machines may boot at different speeds
COLLECTIVE_TIMEOUT = timedelta(hours=2)  # the watchdog ends a run long before; this bounds only what it can't see

T = TypeVar("T")


class PendingFlags:
    """Flags that are being combined over the ranks; `wait` gives, for each, whether any rank had set it."""

    def __init__(self, flags: Tensor, work: Any = None) -> None:
        self._flags, self._work = flags, work

    def wait(self) -> list[bool]:
        if self._work is not None:
            self._work.wait()
        return [bool(flag) for flag in self._flags.tolist()]


class ProcessGroup:
    """All processes of a run, seen from one of them; made by `join`. As it stands here: the group of a single
    process."""

    rank, world_size = 0, 1
    # given explicitly, or Lightning would look for Slurm's variables and act on what it finds
    environment: ClusterEnvironment = LightningEnvironment()

    def broadcast_from_rank_zero(self, compute: Callable[[], T]) -> T:
        """The result of `compute` on rank 0, on every rank. What it raises there is raised on every rank."""
        return compute()

    def any_rank(self, flags: Sequence[bool]) -> PendingFlags:
        """Begin to combine flags over the ranks (logical or), on the CPU: no device is waited for."""
        return PendingFlags(torch.tensor(list(flags), dtype=torch.int32))

    def should_report(self, error: BaseException) -> bool:
        """Whether this rank prints the error that ends it: not when rank 0 prints the same one.

        Called once, when a rank fails: with several ranks it also tells the others, and may wait for them.
        """
        return True

    def abort(self, reason: str) -> None:
        """End the run on every other rank, with this reason."""

    def abort_after(self, error: BaseException) -> None:
        """As `abort`, for an exception that nobody expected, unless it only follows from another rank's end."""

    def shutdown(self) -> None:
        """Leave a run that ended well."""


class DistributedProcessGroup(ProcessGroup):
    """The process group of one of several processes."""

    def __init__(self, info: RankInfo, store: dist.Store, children: list[subprocess.Popen]) -> None:
        self.info, self.rank, self.world_size = info, info.rank, info.world_size
        self.environment = KnownClusterEnvironment(info)
        self._store = store
        self._watchdog = Watchdog(info, children, JOIN_TIMEOUT)
        self._children = children
        self._cpu_group: dist.ProcessGroup | None = None
        self._watchdog.start()

    def connect(self) -> None:
        """Called when torch.distributed is initialised. The group is of its own even where gloo is the default backend,
        so that flags that are on their way never meet another collective."""
        self._cpu_group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)

    def broadcast_from_rank_zero(self, compute: Callable[[], T]) -> T:
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = compute()
            except Exception as error:
                outcome[1] = _picklable(error)
                dist.broadcast_object_list(outcome, src=0, group=self._cpu_group)
                raise
        dist.broadcast_object_list(outcome, src=0, group=self._cpu_group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def any_rank(self, flags: Sequence[bool]) -> PendingFlags:
        combined = torch.tensor(list(flags), dtype=torch.int32)
        work = dist.all_reduce(combined, dist.ReduceOp.MAX, group=self._cpu_group, async_op=True)
        return PendingFlags(combined, work)

    def should_report(self, error: BaseException) -> bool:
        if self.rank == 0:
            # other ranks with an error of their own exit at once, without a notice of the watchdog
            self._watchdog.ended = True
            self._store.set("failed", _kind_of(error))
            return True
        # A mistake in the settings or the data fails every rank in the same way: rank 0 reports it once. So the others
        # give rank 0 the time to fail, and report their own error only when rank 0 has none of its kind.
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and not self._watchdog.ended:
            try:
                if self._store.check(["failed"]):
                    if self._store.get("failed").decode() != _kind_of(error):
                        return True
                    self._watchdog.leaving = True
                    return False
            except RuntimeError:  # the store ended with rank 0
                break
            time.sleep(0.1)
        return True

    def abort(self, reason: str) -> None:
        # should a destructor at the interpreter's end wait for the other ranks
        exit_timer = threading.Timer(30, os._exit, args=(1,))
        exit_timer.daemon = True
        exit_timer.start()
        if self.rank == 0:
            time.sleep(GRACE_SECONDS)  # for ranks with the same error, which exit by themselves
        self._watchdog.publish_failure(f"rank {self.rank} failed: {reason}")

    def abort_after(self, error: BaseException) -> None:
        # A collective that fails because another rank died raises here first. The watchdog needs a moment to learn the
        # cause, and ends this process with it.
        time.sleep(2 * GRACE_SECONDS)
        first_line = (str(error).splitlines() or [""])[0]
        self._watchdog.publish_failure(f"rank {self.rank} failed: {type(error).__name__}: {first_line}")

    def shutdown(self) -> None:
        """Rank 0 goes last: where no launcher hosts the store, it ends with rank 0's process."""
        try:
            self._watchdog.mark_done()
        except RuntimeError:
            return  # rank 0 is gone already; this rank's part is done
        if self.rank == 0:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and not all(map(self._watchdog.is_done, range(self.world_size))):
                time.sleep(0.05)
        for child in self._children:
            try:
                child.wait(timeout=60)
            except subprocess.TimeoutExpired:
                child.kill()
        self._watchdog.finished = True
        if dist.is_initialized():
            dist.destroy_process_group()


def _kind_of(error: BaseException) -> str:
    """What tells errors of two ranks apart: the type, and the flag of a user's mistake."""
    return f"{type(error).__name__} {getattr(error, 'flag', '')}"


def _picklable(error: Exception) -> Exception:
    """The error itself, or what can be said of it where it can't be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"rank 0: {type(error).__name__}: {error}")


def join(devices: int, num_nodes: int, accelerator: str) -> ProcessGroup:
    """The process group of this process: starts the node's other processes if no launcher did, and waits for all."""
    info = rank_from_launcher(os.environ)
    if info is None and devices * num_nodes == 1:
        return ProcessGroup()
    started_here = info is None
    if info is None:
        info = rank_of_first_process(os.environ, devices, num_nodes)
    if info.master_port == 0:
        raise UserError(
            "MASTER_PORT 0: the processes could not find each other",
            advice="name a port (torchrun on one machine: --standalone)",
        )
    # for the processes started here, and for libraries that read them
    os.environ.update(environment_variables(info))
    rank_zero_only.rank = info.rank  # type: ignore[attr-defined]
    children = _start_children(info) if started_here else []
    try:
        return _connect(info, children, accelerator)
    except RuntimeError as error:
        for child in children:
            child.kill()
        raise OSError(
            f"rank {info.rank} of {info.world_size} could not connect to {info.master_addr}:{info.master_port} "
            f"({str(error).splitlines()[0]}); check that every machine was started and reaches that address"
        ) from error


def _connect(info: RankInfo, children: list[subprocess.Popen], accelerator: str) -> ProcessGroup:
    store = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))[0]
    group = DistributedProcessGroup(info, dist.PrefixStore("run", store), children)
    dist.init_process_group(
        "nccl" if accelerator == "gpu" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=info.rank,
        world_size=info.world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=torch.device("cuda", info.local_rank) if accelerator == "gpu" else None,
    )
    group.connect()
    if accelerator == "cpu":
        num_threads = _cores_per_process(info)  # a collective: before the condition, or ranks could differ in it
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(num_threads)
    return group


def _cores_per_process(info: RankInfo) -> int:
    """Cores that this process may use, divided by the processes of this machine that may use them too: a launcher may
    have pinned each process to its own. Every rank takes part."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores_by_rank: list[Any] = [None] * info.world_size
    dist.all_gather_object(cores_by_rank, cores)
    first = info.rank - info.local_rank
    on_this_node = cores_by_rank[first : first + info.local_world_size]
    return max(1, len(cores) // sum(not cores.isdisjoint(others) for others in on_this_node))


def _start_children(info: RankInfo) -> list[subprocess.Popen]:
    """Local ranks 1 and up of this node, by the command that started this process."""
    command = [sys.executable, *sys.orig_argv[1:]]
    return [
        subprocess.Popen(
            command,
            env={**os.environ, "RANK": str(info.rank + local_rank), "LOCAL_RANK": str(local_rank)},
            stdin=subprocess.DEVNULL,
        )
        for local_rank in range(1, info.local_world_size)
    ]

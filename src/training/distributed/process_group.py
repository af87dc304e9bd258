"""The process group of a run: how its processes agree, fail and leave together.

A launcher (launch.py, or torchrun, srun ...) has started all of them before anything is decided: rank 0 decides what
has to be decided once.
"""

from __future__ import annotations

import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
)
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.distributed import distributed_c10d

from src.errors import UserError
from src.training.distributed.ranks import cluster_environment, is_supervised
from src.training.distributed.watch import watch_parent, watch_steps

GRACE_SECONDS = 4.0  # in which rank 0 fails with the error of another rank, if it is the same mistake
END_SECONDS = 20.0  # for a process that fails to leave: destroying a group may wait for ranks that are gone
LEAVE_SECONDS = 30.0  # for all others to leave a run that is complete

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
    step = 0  # optimizer steps taken, for what is said about a failure
    # given explicitly, or Lightning would look for Slurm's variables and act on what it finds
    environment: ClusterEnvironment = LightningEnvironment()

    def broadcast_from_rank_zero(self, compute: Callable[[], T]) -> T:
        """The result of `compute` on rank 0, on every rank. What it raises there is raised on every rank."""
        return compute()

    def any_rank(self, flags: Sequence[bool]) -> PendingFlags:
        """Begin to combine flags over the ranks (logical or), on the CPU: no device is waited for."""
        return PendingFlags(torch.tensor(list(flags), dtype=torch.int32))

    def refuse_other_values(self, values: Mapping[str, Any], flags: bool) -> None:
        """Raises UserError on every rank when one has other values than rank 0. `flags`: whether the names are those of
        flags."""

    def should_report(self, error: BaseException) -> bool:
        """Whether this rank prints the error that ends it: not when rank 0 prints the same one. Called once."""
        return True

    def abort(self) -> None:
        """Leave a run that failed: the collectives of other ranks fail then, too."""

    def shutdown(self) -> None:
        """Leave a run that ended well."""


class DistributedProcessGroup(ProcessGroup):
    """The process group of one of several processes."""

    def __init__(self, environment: ClusterEnvironment, store: dist.Store) -> None:
        self.environment, self.rank, self.world_size = environment, environment.global_rank(), environment.world_size()
        self._store = store
        self._cpu_group: dist.ProcessGroup | None = None
        self._timeout = timedelta()

    def connect(self, timeout: timedelta) -> None:
        """Called when torch.distributed is initialised. The group is of its own even where gloo is the default backend,
        so that flags that are on their way never meet another collective."""
        self._timeout = timeout
        self._cpu_group = dist.new_group(backend="gloo", timeout=timeout)
        if self.rank in (0, self.world_size - 1):  # each sees the other stand still
            args = (lambda: self.step, timeout.total_seconds())
            threading.Thread(target=watch_steps, args=args, daemon=True, name="steps").start()

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

    def refuse_other_values(self, values: Mapping[str, Any], flags: bool) -> None:
        by_rank: list[Any] = [None] * self.world_size
        dist.all_gather_object(by_rank, (socket.gethostname(), dict(values)), group=self._cpu_group)
        _, expected = by_rank[0]
        for rank, (host, others) in enumerate(by_rank):
            for name in expected:
                if others.get(name) != expected[name]:
                    raise UserError(
                        f"rank {rank} ({host}) has {others.get(name)!r}{'' if flags else ' as ' + name}, rank 0 "
                        f"{expected[name]!r}",
                        flag=name if flags else "",
                        advice="start every process with the same flags, data and version of the code",
                    )

    def should_report(self, error: BaseException) -> bool:
        if self.rank == 0:
            self._store.set("failed", _kind_of(error))
            return True
        # A mistake in the settings or the data fails every rank in the same way: rank 0 reports it once. So the others
        # give rank 0 the time to fail, and report their own error only when rank 0 has none of its kind.
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            try:
                if self._store.check(["failed"]):
                    return self._store.get("failed").decode() != _kind_of(error)
            except RuntimeError:  # the store ended with rank 0
                break
            time.sleep(0.1)
        return True

    def abort(self) -> None:
        end = threading.Timer(END_SECONDS, os._exit, args=(1,))
        end.daemon = True
        end.start()
        if self.rank == 0 and not is_supervised(os.environ):
            time.sleep(GRACE_SECONDS)  # for `should_report` of the others, whose store ends with this process
        if dist.is_initialized():
            dist.destroy_process_group()

    def shutdown(self) -> None:
        """All leave together, rank 0 last: an agent takes a rank that has left with a code for a failed one and ends
        the others, and the store may be in rank 0's process. Raises TimeoutError where one hangs: the others are
        started again then, find the run complete, and leave."""
        if self.rank == 0:
            self._store.set("done", "1")
            deadline = time.monotonic() + LEAVE_SECONDS
            staying = list(range(1, self.world_size))
            while staying := [rank for rank in staying if not self._store.check([f"left {rank}"])]:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the run is complete, but rank {staying[0]} doesn't end")
                time.sleep(0.02)
        else:
            deadline = time.monotonic() + self._timeout.total_seconds()
            # rank 0 writes weights and draws figures; where it dies, this raises
            while not self._store.check(["done"]):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"rank 0 has not ended within {self._timeout.total_seconds():.0f} s")
                time.sleep(0.1)
            self._store.set(f"left {self.rank}", "1")
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


def join(accelerator: str, timeout_seconds: float) -> ProcessGroup:
    """The process group of this process among those that a launcher started; waits for all of them."""
    environment = cluster_environment()
    if environment is None:
        return ProcessGroup()
    rank_zero_only.rank = rank = environment.global_rank()  # type: ignore[attr-defined]
    watch_parent()
    if (world_size := environment.world_size()) == 1:
        return ProcessGroup()
    try:
        return _connect(environment, accelerator, timedelta(seconds=timeout_seconds))
    except RuntimeError as error:
        raise OSError(
            f"rank {rank} of {world_size} could not connect to {environment.main_address}:{environment.main_port} "
            f"({str(error).splitlines()[0]}); check that every machine was started and reaches that address"
        ) from error


def _connect(environment: ClusterEnvironment, accelerator: str, timeout: timedelta) -> ProcessGroup:
    # for the groups that DeepSpeed makes without naming a time-out
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    store = next(dist.rendezvous("env://", timeout=timeout))[0]
    group = DistributedProcessGroup(environment, dist.PrefixStore("run", store))
    dist.init_process_group(
        "nccl" if accelerator == "gpu" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=group.rank,
        world_size=group.world_size,
        timeout=timeout,
        device_id=torch.device("cuda", environment.local_rank()) if accelerator == "gpu" else None,
    )
    group.connect(timeout)
    if accelerator == "cpu":
        num_threads = _cores_per_process(environment)  # a collective: before the condition, or ranks could differ in it
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(num_threads)
    return group


def _cores_per_process(environment: ClusterEnvironment) -> int:
    """Cores that this process may use, divided by the processes of this machine that may use them too: a launcher may
    have pinned each process to its own. Every rank takes part."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores_by_rank: list[Any] = [None] * environment.world_size()
    dist.all_gather_object(cores_by_rank, cores)
    first = environment.global_rank() - environment.local_rank()
    on_this_node = cores_by_rank[first : first + int(os.environ["LOCAL_WORLD_SIZE"])]
    return max(1, len(cores) // sum(not cores.isdisjoint(others) for others in on_this_node))

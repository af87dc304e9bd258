"""The processes of a run: how they are started, decide together and end together.

They come from a launcher (places.py), or from `python train.py --devices N`, which starts the others itself. Either way all of them
are there from the beginning, rank 0 decides what has to be decided once, and each watches over the others (watch.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from pytorch_lightning.utilities import rank_zero_only

from src.errors import UserError
from src.training.distributed.launch import KnownClusterEnvironment, RankInfo, rank_from_launcher, rank_of_first_process
from src.training.distributed.watchdog import GRACE_SECONDS, Watch

JOIN_TIMEOUT = timedelta(minutes=10)  # for all processes to come, machines may boot at different speeds
COLLECTIVE_TIMEOUT = timedelta(hours=2)  # the watch ends a run long before; this bounds only what it can't see

T = TypeVar("T")


class ProcessGroup:
    """All processes of a run, seen from one of them; made by `join`.

    As it stands here it is that of a process which is alone: nobody to ask, nobody to wait for.
    """

    rank, size = 0, 1
    environment: ClusterEnvironment = (
        LightningEnvironment()
    )  # named, or Lightning would look for Slurm and act on what it finds

    def broadcast_from_rank_zero(self, question: Callable[[], T]) -> T:
        return question()

    def should_report(self, message: str) -> bool:
        return True

    def abort(self, message: str) -> None:
        pass

    def explain(self, error: BaseException) -> None:
        pass

    def leave(self) -> None:
        pass


class DistributedProcessGroup(ProcessGroup):
    """The process_group of a process that is one of several."""

    def __init__(self, place: RankInfo, store: dist.Store, children: list[subprocess.Popen]) -> None:
        self.place, self.rank, self.size = place, place.rank, place.size
        self.environment = KnownClusterEnvironment(place)
        self._store = store
        self._watch = Watch(place, children, JOIN_TIMEOUT)
        self._children = children
        self._words: dist.ProcessGroup | None = None
        self._watch.start()

    def meet(self) -> None:
        """When torch.distributed is there: a group for words instead of tensors, on the CPU, so that nothing waits for a device."""
        self._words = (
            dist.group.WORLD
            if dist.get_backend() == "gloo"
            else dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        )

    def broadcast_from_rank_zero(self, question: Callable[[], T]) -> T:
        """What rank 0 answers, on every rank; a ValueError or OSError of rank 0 is raised on every rank too."""
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = question()
            except (ValueError, OSError) as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0, group=self._words)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def should_report(self, message: str) -> bool:
        """Whether this rank should print an error: not when rank 0 has the same."""
        if self.rank == 0:
            self._watch.ended = True  # others that have the same error end at once, and need no word of it
            self._store.set("error", message)
            return True
        until = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < until and not self._watch.ended:
            try:
                if self._store.check(["error"]) and self._store.get("error").decode() == message:
                    self._watch.leaving = True
                    return False
            except RuntimeError:  # the store went with process 0
                break
            time.sleep(0.1)
        return True

    def abort(self, message: str) -> None:
        """Ends the run on every rank, with this reason."""
        end = threading.Timer(30, os._exit, args=(1,))  # should something at the interpreter's end wait for the others
        end.daemon = True
        end.start()
        if self.rank == 0:
            time.sleep(GRACE_SECONDS)  # for those who have the same error, and end by themselves
        self._watch.tell(f"process {self.rank} failed: {message}")

    def explain(self, error: BaseException) -> None:
        """Called with an error nobody foresaw: when it only follows from another process's end, ends with that reason instead."""
        until = time.monotonic() + 2 * GRACE_SECONDS
        while time.monotonic() < until:  # the watch ends this process as soon as it knows why
            time.sleep(0.1)
        self._watch.tell(
            f"process {self.rank} failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )

    def leave(self) -> None:
        """The end of a run that ended well: rank 0, which the others speak through, goes last."""
        self._watch.leaving = True
        try:
            self._store.set(f"done/{self.rank}", "1")
        except RuntimeError:
            return  # process 0 is gone already; this one has done its part
        if self.rank == 0:
            until = time.monotonic() + 60
            names = [f"done/{rank}" for rank in range(self.size)]
            while time.monotonic() < until and not all(self._store.check([name]) for name in names):
                time.sleep(0.05)
        for child in self._children:
            try:
                child.wait(timeout=60)
            except subprocess.TimeoutExpired:
                child.kill()
        self._watch.finished = True
        if dist.is_initialized():
            dist.destroy_process_group()


def join(devices: int, num_nodes: int, accelerator: str) -> ProcessGroup:
    """The process_group of this process: starts the machine's other processes if no launcher did, and waits until all are there."""
    place = rank_from_launcher(os.environ)
    if place is None and devices * num_nodes == 1:
        return ProcessGroup()
    started_here = place is None
    if place is None:
        place = rank_of_first_process(os.environ, devices, num_nodes)
    if place.port == 0:
        raise UserError(
            "MASTER_PORT 0: no process could find the others; name a port (torchrun on one machine: --standalone)"
        )
    # what torchrun would say: for the processes started here, and for libraries that read it
    os.environ.update(_variables(place))
    rank_zero_only.rank = place.rank  # type: ignore[attr-defined]
    children = _start_others(place) if started_here else []
    try:
        store = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))[0]
        process_group = DistributedProcessGroup(place, dist.PrefixStore("process_group", store), children)
        device = torch.device("cuda", place.local_rank) if accelerator == "gpu" else None
        dist.init_process_group(
            "nccl" if accelerator == "gpu" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=place.rank,
            world_size=place.size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device,
        )
        process_group.meet()
        if accelerator == "cpu":
            threads = _share_of_cores(place)
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(threads)
    except RuntimeError as error:
        for child in children:
            child.kill()
        raise OSError(
            f"process {place.rank} of {place.size} could not meet the others at {place.address}:{place.port} ({str(error).splitlines()[0]}); "
            "check that every machine was started, and that they reach each other at that address"
        ) from error
    return process_group


def _share_of_cores(place: RankInfo) -> int:
    """How many cores this process may use, divided by the processes of this machine that may use them too: a launcher may have given each
    its own. Asks all ranks."""
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    of_all: list[Any] = [None] * place.size
    dist.all_gather_object(of_all, own)
    here = of_all[place.rank - place.local_rank :][: place.local_size]
    return max(1, len(own) // sum(not own.isdisjoint(cores) for cores in here))


def _variables(place: RankInfo) -> dict[str, str]:
    return {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_size),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
    }


def _start_others(place: RankInfo) -> list[subprocess.Popen]:
    """Processes 1 .. of this machine, by the command that started this one."""
    command = [sys.executable, *sys.orig_argv[1:]]
    return [
        subprocess.Popen(
            command,
            env={**os.environ, "RANK": str(place.rank + i), "LOCAL_RANK": str(i)},
            stdin=subprocess.DEVNULL,
        )
        for i in range(1, place.local_size)
    ]


def leave_signals_to_the_run(worker: int) -> None:
    """A DataLoader's worker_init_fn. Ctrl-C, a closed terminal and a job's end signal whole process groups: the run still needs its worker
    for the step under way, and ends it then."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(
        signal, "sigwaitinfo"
    ):  # not on Windows, where no SIGTERM is sent to groups, nor on macOS, where no run has a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_run_says, daemon=True).start()


def _end_when_the_run_says() -> None:
    """SIGTERM can't be ignored altogether: it is also how multiprocessing ends a worker that it couldn't ask, and then waits for."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)

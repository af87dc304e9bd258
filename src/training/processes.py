"""The processes of a run: who is who, how they are started, and how all of them end when one does.

Processes come from a launcher (torchrun, srun, DeepSpeed's launcher, mpirun), which tells each its rank in environment variables; or
from `python train.py --devices N`, which starts the others itself. Either way all of them are there from the beginning, rank 0
decides what has to be decided once, and each watches over the others: a process that dies, hangs or fails ends the run
everywhere within a minute, and every process says why.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment
from pytorch_lightning.utilities import rank_zero_only

BEAT_SECONDS = 1.0
SILENT_SECONDS = 40.0  # without a beat, a process counts as dead; far beyond what a busy one needs
JOIN_TIMEOUT = timedelta(minutes=10)  # for all processes to come, machines may boot at different speeds
COLLECTIVE_TIMEOUT = timedelta(hours=2)  # the watch ends a run long before; this bounds only what it can't see
GRACE_SECONDS = 4.0  # for the others to read why

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a process stands among all of them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str  # where rank 0 is
    port: int

    @property
    def node_rank(self) -> int:
        return self.rank // self.local_size


# rank, number of processes, rank on this machine, processes on this machine: the names that launchers use
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),  # DeepSpeed's
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)


def place_from_launcher(environment: Mapping[str, str]) -> Place | None:
    """What a launcher told this process; None where there is no launcher, or only one process.

    A Slurm job counts when srun started several tasks: a batch script that calls train.py is one process that may start others.
    """
    for names in LAUNCHERS:
        if all(name in environment for name in names):
            rank, size, local_rank, local_size = (int(environment[name]) for name in names)
            address = environment.get("MASTER_ADDR", "127.0.0.1")
            port = int(environment.get("MASTER_PORT", "29500"))
            return Place(rank, size, local_rank, local_size, address, port) if size > 1 else None
    size = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if size > 1 and "SLURM_PROCID" in environment:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "127.0.0.1")
        address = environment.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(nodes)
        # the same port on every machine, another one for each job
        port = int(environment.get("MASTER_PORT", 15000 + int(environment.get("SLURM_JOB_ID", "0")) % 10000))
        machines = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
        return Place(
            int(environment["SLURM_PROCID"]), size, int(environment["SLURM_LOCALID"]), size // machines, address, port
        )
    return None


def first_place(environment: Mapping[str, str], devices: int, num_nodes: int) -> Place:
    """That of the process which a user started by hand on a machine: its first, which starts the machine's others.

    On several machines NODE_RANK, MASTER_ADDR and MASTER_PORT say which machine this is and where the first one listens.
    """
    if num_nodes == 1:
        return Place(0, devices, 0, devices, "127.0.0.1", _free_port())
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ValueError(
            f"--num_nodes {num_nodes}: without a launcher (torchrun, srun, deepspeed) each machine needs NODE_RANK (0 .. "
            f"{num_nodes - 1}), MASTER_ADDR and MASTER_PORT of the first machine in its environment; {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set"
        )
    rank = int(environment["NODE_RANK"]) * devices
    return Place(rank, devices * num_nodes, 0, devices, environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class PlacesForLightning(ClusterEnvironment):
    """Tells Lightning what is known already, so that it starts and names no process."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    creates_processes_externally = True  # type: ignore[assignment]

    @property
    def main_address(self) -> str:
        return self.place.address

    @property
    def main_port(self) -> int:
        return self.place.port

    @staticmethod
    def detect() -> bool:
        return False  # it is handed over, never looked for

    def world_size(self) -> int:
        return self.place.size

    def global_rank(self) -> int:
        return self.place.rank

    def local_rank(self) -> int:
        return self.place.local_rank

    def node_rank(self) -> int:
        return self.place.node_rank

    def set_world_size(self, size: int) -> None:
        assert size == self.place.size

    def set_global_rank(self, rank: int) -> None:
        assert rank == self.place.rank


class OneProcess:
    """The company of a process that is alone: nobody to ask, nobody to wait for."""

    rank, size = 0, 1
    environment: ClusterEnvironment | None = None

    def decide(self, question: Callable[[], T]) -> T:
        return question()

    def has_to_say(self, message: str) -> bool:
        return True

    def end_all(self, message: str) -> None:
        pass

    def explain(self, error: BaseException) -> None:
        pass

    def leave(self) -> None:
        pass


class Company(OneProcess):
    """All processes of a run, seen from one of them. Made by `join`."""

    def __init__(self, place: Place, store: dist.Store, children: list[subprocess.Popen]) -> None:
        self.place, self.rank, self.size = place, place.rank, place.size
        self.environment = PlacesForLightning(place)
        self._store = store
        self._watch = _Watch(place, children)
        self._children = children
        self._watch.start()

    def decide(self, question: Callable[[], T]) -> T:
        """What rank 0 answers, on every rank; a ValueError or OSError of rank 0 is raised on every rank too."""
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = question()
            except (ValueError, OSError) as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0, group=_talk())
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def has_to_say(self, message: str) -> bool:
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

    def end_all(self, message: str) -> None:
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


class _Watch:
    """Two threads: one beats and reads what others say through a store, one sees to it that the first isn't stuck."""

    def __init__(self, place: Place, children: list[subprocess.Popen]) -> None:
        self.place, self.children = place, children
        self.leaving = self.finished = self.ended = False
        self._parent = os.getppid()
        self._store = _connect(place, JOIN_TIMEOUT)  # a connection of its own: a store serves one thread at a time
        self._store.set(f"beat/{place.rank}", "0")
        self._last_beat = time.monotonic()

    def start(self) -> None:
        for work in (self._beat, self._guard):
            threading.Thread(target=work, daemon=True, name="watch").start()

    def tell(self, reason: str) -> None:
        """Ends the run on all other ranks with this reason."""
        self.ended = True
        try:
            self._store.compare_set("ended", "", reason)
            time.sleep(GRACE_SECONDS)
        except RuntimeError:
            return  # the store went with process 0, and the others know it as this one does
        finally:
            self._stop_children()

    def _beat(self) -> None:
        seen: dict[int, tuple[bytes, float]] = {}
        count = 0
        while not (self.finished or self.ended):
            time.sleep(BEAT_SECONDS)
            count += 1
            try:
                self._store.set(f"beat/{self.place.rank}", str(count))
                self._last_beat = time.monotonic()
                if self._store.check(["ended"]) and not self.ended:
                    self._end(self._store.get("ended").decode())
                if self.place.rank == 0 and count % 2 == 0:
                    self._look_at_all(seen)
                self._look_at_family()
            except RuntimeError:
                if not (self.leaving or self.finished):
                    self._end("process 0 is gone: it ended, was killed, or its machine can't be reached")
                return

    def _look_at_all(self, seen: dict[int, tuple[bytes, float]]) -> None:
        """On rank 0: whose beats have stopped?"""
        now = time.monotonic()
        others = [rank for rank in range(1, self.place.size) if not self._store.check([f"done/{rank}"])]
        for rank in others:
            if not self._store.check([f"beat/{rank}"]):
                continue  # it has not come yet; that has a time limit of its own
            beat = self._store.get(f"beat/{rank}")
            if rank not in seen or seen[rank][0] != beat:
                seen[rank] = (beat, now)
            elif now - seen[rank][1] > SILENT_SECONDS:
                self._end(f"process {rank} has given no sign of life for {SILENT_SECONDS:.0f} s")

    def _look_at_family(self) -> None:
        for rank, child in enumerate(self.children, start=self.place.rank + 1):
            code = child.poll()
            if code and not self.finished and not self._store.check([f"done/{rank}"]):
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                self._end(f"process {rank} {how}")
        if os.getppid() != self._parent and not self.leaving:
            self._end("the process that started this one is gone")

    def _guard(self) -> None:
        while not (self.finished or self.leaving or self.ended):
            time.sleep(BEAT_SECONDS)
            if time.monotonic() - self._last_beat > SILENT_SECONDS:
                self._end("process 0 can't be reached")

    def _end(self, reason: str) -> NoReturn:
        if self.leaving and self.place.rank != 0:
            os._exit(0)  # its own part was done
        self.ended = True
        print(
            f"train.py: process {self.place.rank} ends: {reason}. The same command continues the run",
            file=sys.stderr,
            flush=True,
        )
        try:
            self._store.compare_set("ended", "", reason)
            if self.place.rank == 0:
                time.sleep(GRACE_SECONDS)
        except RuntimeError:
            pass  # the store is gone: then the others know already
        self._stop_children()
        os._exit(1)

    def _stop_children(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.kill()


def join(devices: int, num_nodes: int, accelerator: str) -> OneProcess:
    """The company of this process: starts the machine's other processes if no launcher did, and waits until all are there."""
    place = place_from_launcher(os.environ)
    if place is None and devices * num_nodes == 1:
        return OneProcess()
    started_here = place is None
    if place is None:
        place = first_place(os.environ, devices, num_nodes)
    if place.port == 0:
        raise ValueError(
            "MASTER_PORT 0: no process could find the others; name a port (torchrun on one machine: --standalone)"
        )
    # what torchrun would say: for the processes started here, and for libraries that read it
    os.environ.update(_variables(place))
    rank_zero_only.rank = place.rank  # type: ignore[attr-defined]
    children = _start_others(place) if started_here else []
    if accelerator == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_size))
    try:
        store = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))[0]
        company = Company(place, dist.PrefixStore("company", store), children)
        device = torch.device("cuda", place.local_rank) if accelerator == "gpu" else None
        dist.init_process_group(
            "nccl" if accelerator == "gpu" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=place.rank,
            world_size=place.size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device,
        )
        _talk()
    except RuntimeError as error:
        for child in children:
            child.kill()
        raise OSError(
            f"process {place.rank} of {place.size} could not meet the others at {place.address}:{place.port} ({str(error).splitlines()[0]}); "
            "check that every machine was started, and that they reach each other at that address"
        ) from error
    return company


_talking: dist.ProcessGroup | None = None


def _talk() -> dist.ProcessGroup:
    """The group for words instead of tensors: on the CPU, so that nothing waits for a device."""
    global _talking
    if _talking is None:
        _talking = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else dist.group.WORLD
    assert _talking is not None
    return _talking


def _connect(place: Place, timeout: timedelta) -> dist.Store:
    client = dist.TCPStore(
        place.address, place.port, place.size, is_master=False, timeout=timeout, wait_for_workers=False
    )
    return dist.PrefixStore("company", client)


def _variables(place: Place) -> dict[str, str]:
    return {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_size),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
    }


def _start_others(place: Place) -> list[subprocess.Popen]:
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

"""`python train.py --devices N`: torch.distributed's elastic agent starts the ranks, watches them, starts them again.

Ours are the policy (restarts.py), signals that pass on to the ranks, and what torch's agent doesn't see: ranks that are
stopped, and a machine that is cut off.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server import WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from src.errors import UserError
from src.terminal import show
from src.training.console import log, log_error
from src.training.distributed.failure import ROLE, Cause, cause_of, is_supervised
from src.training.distributed.restarts import STOPS, describe, may_restart

MONITOR_SECONDS = 0.5
STOPPED_SECONDS = 20  # a rank that is stopped (SIGSTOP) for so long is killed: torch's agent doesn't see that it stands
JOIN_SECONDS = 600  # for all machines to come: they may boot at different speeds
GRACE_SECONDS = 10  # from SIGTERM to SIGKILL, for ranks that have failed
PARENT_SECONDS = 50  # for a rank to save its state when its agent has been killed
LAUNCHED_AT, ATTEMPT, AGENT = "TRAIN_LAUNCHED_AT", "TRAIN_ATTEMPT", "TRAIN_AGENT"  # variables from agent to rank


@dataclass(frozen=True)
class Launch:
    """How many processes on how many machines, where these meet, and how often they may start again."""

    devices: int
    fewest_nodes: int = 1
    most_nodes: int = 1
    endpoint: str = ""  # HOST:PORT of one of several machines
    max_restarts: int = 0
    dist_timeout: int = 600
    where_it_continues: Callable[[int], str] = lambda step: ""  # what the user is told about a failure in a step


def launch(plan: Launch) -> int:
    """Start this command in every rank of this machine and wait for their end. Returns the exit code of the run."""
    # Without this, the next attempt meets the addresses of the one before in the agent's store, and never connects.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # `Agent` passes the others on
    os.environ[LAUNCHED_AT], os.environ[AGENT] = str(time.monotonic()), str(os.getpid())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    host = plan.endpoint.rpartition(":")[0]
    if plan.endpoint:
        nodes = f"{plan.fewest_nodes} to {plan.most_nodes}" if plan.fewest_nodes < plan.most_nodes else plan.most_nodes
        log(f"note: {nodes} machines meet at {plan.endpoint}; waiting for them for up to {JOIN_SECONDS // 60} minutes")
    with tempfile.TemporaryDirectory(prefix="train-ranks-") as folder:
        try:
            meeting = RendezvousParameters(
                "c10d",
                plan.endpoint or "localhost:0",
                run_id="train",
                min_nodes=plan.fewest_nodes,
                max_nodes=plan.most_nodes,
                local_addr=_address_towards(plan.endpoint) if plan.endpoint else "127.0.0.1",
                is_host=str(not plan.endpoint or _is_local(host)),
                read_timeout=30,
                join_timeout=JOIN_SECONDS,
                last_call_timeout=5,
            )
            spec = WorkerSpec(
                role=ROLE,
                local_world_size=plan.devices,
                entrypoint=sys.executable,
                args=tuple(word.replace("$", "$$") for word in sys.orig_argv[1:]),  # torch expands ${local_rank}
                rdzv_handler=get_rendezvous_handler(meeting),
                max_restarts=plan.max_restarts,
                monitor_interval=MONITOR_SECONDS,
                local_addr=meeting.local_addr,
            )
            return Agent(spec, plan, folder).run_to_end()
        except RendezvousError as error:
            reason = "another machine has ended the run" if isinstance(error, RendezvousClosedError) else str(error)
            log_error(f"the machines don't meet at {plan.endpoint}: {reason}; the same command continues the run")
            return 1


class Agent(LocalElasticAgent):
    """torch's agent, asked after each failure whether the ranks may start again."""

    def __init__(self, spec: WorkerSpec, plan: Launch, folder: str) -> None:
        super().__init__(spec, DefaultLogsSpecs(log_dir=folder))
        self._plan, self._attempt, self._signal = plan, 0, 0
        self._patience = GRACE_SECONDS  # between SIGTERM and SIGKILL
        self._stopped_rounds: Counter[int] = Counter()
        self._reasons: dict[int, str] = {}  # why this agent ended a process, by its number
        self._last: Cause | None = None

    def run_to_end(self) -> int:
        """Run the ranks; returns the exit code."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:  # nohup's SIGHUP stays ignored
                signal.signal(number, self._suspend if number == signal.SIGTSTP else self._pass_on)
        result = self.run(ROLE)
        if not self._signal:  # a machine that leaves an elastic run doesn't end it
            self._rdzv_handler.shutdown()
        if result is not None and not result.is_failed():
            return 0
        code = self._last.exit_code if self._last else 1
        return code if code > 0 else (128 + self._signal if self._signal else 1)

    def _watch_meeting_point(self) -> None:
        """End this machine's part when the place of the meeting can't be reached: torch's calls to it would block."""
        host, _, port = self._plan.endpoint.rpartition(":")
        failed = 0
        while failed < 4:
            time.sleep(10)
            try:
                socket.create_connection((host, int(port)), timeout=5).close()
                failed = 0
            except OSError:
                failed += 1
        log_error(f"{self._plan.endpoint} can't be reached: this machine leaves; the same command joins the run again")
        self._send(signal.SIGKILL)
        os._exit(1)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if self._plan.endpoint and self._attempt == 0:
            threading.Thread(target=self._watch_meeting_point, daemon=True, name="meeting point").start()
        os.environ[ATTEMPT] = str(self._attempt)
        self._attempt += 1
        pids = super()._start_workers(worker_group)
        assert self._pcontext is not None
        close = self._pcontext.close
        # torch's own patience is 30 s whatever the reason: too long for a rank that hangs, too short for one that saves
        setattr(self._pcontext, "close", lambda death_sig=None, timeout=0: close(death_sig, self._patience))  # noqa: B010
        return pids

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state == WorkerState.HEALTHY:
            log_error("a machine joins: all processes save their state and start again with it")
            self._patience = self._plan.dist_timeout  # where a collective hangs, no rank is left after that time
        super()._restart_workers(worker_group)
        self._patience = GRACE_SECONDS

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._end_stopped_ranks()
        result = super()._monitor_workers(worker_group)
        if result.state != WorkerState.FAILED:
            return result
        cause, before = cause_of(result.failures, self._reasons), self._last
        self._last, plan = cause, self._plan
        if plan.fewest_nodes < plan.most_nodes and cause.exit_code in STOPS and not self._signal:
            log_error("a machine joins or leaves: all processes start again")
            self._remaining_restarts += 1  # torch counts this one, too
            return result
        if self._signal or not may_restart(cause, before):
            self._remaining_restarts = 0
        if not self._signal:
            rank = f"rank {cause.rank} of {worker_group.workers[0].world_size} ({socket.gethostname()})"
            where = plan.where_it_continues(cause.step)
            told = describe(cause, before, rank, self._remaining_restarts - 1, plan.max_restarts, where)
            if cause.traceback:
                show(cause.traceback, file=sys.stderr)
            if told:
                log_error(told)
        return result

    def _end_stopped_ranks(self) -> None:
        """Kill ranks that are stopped. Rounds are counted: the clock goes on while the agent itself is stopped."""
        assert self._pcontext is not None
        for pid in self._pcontext.pids().values():
            try:
                is_stopped = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
            except OSError:  # it has ended, or there is no /proc
                continue
            self._stopped_rounds[pid] = self._stopped_rounds[pid] + 1 if is_stopped else 0
            if self._stopped_rounds[pid] * MONITOR_SECONDS > STOPPED_SECONDS:
                self._reasons[pid] = f"was stopped (SIGSTOP) for {STOPPED_SECONDS} s"
                os.kill(pid, signal.SIGKILL)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """A signal for the run: the ranks save their state and end, and none is started again."""
        self._signal = self._signal or number
        if not self._send(number):
            raise SystemExit(128 + number)

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: the ranks, which have sessions of their own, stop and continue with this process."""
        self._send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send(signal.SIGCONT)

    def _send(self, number: int) -> bool:
        """Send a signal to the ranks that run; whether any does."""
        handlers = getattr(self._pcontext, "subprocess_handlers", {}).values()
        running = [handler.proc for handler in handlers if handler.proc.poll() is None]
        for process in running:
            process.send_signal(number)
        return bool(running)


def attempt() -> int:
    """In a rank: how often the ranks of this machine were started before."""
    return max(int(os.environ.get(name, 0)) for name in (ATTEMPT, "TORCHELASTIC_RESTART_COUNT"))


def launch_id() -> str:
    """In a rank of our own agent: the same in all attempts of a command, and in no other command; '' elsewhere."""
    return os.environ[LAUNCHED_AT] if is_supervised(os.environ) else ""


def launched_at() -> float:
    """When the run's command was started, by time.monotonic(): of a rank that was started again, the first time."""
    return float(os.environ[LAUNCHED_AT]) if is_supervised(os.environ) else time.monotonic()


def meeting_point(environment: Mapping[str, str], num_nodes: int) -> str:
    """HOST:PORT of the first of several machines that are started by hand."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set",
            flag="num_nodes",
            given=num_nodes,
            expected="without a launcher, MASTER_ADDR and MASTER_PORT of one of the nodes in the environment of each",
            advice="set them, or start the run with torchrun, srun or deepspeed",
        )
    port = environment["MASTER_PORT"]
    if not (port.isdecimal() and 1 <= int(port) <= 65535):
        raise UserError(f"the environment variable MASTER_PORT is {port!r}", expected="a port, 1 to 65535")
    return f"{environment['MASTER_ADDR']}:{port}"


def watch_parent() -> None:
    """In a rank: when the process that started it has ended, save the state and end as well."""
    parent = int(os.environ.get(AGENT, 0)) if is_supervised(os.environ) else os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        log_error(f"rank {os.environ.get('RANK', 0)} stops: the process that started it has ended")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PARENT_SECONDS)
        os._exit(1)  # the main thread may be in a collective that never returns

    threading.Thread(target=watch, daemon=True, name="parent").start()


def _is_local(host: str) -> bool:
    """Whether an address is one of this machine's."""
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))
        return True
    except OSError:
        return False


def _address_towards(endpoint: str) -> str:
    """This machine's address as the one at HOST:PORT sees it."""
    host, _, port = endpoint.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, int(port)))  # sends nothing
        except OSError as error:
            problem = f"{host} can't be found from {socket.gethostname()} ({error.strerror})"
            raise UserError(problem, flag="rdzv_endpoint", given=endpoint) from None
        return probe.getsockname()[0]

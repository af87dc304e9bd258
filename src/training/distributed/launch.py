"""`python train.py --devices N`: torch.distributed's elastic agent starts the ranks, watches them, starts them again.

Ours are signals that pass on to the ranks, and what torch's agent doesn't see: ranks that are stopped, and a machine
that is cut off. Imported only by the process that starts ranks.
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
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from src.errors import UserError
from src.training.console import log, log_error
from src.training.distributed.failure import cause_of
from src.training.distributed.ranks import AGENT, LAUNCHED_AT, RESTARTED, ROLE
from src.training.distributed.restarts import RestartPolicy

MONITOR_SECONDS = 0.5
STOPPED_SECONDS = 20  # a rank that is stopped (SIGSTOP) for so long is killed: torch's agent doesn't see that it stands
JOIN_SECONDS = 600  # for all machines to come: they may boot at different speeds
GRACE_SECONDS = 10  # from SIGTERM to SIGKILL, for ranks that are left when one has failed; torch's are 30
SAVE_SECONDS = 3600  # the same for ranks that save because a machine joins


def launch(
    devices: int, nodes: tuple[int, int] = (1, 1), endpoint: str = "", policy: RestartPolicy | None = None
) -> int:
    """Start this command in `devices` ranks of this machine and wait for their end. Returns the exit code of the run.

    `nodes`: the fewest and the most machines; they meet at `endpoint`, HOST:PORT of one of several. Raises UserError
    when that can't be found.
    """
    policy = policy or RestartPolicy()
    os.environ.update({LAUNCHED_AT: str(time.monotonic()), AGENT: str(os.getpid())})
    # Without this, the next attempt meets the addresses of the one before in the agent's store, and never connects.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # `Agent` passes the others on
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    meeting_point = endpoint or "127.0.0.1:0"
    address, is_host = _address_here(meeting_point)
    if endpoint:
        count = f"{nodes[0]} to {nodes[1]}" if nodes[0] < nodes[1] else nodes[1]
        log(f"note: {count} machines meet at {endpoint}; waiting for them for up to {JOIN_SECONDS // 60} minutes")
    meeting = RendezvousParameters(
        "c10d", meeting_point, "train", *nodes, address, is_host=str(is_host), read_timeout=30,
        join_timeout=JOIN_SECONDS, last_call_timeout=5,
    )  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(prefix="train-ranks-") as folder:
            spec = WorkerSpec(
                role=ROLE,
                local_world_size=devices,
                entrypoint=sys.executable,
                args=tuple(word.replace("$", "$$") for word in sys.orig_argv[1:]),  # torch expands ${local_rank}
                rdzv_handler=get_rendezvous_handler(meeting),
                max_restarts=policy.max_restarts,
                monitor_interval=MONITOR_SECONDS,
                local_addr=address,
            )
            agent = Agent(spec, policy, folder)
            if endpoint:
                threading.Thread(target=agent.watch, args=(endpoint,), daemon=True, name="meeting point").start()
            return agent.run_to_end()
    except RendezvousError as error:
        reason = "another machine has ended the run" if isinstance(error, RendezvousClosedError) else str(error)
        log_error(f"the machines don't meet at {endpoint}: {reason}; the same command continues the run")
        return 1


class Agent(LocalElasticAgent):
    """torch's agent, which asks a policy after each failure whether the ranks may start again."""

    def __init__(self, spec: WorkerSpec, policy: RestartPolicy, folder: str) -> None:
        super().__init__(spec, DefaultLogsSpecs(log_dir=folder))
        self._policy = policy
        self._stopped_rounds: Counter[int] = Counter()
        self._reasons: dict[int, str] = {}  # why this agent ended a process, by its number

    def run_to_end(self) -> int:
        """Run the ranks; returns the exit code."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:  # nohup's SIGHUP stays ignored
                signal.signal(number, self._suspend if number == signal.SIGTSTP else self._pass_on)
        result = self.run(ROLE)
        if not self._policy.stop_signal:  # a machine that leaves an elastic run doesn't end it
            self._rdzv_handler.shutdown()
        return 0 if result is not None and not result.is_failed() else self._policy.exit_code

    def watch(self, endpoint: str) -> None:
        """End this machine's part when the others can't be reached any more: torch's calls to them would block."""
        failed, was_reached = 0, False
        while failed < 4:
            time.sleep(10)
            try:
                socket.create_connection(parse_rendezvous_endpoint(endpoint, 0), timeout=5).close()
                failed, was_reached = 0, True
            except OSError:
                failed += was_reached
        log_error(f"{endpoint} can't be reached: this machine leaves; the same command joins the run again")
        self._send(signal.SIGKILL)
        os._exit(1)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        pids = super()._start_workers(worker_group)
        os.environ[RESTARTED] = "1"  # for those that are started from now on
        assert self._pcontext is not None
        close = self._pcontext.close
        setattr(self._pcontext, "close", lambda death_sig=None, timeout=GRACE_SECONDS: close(death_sig, timeout))  # noqa: B010
        return pids

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state == WorkerState.HEALTHY and self._pcontext is not None:
            log_error("a machine joins: all processes save their state and start again with it")
            self._pcontext.close(timeout=SAVE_SECONDS)
        super()._restart_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._end_stopped_ranks()
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            cause, ranks = cause_of(result.failures, self._reasons), worker_group.workers[0].world_size
            self._remaining_restarts = self._policy.restarts_left(cause, ranks, self._remaining_restarts)
        return result

    def _end_stopped_ranks(self) -> None:
        """Kill ranks that are stopped. Rounds are counted: the clock goes on while the agent itself is stopped."""
        for pid in (self._pcontext.pids() if self._pcontext else {}).values():
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
        self._policy.stop_signal = self._policy.stop_signal or number
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


def _address_here(endpoint: str) -> tuple[str, bool]:
    """The name of this machine for the others, and whether it is the one at HOST:PORT."""
    host, _ = parse_rendezvous_endpoint(endpoint, 0)
    try:
        family, kind, _, _, there = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(there)  # sends nothing
            here = probe.getsockname()[0]
    except OSError as error:
        problem = f"{host} can't be found from {socket.gethostname()} ({error.strerror})"
        raise UserError(problem, flag="rdzv_endpoint", given=endpoint) from None
    is_host = here == there[0] or here.startswith("127.")  # a machine's own name often stands for 127.0.1.1
    return (host if is_host else here), is_host

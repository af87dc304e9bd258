"""`python train.py --devices N`: torch.distributed's elastic agent starts the ranks, watches them, starts them again.

Ours are signals that pass on to the ranks, and what torch's agent doesn't see: a machine that is cut off. Imported only
by the process that starts ranks.
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
from types import FrameType

from torch.distributed.elastic.agent.server import WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from src.errors import UserError
from src.training.console import log, log_error
from src.training.distributed.failure import cause_of, with_recorded
from src.training.distributed.ranks import AGENT, LAUNCHED_AT, RESTARTED, ROLE
from src.training.distributed.restarts import RestartPolicy

HERE = "127.0.0.1:0"  # the endpoint of a single machine, any free port
JOIN_SECONDS = 600  # for all machines to come: they may boot at different speeds
GRACE_SECONDS = 10  # from SIGTERM to SIGKILL, for ranks that are left when one has failed; torch's are 30
SAVE_SECONDS = 3600  # the same for ranks that save because a machine joins


def launch(devices: int, policy: RestartPolicy, nodes: tuple[int, int] = (1, 1), endpoint: str = HERE) -> int:
    """Start this command in `devices` ranks of this machine and wait for their end. Returns the exit code of the run.

    `nodes`: the fewest and the most machines; they meet at `endpoint`, HOST:PORT of one of several. Raises UserError
    when that can't be found.
    """
    PContext.close.__defaults__ = (None, GRACE_SECONDS)  # of the ranks that are left when one has failed
    os.environ.update({LAUNCHED_AT: str(time.monotonic()), AGENT: str(os.getpid())})
    # Without the first, the next attempt meets the addresses of the one before in the agent's store, and never
    # connects. The signals that the second leaves out are passed on by `Agent`.
    os.environ.update(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", TORCHELASTIC_SIGNALS_TO_HANDLE="SIGQUIT")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    address = _address_here(endpoint)
    is_host = str(address == parse_rendezvous_endpoint(endpoint, 0)[0])
    meeting = RendezvousParameters(
        "c10d", endpoint, "train", *nodes, address, is_host=is_host, read_timeout=30, join_timeout=JOIN_SECONDS,
        last_call_timeout=5,
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
                local_addr=address,
            )
            agent = Agent(spec, policy, folder)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
                # nohup's SIGHUP stays ignored
                if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
                    signal.signal(number, agent.suspend if number == signal.SIGTSTP else agent.pass_on)
            if endpoint != HERE:
                threading.Thread(target=agent.watch, args=(endpoint,), daemon=True, name="meeting point").start()
            result = agent.run(ROLE)
            if not policy.stop_signal:  # a machine that leaves an elastic run doesn't end it
                spec.rdzv_handler.shutdown()
            return 0 if result is not None and not result.is_failed() else policy.exit_code
    except RendezvousError as error:
        reason = "another machine has ended the run" if isinstance(error, RendezvousClosedError) else str(error)
        log_error(f"the machines don't meet at {endpoint}: {reason}; the same command continues the run")
        return 1


class Agent(LocalElasticAgent):
    """torch's agent, which asks a policy after each failure whether the ranks may start again."""

    def __init__(self, spec: WorkerSpec, policy: RestartPolicy, folder: str) -> None:
        super().__init__(spec, DefaultLogsSpecs(log_dir=folder))
        self._policy = policy

    def watch(self, endpoint: str) -> None:
        """End this machine's part when the others can't be reached any more: torch's calls to them would block."""
        log(f"note: the machines meet at {endpoint}; waiting for them for up to {JOIN_SECONDS // 60} minutes")
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

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        os.environ[RESTARTED] = "1"  # for the ranks that are started from now on
        if worker_group.state == WorkerState.HEALTHY and self._pcontext is not None:
            log_error("a machine joins: all processes save their state and start again with it")
            self._pcontext.close(timeout=SAVE_SECONDS)
        if self._policy.stop_signal:  # it came meanwhile
            raise SystemExit(128 + self._policy.stop_signal)
        super()._restart_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            first, files = worker_group.workers[0], getattr(self._pcontext, "error_files", {})
            cause = cause_of(with_recorded(result.failures, files, first.global_rank))
            self._remaining_restarts = self._policy.restarts_left(cause, first.world_size, self._remaining_restarts)
        return result

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """A signal for the run: the ranks save their state and end, and none is started again."""
        self._policy.stop_signal = self._policy.stop_signal or number
        self._send(number)
        if self._worker_group.state != WorkerState.HEALTHY:  # none runs
            raise SystemExit(128 + number)

    def suspend(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: the ranks, which have sessions of their own, stop and continue with this process."""
        self._send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send(signal.SIGCONT)

    def _send(self, number: int) -> None:
        for handler in getattr(self._pcontext, "subprocess_handlers", {}).values():
            handler.proc.send_signal(number)  # nothing happens to one that has ended


def _address_here(endpoint: str) -> str:
    """The name of this machine for the others: HOST if it is the one at HOST:PORT."""
    host, _ = parse_rendezvous_endpoint(endpoint, 0)
    try:
        family, kind, _, _, there = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(there)  # sends nothing
            here = probe.getsockname()[0]
    except OSError as error:
        problem = f"{host} can't be found from {socket.gethostname()} ({error.strerror})"
        raise UserError(problem, flag="rdzv_endpoint", given=endpoint) from None
    # a machine's own name often stands for 127.0.1.1; HOST has other spellings than the address
    return host if here == there[0] or here.startswith("127.") else here

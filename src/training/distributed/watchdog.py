"""Heartbeats between the processes of a run: one that dies, hangs or fails ends all of them, and each prints why."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from src.training.distributed.launch import RankInfo

BEAT_SECONDS = 1.0
# A process counts as dead after this many rounds of another without a heartbeat: far more than a busy process needs.
# Rounds rather than the clock, which goes on while everything is suspended (Ctrl-Z, a suspended job, a paused virtual
# machine).
SILENT_ROUNDS = 40
CONTINUE = "the same command continues the run"  # after a death or a hang, but not after a mistake of the user
GRACE_SECONDS = 4.0  # for the other ranks to read the reason before the store that carries it goes away


class Watchdog:
    """Two threads: one sends heartbeats and reads those of others through a store, one checks that the first isn't
    stuck."""

    def __init__(self, info: RankInfo, children: list[subprocess.Popen], timeout: timedelta) -> None:
        """`children` are the processes that this one started; `timeout` is for rank 0 to appear."""
        self.info, self.children = info, children
        # leaving: this rank's part is done; finished: all of the run is; ended: it failed, and the reason is published
        self.leaving = self.finished = self.ended = False
        self._parent = os.getppid()
        self._store = _connect(info, timeout)  # a connection of its own: a store serves one thread at a time
        self._store.set(f"beat/{info.rank}", "0")
        self._beats = 0

    def start(self) -> None:
        for target in (self._send_heartbeats, self._check_heartbeat_thread):
            threading.Thread(target=target, daemon=True, name="watchdog").start()

    def mark_done(self) -> None:
        """Tell the other ranks that this one leaves a run that ended well: its heartbeats may stop, its exit code is
        right.

        Raises RuntimeError when the store is gone.
        """
        self.leaving = True
        self._store.set(f"done/{self.info.rank}", "1")

    def is_done(self, rank: int) -> bool:
        """Whether a rank has called `mark_done`."""
        return self._store.check([f"done/{rank}"])

    def publish_failure(self, reason: str) -> None:
        """End the run on all other ranks with this reason."""
        self.ended = True
        try:
            self._store.compare_set("ended", "", reason)
            time.sleep(GRACE_SECONDS)
        except RuntimeError:
            return  # the store ended with rank 0, which the others notice by themselves
        finally:
            self._kill_children()

    def _send_heartbeats(self) -> None:
        seen: dict[int, tuple[bytes, int]] = {}
        while not (self.finished or self.ended):
            time.sleep(BEAT_SECONDS)
            try:
                self._store.set(f"beat/{self.info.rank}", str(self._beats + 1))
                self._beats += 1
                if self._store.check(["ended"]) and not self.ended:
                    self._exit(self._store.get("ended").decode())
                if self.info.rank == 0 and self._beats % 2 == 0:
                    self._check_ranks(seen)
                self._check_children_and_parent()
            except RuntimeError:
                if not (self.leaving or self.finished):
                    self._exit(f"rank 0 has ended, was killed, or its machine can't be reached; {CONTINUE}")
                return

    def _check_ranks(self, seen: dict[int, tuple[bytes, int]]) -> None:
        """On rank 0: end the run when a rank's heartbeats stop. `seen`: each rank's last beat, and the own number
        then."""
        for rank in range(1, self.info.world_size):
            if self.is_done(rank) or not self._store.check([f"beat/{rank}"]):
                continue  # done, or not there yet: joining has a time limit of its own
            beat = self._store.get(f"beat/{rank}")
            if rank not in seen or seen[rank][0] != beat:
                seen[rank] = (beat, self._beats)
            elif self._beats - seen[rank][1] > SILENT_ROUNDS:
                self._exit(f"rank {rank} has not responded for {SILENT_ROUNDS * BEAT_SECONDS:.0f} s; {CONTINUE}")

    def _check_children_and_parent(self) -> None:
        for rank, child in enumerate(self.children, start=self.info.rank + 1):
            code = child.poll()
            if code and not self.finished and not self.is_done(rank):
                end = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
                self._exit(f"rank {rank} {end}; {CONTINUE}")
        if os.getppid() != self._parent and not self.leaving:
            self._exit(f"the process that started this one has ended; {CONTINUE}")

    def _check_heartbeat_thread(self) -> None:
        """The store's calls may block for hours when rank 0's machine vanishes: then this rank's own beats stand
        still."""
        beats = rounds = 0
        while not (self.finished or self.leaving or self.ended):
            time.sleep(BEAT_SECONDS)
            beats, rounds = self._beats, (rounds + 1 if self._beats == beats else 0)
            if rounds > SILENT_ROUNDS:
                self._exit(f"rank 0 can't be reached; {CONTINUE}")

    def _exit(self, reason: str) -> NoReturn:
        if self.leaving and self.info.rank != 0:
            os._exit(0)  # this rank's part was done
        self.ended = True
        print(f"train.py: rank {self.info.rank} stops: {reason}", file=sys.stderr, flush=True)
        try:
            self._store.compare_set("ended", "", reason)
            if self.info.rank == 0:
                time.sleep(GRACE_SECONDS)
        except RuntimeError:
            pass  # the store is gone: then the other ranks have noticed already
        self._kill_children()
        os._exit(1)  # the main thread may be blocked in a collective that never returns

    def _kill_children(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.kill()


def _connect(info: RankInfo, timeout: timedelta) -> dist.Store:
    client = dist.TCPStore(
        info.master_addr, info.master_port, info.world_size, is_master=False, timeout=timeout, wait_for_workers=False
    )
    return dist.PrefixStore("watchdog", client)

"""Each process of a run watches over the others: one that dies, hangs or fails ends all of them, and every process says why."""

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
# Without a beat in so many rounds of another, a process counts as dead: seconds, far more than a busy one needs. Rounds, not the clock, which
# goes on while everything stands still (Ctrl-Z, a suspended job, a paused machine).
SILENT_ROUNDS = 40
GRACE_SECONDS = 4.0  # for the others to read why


class Watch:
    """Two threads: one beats and reads what others say through a store, one sees to it that the first isn't stuck."""

    def __init__(self, place: RankInfo, children: list[subprocess.Popen], timeout: timedelta) -> None:
        """`children` are the processes that this one started; `timeout` is for process 0 to be there."""
        self.place, self.children = place, children
        self.leaving = self.finished = self.ended = False
        self._parent = os.getppid()
        self._store = _connect(place, timeout)  # a connection of its own: a store serves one thread at a time
        self._store.set(f"beat/{place.rank}", "0")
        self._beats = 0

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
        seen: dict[int, tuple[bytes, int]] = {}
        while not (self.finished or self.ended):
            time.sleep(BEAT_SECONDS)
            try:
                self._store.set(f"beat/{self.place.rank}", str(self._beats + 1))
                self._beats += 1
                if self._store.check(["ended"]) and not self.ended:
                    self._end(self._store.get("ended").decode())
                if self.place.rank == 0 and self._beats % 2 == 0:
                    self._look_at_all(seen)
                self._look_at_family()
            except RuntimeError:
                if not (self.leaving or self.finished):
                    self._end("process 0 is gone: it ended, was killed, or its machine can't be reached")
                return

    def _look_at_all(self, seen: dict[int, tuple[bytes, int]]) -> None:
        """On rank 0: whose beats have stopped? `seen`: the last beat of each rank, and this process's own number then."""
        others = [rank for rank in range(1, self.place.size) if not self._store.check([f"done/{rank}"])]
        for rank in others:
            if not self._store.check([f"beat/{rank}"]):
                continue  # it has not come yet; that has a time limit of its own
            beat = self._store.get(f"beat/{rank}")
            if rank not in seen or seen[rank][0] != beat:
                seen[rank] = (beat, self._beats)
            elif self._beats - seen[rank][1] > SILENT_ROUNDS:
                self._end(f"process {rank} has given no sign of life for {SILENT_ROUNDS * BEAT_SECONDS:.0f} s")

    def _look_at_family(self) -> None:
        for rank, child in enumerate(self.children, start=self.place.rank + 1):
            code = child.poll()
            if code and not self.finished and not self._store.check([f"done/{rank}"]):
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                self._end(f"process {rank} {how}")
        if os.getppid() != self._parent and not self.leaving:
            self._end("the process that started this one is gone")

    def _guard(self) -> None:
        beats = rounds = 0
        while not (self.finished or self.leaving or self.ended):
            time.sleep(BEAT_SECONDS)
            beats, rounds = self._beats, (rounds + 1 if self._beats == beats else 0)
            if rounds > SILENT_ROUNDS:
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


def _connect(place: RankInfo, timeout: timedelta) -> dist.Store:
    client = dist.TCPStore(
        place.address, place.port, place.size, is_master=False, timeout=timeout, wait_for_workers=False
    )
    return dist.PrefixStore("process_group", client)

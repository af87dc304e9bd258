"""How long the watchdog waits for another process: it counts its own rounds, so a clock that jumps ends no run."""

import pytest

from src.training.distributed import watchdog
from src.training.distributed.launch import RankInfo


class ExitCalled(Exception):
    """Replaces the end of the process."""


class FakeClock:
    """Replaces the module `time`: sleeping takes no time, and the clock jumps once, as after a suspended process."""

    def __init__(self, jumps_in_round):
        self.now, self.rounds, self.jumps_in_round = 0.0, 0, jumps_in_round

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.rounds += 1
        self.now += 3600 if self.rounds == self.jumps_in_round else seconds


class FakeStore(dict):
    """The store as rank 0 sees it; rank 1 sends heartbeats in some rounds only."""

    def __init__(self, clock, rounds_with_heartbeat):
        super().__init__()
        self.clock, self.rounds_with_heartbeat = clock, rounds_with_heartbeat

    def set(self, name, value):
        self[name] = value.encode()
        if self.clock.rounds in self.rounds_with_heartbeat:
            self["beat/1"] = str(self.clock.rounds).encode()

    def get(self, name):
        return self[name]

    def check(self, names):
        return all(name in self for name in names)


def watchdog_of_rank_zero(monkeypatch, jumps_in_round, rounds_with_heartbeat=()):
    clock = FakeClock(jumps_in_round)
    monkeypatch.setattr(watchdog, "_connect", lambda info, timeout: FakeStore(clock, rounds_with_heartbeat))
    monkeypatch.setattr(watchdog, "time", clock)

    def exit_process(self, reason):
        raise ExitCalled(reason)

    monkeypatch.setattr(watchdog.Watchdog, "_exit", exit_process)
    return watchdog.Watchdog(RankInfo(0, 2, 0, 2, "127.0.0.1", 1), [], None), clock


@pytest.mark.parametrize("jumps_in_round", [0, 30])
def test_missing_heartbeats_are_counted_in_rounds(monkeypatch, jumps_in_round):
    watcher, clock = watchdog_of_rank_zero(monkeypatch, jumps_in_round, rounds_with_heartbeat=range(11))
    with pytest.raises(ExitCalled, match="rank 1 has not responded for 40 s"):
        watcher._send_heartbeats()
    assert 50 <= clock.rounds <= 53
    assert clock.now > clock.rounds or not jumps_in_round


@pytest.mark.parametrize("jumps_in_round", [0, 5])
def test_a_blocked_heartbeat_thread_is_detected_by_rounds(monkeypatch, jumps_in_round):
    watcher, clock = watchdog_of_rank_zero(monkeypatch, jumps_in_round)
    with pytest.raises(ExitCalled, match="rank 0 can't be reached"):
        watcher._check_heartbeat_thread()
    assert 40 <= clock.rounds <= 42

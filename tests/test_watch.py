"""How long a silence of other processes may last: by the watcher's own rounds, whatever the clock says meanwhile."""

import pytest

from src.training.distributed import watchdog
from src.training.distributed.launch import RankInfo


class Ended(Exception):
    pass


class Clock:
    """Stands for the module `time`: nobody waits, and the clock jumps once, as it does for a process that stood still."""

    def __init__(self, jumps_in_round):
        self.now, self.rounds, self.jumps_in_round = 0.0, 0, jumps_in_round

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.rounds += 1
        self.now += 3600 if self.rounds == self.jumps_in_round else seconds


class Store(dict):
    """What process 0 sees of one other, which beats in some rounds."""

    def __init__(self, clock, beats_in):
        super().__init__()
        self.clock, self.beats_in = clock, beats_in

    def set(self, name, value):
        self[name] = value.encode()
        if self.clock.rounds in self.beats_in:
            self["beat/1"] = str(self.clock.rounds).encode()

    def get(self, name):
        return self[name]

    def check(self, names):
        return all(name in self for name in names)


def watcher(monkeypatch, jumps_in_round, beats_in=()):
    clock = Clock(jumps_in_round)
    monkeypatch.setattr(watchdog, "_connect", lambda place, timeout: Store(clock, beats_in))
    monkeypatch.setattr(watchdog, "time", clock)
    one = watchdog.Watch(RankInfo(0, 2, 0, 2, "127.0.0.1", 1), [], None)

    def end(reason):
        raise Ended(reason)

    one._end = end
    return one, clock


@pytest.mark.parametrize("jumps_in_round", [0, 30])
def test_silence_is_counted_in_rounds(monkeypatch, jumps_in_round):
    one, clock = watcher(monkeypatch, jumps_in_round, beats_in=range(11))
    with pytest.raises(Ended, match="process 1 has given no sign of life for 40 s"):
        one._beat()
    assert 50 <= clock.rounds <= 53
    assert clock.now > clock.rounds or not jumps_in_round


@pytest.mark.parametrize("jumps_in_round", [0, 5])
def test_a_watcher_that_is_stuck_is_found_by_rounds(monkeypatch, jumps_in_round):
    one, clock = watcher(monkeypatch, jumps_in_round)
    with pytest.raises(Ended, match="process 0 can't be reached"):
        one._guard()
    assert 40 <= clock.rounds <= 42

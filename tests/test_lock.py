"""The lock lets one process in at a time, also when its file is deleted by the one who leaves; without locks it says so and goes on."""

import errno
import fcntl
import multiprocessing
from pathlib import Path

import pytest

from src.dataset.lock import only_one


def count_up(lock: Path, counter: Path, times: int) -> None:
    for _ in range(times):
        with only_one(lock, wait=True):
            counter.write_text(str(int(counter.read_text()) + 1))
            lock.unlink()


def test_no_two_at_once(tmp_path: Path) -> None:
    lock, counter = tmp_path / "lock", tmp_path / "counter"
    counter.write_text("0")
    spawned = [
        multiprocessing.get_context("fork").Process(target=count_up, args=(lock, counter, 100)) for _ in range(3)
    ]
    for process in spawned:
        process.start()
    for process in spawned:
        process.join(60)
        assert process.exitcode == 0
    assert counter.read_text() == "300"


def test_without_waiting(tmp_path: Path) -> None:
    lock = tmp_path / "new" / "lock"
    with only_one(lock, wait=False), pytest.raises(BlockingIOError), only_one(lock, wait=False):
        pass
    with only_one(lock, wait=False):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_a_file_system_without_locks_is_told_and_no_obstacle(tmp_path: Path, monkeypatch, number: int) -> None:
    def refuse(*_):
        raise OSError(number, "not here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.warns(UserWarning, match=f"{tmp_path} is on a file system without locks") as told,
        only_one(tmp_path / "lock", wait=False),
    ):
        pass
    assert len(told) == 1


def test_another_failure_is_not_taken_for_missing_locks(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_):
        raise OSError(errno.EIO, "disk on fire")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="on fire"), only_one(tmp_path / "lock", wait=False):
        pass

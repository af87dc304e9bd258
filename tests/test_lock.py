"""`file_lock`: one process at a time, also when a holder deletes the file; a warning on file systems without locks."""

import errno
import fcntl
import multiprocessing
import warnings
from pathlib import Path

import pytest

from src.files import file_lock


def increment(lock: Path, counter: Path, times: int) -> None:
    for _ in range(times):
        with file_lock(lock, wait=True):
            counter.write_text(str(int(counter.read_text()) + 1))
            lock.unlink()


def test_one_process_at_a_time_although_holders_delete_the_file(tmp_path: Path) -> None:
    lock, counter = tmp_path / "lock", tmp_path / "counter"
    counter.write_text("0")
    processes = [
        multiprocessing.get_context("fork").Process(target=increment, args=(lock, counter, 100)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert counter.read_text() == "300"


def test_a_held_lock_raises_without_waiting(tmp_path: Path) -> None:
    lock = tmp_path / "new" / "lock"
    with file_lock(lock, wait=False) as held, pytest.raises(BlockingIOError), file_lock(lock, wait=False):
        pass
    assert held
    with file_lock(lock, wait=False) as held:
        assert held


def fail_with(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, "flock failed")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_a_file_system_without_locks_warns_once_and_continues(tmp_path: Path, monkeypatch, number: int) -> None:
    fail_with(number, monkeypatch)
    with pytest.warns(UserWarning, match=str(tmp_path)) as warned, file_lock(tmp_path / "lock", wait=False) as held:
        assert not held
    assert len(warned) == 1
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with file_lock(tmp_path / "lock", wait=False, warn=False) as held:
            assert not held


def test_another_failure_of_flock_is_raised(tmp_path: Path, monkeypatch) -> None:
    fail_with(errno.EIO, monkeypatch)
    with pytest.raises(OSError, match="flock failed") as failure, file_lock(tmp_path / "lock", wait=False):
        pass
    assert failure.value.errno == errno.EIO

"""Real file systems that are full or read-only, mounted for one process tree where the rights for it exist."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from training_runs import CTX, ROOT, flags, losses, newest_state, train, verified

from src.training.checkpoint.storage import state_folders

RUN = {"my_exit_tokens": CTX * 4 * 40, "epoch_steps": 10, "epoch_save": 1}


def may_mount():
    probe = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs "$0"', str(ROOT / "tests")]
    return shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not may_mount(), reason="no right to mount a file system here")


def train_in_a_mount(mount, folder, argv, afterwards=":"):
    """train.py with `argv`, where $0 (`folder`) is what `mount` makes of it; `afterwards` while it is still so."""
    script = f'{mount} && {{ "$@"; code=$?; {afterwards}; exit $code; }}'
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", script, str(folder), sys.executable, "train.py", *argv],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=200,
    )  # fmt: skip


def test_a_full_disk_stops_the_run_loudly_and_what_was_saved_continues(tmp_path, data):
    """Every state is kept, and five of them fill the disk."""
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    argv = flags(small / "run", data, save_minutes=1e-6, keep_resume=100, **RUN)
    done = train_in_a_mount('mount -t tmpfs -o size=4m tmpfs "$0"', small, argv, f'cp -r "$0/run" "{kept}"')
    assert done.returncode == 1, done.stdout + done.stderr
    assert "No space left on device" in done.stderr
    assert "the same command" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(state_folders(kept)) >= 2
    for state in state_folders(kept):
        verified(state)
    reached = newest_state(kept)
    assert 2 <= reached.position.step < 40
    assert train(kept, data, **RUN) == 0
    assert train(tmp_path / "whole", data, **RUN) == 0
    one, two = (torch.load(path / "rwkv-final.pth") for path in (kept, tmp_path / "whole"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert losses(kept) == losses(tmp_path / "whole")


def test_a_read_only_folder_is_refused_before_the_start(tmp_path, data):
    folder = tmp_path / "run"
    folder.mkdir()
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0"'
    done = train_in_a_mount(mount, folder, flags(folder, data, **RUN))
    assert done.returncode == 2
    assert f"--proj_dir {folder}: can't be written (Read-only file system)" in done.stderr
    assert "Traceback" not in done.stderr

"""Real file systems that are full or read-only, mounted for one process tree where the rights for it exist."""

import atexit
import ctypes
import os
import shutil
import subprocess
from functools import partial

import pytest
import torch
from training_runs import CTX, PIPE, ROOT, flags, losses, newest_state, train, train_process, verified, without_figures

from src.training.checkpoint.storage import state_folders

RUN = {"my_exit_tokens": CTX * 4 * 40, "epoch_steps": 10, "epoch_save": 1}


def may_mount():
    probe = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs "$0"', str(ROOT / "tests")]
    return shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not may_mount(), reason="no right to mount a file system here")
CLONE_NEWNS = 0x00020000  # <linux/sched.h>


def mounted(command, folder, kept):
    """In a new process, before its program: a mount namespace of its own, where `folder` ($0) is what `command` makes
    of it. At the end of the program what is in it is copied to `kept`."""
    assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
    subprocess.run(["sh", "-c", f"mount --make-rprivate / && {command}", str(folder)], check=True)
    if kept:
        atexit.register(shutil.copytree, folder, kept)
    without_figures()


def train_in_a_mount(command, folder, argv, kept=None):
    prepare = partial(mounted, command, folder, kept)
    process = train_process(argv, stderr=PIPE, preexec_fn=prepare)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def test_a_full_disk_stops_the_run_loudly_and_what_was_saved_continues(tmp_path, data):
    """Every state is kept, and five of them fill the disk."""
    small, kept = tmp_path / "small", tmp_path / "copy" / "run"
    small.mkdir()
    argv = flags(small / "run", data, save_minutes=1e-6, keep_resume=100, **RUN)
    code, out, err = train_in_a_mount('mount -t tmpfs -o size=4m tmpfs "$0"', small, argv, kept.parent)
    assert code == 1, out + err
    assert "No space left on device" in err
    assert "the same command" in err
    assert "Traceback" not in err
    assert not any(small.iterdir())  # it was in the mount
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
    code, out, err = train_in_a_mount(mount, folder, flags(folder, data, **RUN))
    assert code == 2, out
    assert f"--proj_dir {folder}: can't be written (Read-only file system)" in err
    assert "Traceback" not in err

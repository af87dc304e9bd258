"""Safetensors files are whole, synced and have the umask's mode, whatever the library does beneath."""

import os
import stat

import pytest
import torch
from random_model import random_model
from safetensors.torch import load_file

from src.inference.export import main
from src.model.safetensors_file import write_safetensors


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_the_file_is_synced_and_has_the_mode_of_a_new_file(tmp_path, monkeypatch, umask):
    synced = set()
    fsync = os.fsync

    def record(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    before = os.umask(umask)
    try:
        write_safetensors({"x": torch.arange(6.0).view(2, 3).t()}, tmp_path / "a.safetensors", {"format": "pt"})
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o666 & ~umask
    assert {(tmp_path / "a.safetensors").stat().st_ino, tmp_path.stat().st_ino} <= synced
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.arange(6.0).view(2, 3).t())


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    import safetensors.torch

    write_safetensors({"x": torch.ones(3)}, tmp_path / "a.st")

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_safetensors({"x": torch.zeros(3)}, tmp_path / "a.st")
    assert [path.name for path in tmp_path.iterdir()] == ["a.st"]
    assert torch.equal(load_file(tmp_path / "a.st")["x"], torch.ones(3))


@pytest.mark.parametrize("out", ["out.safetensors", "fla", "hf", "out.st"])
def test_exports_are_written_by_it(tmp_path, out, synced):
    torch.save(random_model(n_layer=2).state_dict(), tmp_path / "model.pth")
    format = {"fla": ["--format", "fla"], "hf": ["--format", "hf"]}.get(out, [])
    assert main([str(tmp_path / "model.pth"), str(tmp_path / out), *format]) == 0
    assert synced.events[-1] == ("folder", tmp_path / out if format else tmp_path)  # the names of what was moved there
    files = [*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("*.st")]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [
        stat.S_IMODE((tmp_path / "model.pth").stat().st_mode)
    ]

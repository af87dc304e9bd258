"""Fixtures that several test files share; helpers that are plain functions are in training_runs.py."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from src.dataset.binidx import BinIdxWriter


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6,000 tokens of a language that can be learned: each document counts upwards from a random number."""
    prefix = tmp_path_factory.mktemp("data") / "count"
    numbers = np.random.default_rng(0)
    with BinIdxWriter(prefix, np.uint16) as writer:
        for _ in range(200):
            first = int(numbers.integers(1, 30))
            writer.add_document([first + i for i in range(29)] + [0])
    return prefix


class Synced:
    """What was flushed to the disk and renamed, in order: (operation, path)."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Path]] = []

    def index(self, operation: str, path: Path) -> int:
        """The place of the last such event."""
        return max(i for i, event in enumerate(self.events) if event == (operation, path))

    def files(self, before: int | None = None, after: int = -1) -> list[Path]:
        return [path for kind, path in self.events[after + 1 : before] if kind == "file"]

    def folders(self, before: int | None = None, after: int = -1) -> list[Path]:
        return [path for kind, path in self.events[after + 1 : before] if kind == "folder"]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> Synced:
    """Records each fsync of a file or folder, and each rename under its new name, from all threads."""
    record = Synced()
    fsync, renames = os.fsync, {name: getattr(os, name) for name in ("rename", "replace")}

    def recording_fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        fsync(descriptor)
        record.events.append((kind, Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def recording(name: str):
        def rename(source, target, **kwargs) -> None:
            renames[name](source, target, **kwargs)
            record.events.append(("rename", Path(target)))

        return rename

    monkeypatch.setattr(os, "fsync", recording_fsync)
    for name in renames:
        monkeypatch.setattr(os, name, recording(name))
    return record

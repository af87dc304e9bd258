"""Fixtures that several test files share; helpers that are plain functions are in training_runs.py."""

import gc
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import HealthCheck

from src.dataset.binidx import BinIdxWriter

# An example takes as long as a busy machine lets it, and all of them may share a folder.
hypothesis.settings.register_profile(
    "tests", hypothesis.settings(), deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
hypothesis.settings.load_profile("tests")


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


def pytest_collection_finish() -> None:
    """Garbage collections, one or two in each fit, go over what was made since: not over all modules again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_figures() -> Iterator[None]:
    """Runs of train.py in this process end without drawing figures, which takes longer than the run."""
    with pytest.MonkeyPatch.context() as patch:
        if training_run := sys.modules.get("src.training.training_run"):
            patch.setattr(training_run, "write_loss_figure", lambda run, path: path)
            patch.setattr(training_run, "write_report", lambda run: run / "report.html")
        yield


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of train.py in this process draw their figures."""
    from src.training import training_run
    from src.training.figures.loss_figure import write_loss_figure
    from src.training.figures.report_page import write_report

    monkeypatch.setattr(training_run, "write_loss_figure", write_loss_figure)
    monkeypatch.setattr(training_run, "write_report", write_report)


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


def can_create_network_namespaces() -> bool:
    return (
        bool(shutil.which("ip"))
        and subprocess.run(["ip", "netns", "add", "rwkv-probe"], capture_output=True).returncode == 0
    )


@pytest.fixture
def two_machines() -> Iterator[list[str]]:
    """Two network namespaces joined by a virtual cable: each sees the other as it would see another machine."""
    if not can_create_network_namespaces():
        pytest.skip("no permission to create network namespaces")
    tag = f"rwkv{os.getpid() % 10000}"
    names = [f"{tag}a", f"{tag}b"]
    commands = [
        "ip netns delete rwkv-probe",
        *(f"ip netns add {name}" for name in names),
        f"ip link add {names[0]} type veth peer name {names[1]}",
        *(f"ip link set {name} netns {name}" for name in names),
        *(f"ip -n {name} addr add 10.77.0.{i}/24 dev {name}" for i, name in enumerate(names, start=1)),
        *(f"ip -n {name} addr add fd77::{i}/64 dev {name} nodad" for i, name in enumerate(names, start=1)),
        *(f"ip -n {name} link set {device} up" for name in names for device in (name, "lo")),
    ]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{command}: {done.stderr}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

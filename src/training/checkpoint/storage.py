"""The full state of a run on disk: a folder that appears whole or not at all, and is believed only when its checksums agree.

    proj_dir/resume/step-00000120/
        tensors-0000.safetensors ...   fp32 weights and moments by parameter name, in shards
        state.json                     position, counters, settings
        manifest.json                  SHA-256 and size of each file, written last

Everything is written to a folder beside, flushed to the disk and renamed; then older states are removed, but for the last few.
Writing happens in a thread, from copies, while training goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from src.files import sha256_of, sync_folder

FOLDER = "resume"
STATE_BYTES = 12  # of a parameter: fp32 weight and two moments
SHARD_BYTES = (
    1 << 30
)  # a save holds up to four in CPU memory: being filled, waiting, being written, and that one's bytes
Tensors = dict[str, Tensor]


@dataclass
class Position:
    """Where a run is between two steps: all numbers, because the order of the data is a pure function of the sample number."""

    step: int  # steps taken
    samples: int  # samples read
    unit: int  # samples of a mini-epoch
    restarted_at_sample: int = 0  # where a fresh optimizer began on trained weights, for the warm-up; 0: never
    mini_epoch_losses: list[float] = field(default_factory=list)  # of the steps since the last mini-epoch's end
    skipped_samples: list[tuple[int, int]] = field(default_factory=list)  # samples left out for good: (first, count)
    weights_written: bool = False  # whether there was a rwkv-N.pth already


class DamagedState(Exception):
    """A state on disk that is not what was written; the text says what is wrong with it."""


def states(proj_dir: Path) -> list[Path]:
    """The folders of saved states, newest first."""
    found = [path for path in (proj_dir / FOLDER).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def verify(folder: Path) -> None:
    """Raises DamagedState unless every file of the manifest is there with its size and SHA-256."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        entries = {str(name): (int(e["bytes"]), str(e["sha256"])) for name, e in manifest["files"].items()}
    except FileNotFoundError:
        raise DamagedState("manifest.json is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedState(f"manifest.json can't be read ({error})") from error
    if "state.json" not in entries:
        raise DamagedState("manifest.json names no state.json")
    for name, (size, sha256) in entries.items():
        path = folder / name
        if not path.is_file():
            raise DamagedState(f"{name} is missing")
        if path.stat().st_size != size:
            raise DamagedState(f"{name} has {path.stat().st_size} bytes instead of {size}")
        if sha256_of(path) != sha256:
            raise DamagedState(f"{name} is not what was written (its SHA-256 differs)")


@dataclass
class LoadedState:
    """A verified state: what state.json says, and its tensors, read shard by shard."""

    folder: Path
    position: Position
    settings: dict[str, Any]
    counters: dict[str, Any]
    saved_at: float

    def tensors(self) -> Iterator[Tensors]:
        """Shard by shard; names are `parameter/kind`, kind one of master, exp_avg, exp_avg_sq."""
        for path in sorted(self.folder.glob("tensors-*.safetensors")):
            yield load_file(path)


def newest_good(proj_dir: Path, only_look: bool = False) -> tuple[LoadedState | None, list[str]]:
    """The newest state that is whole, and what was wrong with those after it, which step aside unless this only looks."""
    complaints = []
    for folder in states(proj_dir):
        try:
            verify(folder)
        except DamagedState as error:
            moved = "" if only_look else f"; it is now {_put_aside(folder).name}"
            complaints.append(f"the saved state {folder} is damaged: {error}{moved}, taking the one before")
            continue
        return _read(folder), complaints
    return None, complaints


def _put_aside(folder: Path) -> Path:
    """Out of the way, or it would count among those that are kept; beside damaged ones of the same step."""
    aside, k = folder.with_name(f"damaged-{folder.name}"), 1
    while aside.exists():
        k += 1
        aside = folder.with_name(f"damaged-{folder.name}-{k}")
    return folder.rename(aside)


def _read(folder: Path) -> LoadedState:
    told = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    known = {number.name for number in fields(Position)}  # other versions of the program may have others
    position = Position(**{name: value for name, value in told["position"].items() if name in known})
    if "weights_written" not in told["position"]:  # of an earlier version
        position.weights_written = position.samples >= position.unit
    position.skipped_samples = [(int(first), int(count)) for first, count in position.skipped_samples]
    return LoadedState(folder, position, told["settings"], told["counters"], told["saved_at"])


class StateWriter:
    """Writes states in a thread, one at a time. A write that fails is tried once more; then the next call here raises OSError."""

    def __init__(self, proj_dir: Path, keep: int, guess: float = 0.0) -> None:
        """`guess`: the seconds that a save may take, as long as none was seen."""
        self.root, self.keep, self._guess = proj_dir / FOLDER, keep, guess
        self._tasks: queue.Queue[tuple[str, Any] | None] = queue.Queue(maxsize=1)
        self._failure: OSError | None = None
        self._thread: threading.Thread | None = None
        self._slowest = 0.0

    @property
    def slowest(self) -> float:
        """Seconds of the slowest save so far, from its begin until it was on the disk; a guess before the first."""
        return self._slowest or self._guess

    def write(
        self,
        position: Position,
        settings: dict[str, Any],
        counters: dict[str, Any],
        tensors: Iterable[tuple[str, Tensor]],
    ) -> None:
        """Begin to save. Returns when every tensor is copied (or handed over, for shards beyond the first two)."""
        self.wait()
        self._thread = threading.Thread(target=self._work, args=(position.step,), daemon=True, name="state-writer")
        self._thread.start()
        shard: Tensors = {}
        size = 0
        for name, tensor in tensors:
            shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
            size += shard[name].numel() * shard[name].element_size()
            if size >= SHARD_BYTES:
                self._tasks.put(("shard", shard))
                shard, size = {}, 0
        if shard:
            self._tasks.put(("shard", shard))
        told = {"position": asdict(position), "settings": settings, "counters": counters, "saved_at": time.time()}
        self._tasks.put(("state", told))

    def wait(self) -> None:
        """Until the save under way is on the disk. Raises the OSError of one that failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raises the OSError of a save that failed, once."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _work(self, step: int) -> None:
        beside = self.root / f".step-{step:08d}.{os.getpid()}.tmp"
        files: dict[str, dict[str, Any]] = {}
        failed, begin = False, time.monotonic()
        while True:
            kind, content = self._tasks.get()  # type: ignore[misc]
            if not failed:
                try:
                    if not files:
                        shutil.rmtree(beside, ignore_errors=True)
                        beside.mkdir(parents=True)
                    name = "state.json" if kind == "state" else f"tensors-{len(files):04d}.safetensors"
                    data = json.dumps(content, indent=1).encode() if kind == "state" else save(content)
                    _write_twice(beside / name, data)
                    files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                    if kind == "state":
                        _write_twice(beside / "manifest.json", json.dumps({"files": files}, indent=1).encode())
                        self._publish(beside, step)
                        self._slowest = max(self._slowest, time.monotonic() - begin)
                except Exception as error:  # whatever it is, the run has to hear of it, and the queue has to be emptied
                    failed = True
                    self._failure = OSError(
                        f"the state of the run could not be saved under {self.root}: {error}. The states saved before are whole; "
                        "free some space or mend the folder and run the same command again: it continues from the newest"
                    )
                    shutil.rmtree(beside, ignore_errors=True)
            if kind == "state":
                return

    def _publish(self, beside: Path, step: int) -> None:
        sync_folder(beside)
        final = self.root / f"step-{step:08d}"
        replaced = self.root / f".step-{step:08d}.replaced.tmp"
        if final.exists():  # the same step saved again: the new one takes its place
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        beside.rename(final)
        sync_folder(self.root)
        shutil.rmtree(replaced, ignore_errors=True)
        for old in states(self.root.parent)[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)


def _write_twice(path: Path, data: bytes) -> None:
    for last_try in (False, True):
        try:
            with open(path, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            return
        except OSError:
            if last_try:
                raise
            path.unlink(missing_ok=True)
            time.sleep(1.0)

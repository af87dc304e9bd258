"""Full states on disk: folders that appear as a whole, and whose checksums are verified while they are read.

    proj_dir/resume/step-00000120/
        rank0-0000.safetensors ...   tensors that rank 0 wrote, in shards
        state.json                   the rest: position, counters, settings
        manifest.json                format version; size and SHA-256 of each file; written last

Everything is written to a temporary folder, flushed to the disk and renamed; then older states are removed, but for the
last few. Writing happens in a thread, from copies, while training goes on. Only files that the manifest lists are read,
each of them once.
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from src.files import make_folder, sync_folder
from src.run_folder import STATES
from src.training.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    PAYLOAD,
    DamagedStateError,
    parse_json,
    parse_manifest,
)

STATE_BYTES_PER_PARAMETER = 12  # fp32 weight and two moments
# A save holds up to four shards in CPU memory: one being filled, one waiting, one being written, and that one's bytes.
SHARD_BYTES = 1 << 30
RETRY_SECONDS = 1.0  # network file systems fail for a moment now and then
Tensors = dict[str, Tensor]


def state_folders(proj_dir: Path) -> list[Path]:
    """The folders of saved states, newest first."""
    # a name with more digits is no step that a run reached
    names = (proj_dir / STATES).glob("step-*")
    folders = [path for path in names if re.fullmatch(r"step-[0-9]{8,12}", path.name)]
    # by number: more than 99,999,999 steps have more digits
    return sorted(folders, key=lambda path: int(path.name[5:]), reverse=True)


class StateReader:
    """Reads a state: the manifest and `payload` at construction, the tensors by `shards`. Verifies each file as it is
    read.

    Whatever is wrong with a file (missing, unreadable, other content than was written, malformed) raises
    DamagedStateError.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = parse_manifest(_read_bytes(folder / MANIFEST), folder)
        for name, (size, _) in self._files.items():  # cheap, and finds most damage before a model is built
            _check_size(folder / name, size)
        self.payload = parse_json(PAYLOAD, self._read_verified(PAYLOAD))

    def shards(self) -> Iterator[Tensors]:
        """The tensors, shard by shard: of every file that the manifest lists, and of no other."""
        for name in self._files:
            if name == PAYLOAD:
                continue
            data = self._read_verified(name)
            try:
                shard = load(data)
            except Exception as error:  # whatever the parser says of bytes that no writer of ours wrote
                raise DamagedStateError(f"{name} can't be parsed ({error})") from error
            if not shard:
                raise DamagedStateError(f"{name} has no tensors")
            yield shard

    def _read_verified(self, name: str) -> bytes:
        size, sha256 = self._files[name]
        # whole, then hashed, then parsed: what is used is what was verified
        data = _read_bytes(self.folder / name)
        if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
            raise DamagedStateError(f"{name} is not what was written (its SHA-256 differs)")
        return data


def _check_size(path: Path, size: int) -> None:
    try:
        actual = path.stat().st_size
    except OSError as error:
        raise DamagedStateError(f"{path.name} is missing ({error.strerror})") from error
    if actual != size:
        raise DamagedStateError(f"{path.name} has {actual} bytes instead of {size}")


def _read_bytes(path: Path) -> bytes:
    for last_try in (False, True):
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            raise DamagedStateError(f"{path.name} is missing") from error
        except OSError as error:  # the disk can't read it (EIO), or a network file system fails for a moment
            if last_try:
                raise DamagedStateError(f"{path.name} can't be read ({error.strerror})") from error
            time.sleep(RETRY_SECONDS)
    raise AssertionError("the second try returns or raises")


@dataclass(frozen=True)
class _Payload:
    """The last task of a save."""

    content: dict[str, Any]


class StateWriter:
    """Writes states in a thread, one at a time. A write that fails is tried once more; then the next call here raises
    OSError."""

    def __init__(
        self,
        proj_dir: Path,
        keep: int,
        expected_seconds: float = 0.0,
        check_folder: Callable[[], None] = lambda: None,
    ) -> None:
        """`expected_seconds`: what a save is expected to take as long as none was measured. `check_folder` raises where
        the folder is another run's; it is called before anything is written under a final name."""
        self.root, self.keep, self._expected_seconds = proj_dir / STATES, keep, expected_seconds
        self._check_folder = check_folder
        self._tasks: queue.Queue[Tensors | _Payload]
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._slowest_seconds = 0.0

    @property
    def slowest_seconds(self) -> float:
        """Duration of the slowest save so far, from its start until it was on the disk; an expectation before the
        first."""
        return self._slowest_seconds or self._expected_seconds

    def write(self, step: int, payload: dict[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Begin to save. Returns once all tensors are copied; blocks while the queue of shards is full."""
        self.wait()
        # maxsize 1 makes training wait for the disk, where that is slower, before memory fills with shards
        self._tasks = queue.Queue(maxsize=1)
        thread = threading.Thread(target=self._work, args=(step,), daemon=True, name="state-writer")
        thread.start()
        self._thread = thread
        shard: Tensors = {}
        size = 0
        for name, tensor in tensors:
            # a copy even on a CPU: the next step changes the tensor while the thread writes
            shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
            size += shard[name].numel() * shard[name].element_size()
            if size >= SHARD_BYTES:
                self._hand_over(shard)
                shard, size = {}, 0
        if shard:
            self._hand_over(shard)
        self._hand_over(_Payload(payload))

    def _hand_over(self, task: Tensors | _Payload) -> None:
        """Put a task into the queue; drop it where the thread has ended, after a failure that `check` raises: other
        ranks still take part in gathering the rest."""
        while self._thread is not None and self._thread.is_alive():
            try:
                self._tasks.put(task, timeout=1.0)
                return
            except queue.Full:  # the disk is slow, or the thread has just ended
                continue

    def wait(self) -> None:
        """Until the save under way is on the disk. Raises the error of one that failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raises the error of a save that failed, once: OSError, or what shows a defect of this program."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _work(self, step: int) -> None:
        """The thread: whatever fails in it, the handling of a failure included, becomes an error of the run."""
        temporary = self.root / f".step-{step:08d}.{os.getpid()}.tmp"
        try:
            self._write_state(step, temporary)
        except BaseException as error:
            self._failure = error  # first: what follows may fail as well
            try:
                if isinstance(error, (OSError, SafetensorError)):
                    self._failure = _save_failure(self.root, error)
                shutil.rmtree(temporary, ignore_errors=True)
            except BaseException as second:
                self._failure = second

    def _write_state(self, step: int, temporary: Path) -> None:
        """Writes shards as they arrive, then the payload and the manifest, and publishes the folder."""
        begin = time.monotonic()
        files: dict[str, dict[str, Any]] = {}
        task = self._tasks.get()
        self._check_folder()
        make_folder(self.root)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        while not isinstance(task, _Payload):
            name = f"rank0-{len(files):04d}.safetensors"
            files[name] = _write_file(temporary / name, save(task))
            task = self._tasks.get()
        files[PAYLOAD] = _write_file(temporary / PAYLOAD, _json_bytes(task.content))
        _write_file(temporary / MANIFEST, _json_bytes({"version": FORMAT_VERSION, "files": files}))
        self._publish(temporary, step)
        self._slowest_seconds = max(self._slowest_seconds, time.monotonic() - begin)

    def _publish(self, temporary: Path, step: int) -> None:
        sync_folder(temporary)  # the names of the files before the name of the folder
        self._check_folder()
        final = self.root / f"step-{step:08d}"
        replaced = self.root / f".step-{step:08d}.replaced.tmp"
        if final.exists():  # the same step saved again: the new state takes its place
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        temporary.rename(final)
        sync_folder(self.root)
        shutil.rmtree(replaced, ignore_errors=True)
        # last: until the new state is on the disk, the old ones are all there is
        for old in state_folders(self.root.parent)[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)


def _save_failure(root: Path, error: Exception) -> OSError:
    return OSError(
        f"the state of the run could not be saved under {root}: {error}. Earlier states are complete; free some "
        "space or repair the folder and run the same command again: it resumes from the newest"
    )


def _json_bytes(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()


def _write_file(path: Path, data: bytes) -> dict[str, Any]:
    """Write and flush to the disk, with one retry. Returns the file's entry of the manifest."""
    for last_try in (False, True):
        try:
            with open(path, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            break
        except OSError:
            if last_try:
                raise
            path.unlink(missing_ok=True)
            time.sleep(RETRY_SECONDS)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

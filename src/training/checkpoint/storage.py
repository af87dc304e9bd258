"""Full states on disk: written by all ranks at once, in folders that appear as a whole.

    proj_dir/resume/step-00000120/
        rank0-0000.safetensors ...   tensors and parts of tensors that rank 0 wrote, in shards
        rank1-0000.safetensors ...   those of rank 1
        state.json                   the rest: position, counters, settings
        manifest.json                format version; of each file its size and its SHA-256, block by block; written last

Everything is written to a temporary folder, flushed to the disk and renamed; then older states are removed, but for the
last few. Each rank writes in a thread, from a copy of what it holds, while training goes on. Rank 0 makes the folder,
writes the last two files and renames it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from src.files import make_folder, sync_folder
from src.run_folder import STATES
from src.training.checkpoint.manifest import BLOCK_BYTES, FORMAT_VERSION, MANIFEST, PAYLOAD
from src.training.checkpoint.parts import Part
from src.training.checkpoint.shard_file import RETRY_SECONDS, blocks, header_of
from src.training.checkpoint.snapshot import SnapshotBuffers
from src.training.distributed.side_group import SideGroup

STATE_BYTES_PER_PARAMETER = 12  # fp32 weight and two moments
Content = Sequence[bytes | memoryview]
T = TypeVar("T")


def state_folders(proj_dir: Path) -> list[Path]:
    """The folders of saved states, newest first."""
    # a name with more digits is no step that a run reached
    names = (proj_dir / STATES).glob("step-*")
    folders = [path for path in names if re.fullmatch(r"step-[0-9]{8,12}", path.name)]
    # by number: more than 99,999,999 steps have more digits
    return sorted(folders, key=lambda path: int(path.name[5:]), reverse=True)


class StateWriter:
    """Writes states in a thread of each rank, one at a time. A write that fails is tried once more; then no rank
    publishes the state, and the next call here raises OSError on every rank."""

    def __init__(
        self,
        proj_dir: Path,
        keep: int,
        expected_seconds: float = 0.0,
        check_folder: Callable[[], None] = lambda: None,
        processes: int = 1,
        stall_seconds: float = 600.0,
    ) -> None:
        """Every rank takes part. `expected_seconds`: what a save is expected to take as long as none was measured.
        `check_folder` raises where the folder is another run's; it is called before anything is written under a final
        name. `processes` share this machine's memory. `stall_seconds`: how long a file may take before the save has
        failed, of several processes; a single one keeps nobody waiting, and waits for its disk for ever."""
        self.root, self.keep, self._expected_seconds = proj_dir / STATES, keep, expected_seconds
        self.group = SideGroup()
        self.bytes_written = 0  # by this rank, of tensors, in the last save
        self._check_folder = check_folder
        self._stall_seconds = stall_seconds if self.group.world_size > 1 else math.inf
        self._progress_at = math.inf  # when this rank's thread last got on; inf: there is none, or it waits for others
        self._buffers = SnapshotBuffers(processes)
        self._copies: queue.Queue[tuple[list[Part], Tensor] | RuntimeError | None]
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._slowest_seconds = 0.0

    @property
    def slowest_seconds(self) -> float:
        """Duration of the slowest save so far, from its start until it was on the disk; an expectation before the
        first."""
        return self._slowest_seconds or self._expected_seconds

    def prepare(self, parts: list[Part]) -> None:
        """Begin to get the memory for copies of these parts: the first save needs not wait for it."""
        self._buffers.prepare(parts)

    def write(self, step: int, payload: dict[str, Any], parts: list[Part]) -> None:
        """Begin to save, on every rank: `parts` are this one's, `payload` is rank 0's. Returns once all are copied."""
        self.wait()
        self._copies = queue.Queue()
        thread = threading.Thread(target=self._work, args=(step, payload), daemon=True, name="state-writer")
        thread.start()
        self._thread = thread
        # a copy even on a CPU: the next step changes the tensors while the thread writes
        try:
            for copy in self._buffers.copies(parts, thread.is_alive):
                self._copies.put(copy)
        except BaseException as error:  # out of memory: the thread waits for the rest
            self._copies.put(RuntimeError(f"the state could not be copied ({error})"))
            raise
        self._copies.put(None)

    def wait(self) -> None:
        """Until the save under way is on the disk. Raises the error of one that failed."""
        if self._thread is not None:
            while self._thread.is_alive():
                self._thread.join(1.0)
                self._refuse_stall()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raises the error of a save that failed, once: OSError, or what shows a defect of this program."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        self._refuse_stall()

    def _refuse_stall(self) -> None:
        if (seconds := time.monotonic() - self._progress_at) > self._stall_seconds:
            raise _save_failure(self.root, TimeoutError(f"rank {self.group.rank}: no answer in {seconds:.0f} s"))

    def close(self) -> None:
        """After the last save, on every rank."""
        self.wait()
        self.group.close()

    def _work(self, step: int, payload: dict[str, Any]) -> None:
        """The thread: whatever fails in it, the handling of a failure included, becomes an error of the run."""
        temporary = self.root / f".step-{step:08d}.{os.getpid()}.tmp"  # rank 0's
        try:
            self._save(step, payload, temporary)
        except BaseException as error:
            self._failure = error  # first: what follows may fail as well
            try:
                if isinstance(error, OSError):
                    self._failure = _save_failure(self.root, error)
                if self.group.rank == 0:
                    shutil.rmtree(temporary, ignore_errors=True)
            except BaseException as second:
                self._failure = second
        self._progress_at = math.inf

    def _save(self, step: int, payload: dict[str, Any], temporary: Path) -> None:
        begin = time.monotonic()
        self.group.meet(self._stall_seconds)  # all begin after the same step
        self._progress_at = time.monotonic()  # from here on each watches itself
        temporary = self._on_rank_zero(lambda: self._make_folder(temporary))
        entries = self._on_every_rank(lambda: self._write_shards(temporary))
        files = {name: entry for of_rank in entries for name, entry in of_rank.items()}
        self._on_rank_zero(lambda: self._publish(temporary, step, payload, files))
        self._slowest_seconds = max(self._slowest_seconds, time.monotonic() - begin)

    def _on_every_rank(self, compute: Callable[[], T]) -> list[T]:
        """The results of all ranks. Where it fails on one of them, it raises on all: there its own error."""
        result: Any = None
        error: Exception | None = None
        try:
            result = compute()
        except Exception as raised:
            error = raised
        self._progress_at = math.inf
        outcomes = self.group.exchange((result, error and _portable(error)))
        self._progress_at = time.monotonic()
        for rank, (_, other) in enumerate(outcomes):
            if other is not None:
                raise error or (OSError(f"rank {rank}: {other}") if isinstance(other, OSError) else other)
        return [result for result, _ in outcomes]

    def _on_rank_zero(self, compute: Callable[[], T]) -> T:
        return self._on_every_rank(lambda: compute() if self.group.rank == 0 else None)[0]  # type: ignore[return-value]

    def _make_folder(self, temporary: Path) -> Path:
        self._check_folder()
        make_folder(self.root)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        return temporary

    def _write_shards(self, temporary: Path) -> dict[str, dict[str, Any]]:
        """The entries of this rank's files in the manifest."""
        files: dict[str, dict[str, Any]] = {}
        written = 0
        while (copy := self._copies.get()) is not None:
            if isinstance(copy, RuntimeError):
                raise copy
            shard, buffer = copy
            self._progress_at = time.monotonic()
            name = f"rank{self.group.rank}-{len(files):04d}.safetensors"
            data = memoryview(buffer.numpy().data)[: sum(part.size for part in shard)]
            header = header_of(shard)
            content = blocks(header, data)
            files[name] = {
                "bytes": len(header) + len(data),
                "header_bytes": len(header),
                "sha256": _write_file(temporary / name, content),
            }
            written += files[name]["bytes"]
            del data, content  # views of the buffer
            self._buffers.release(buffer)
        self.bytes_written = written
        return files

    def _publish(self, temporary: Path, step: int, payload: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
        """The last files, and the rename."""
        data = _json_bytes(payload)
        files[PAYLOAD] = {"bytes": len(data), "sha256": _write_file(temporary / PAYLOAD, [data])[0]}
        manifest = {"version": FORMAT_VERSION, "block_bytes": BLOCK_BYTES, "files": files}
        _write_file(temporary / MANIFEST, [_json_bytes(manifest)])
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


def _portable(error: Exception) -> Exception:
    """An error as it can be sent to another rank."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _save_failure(root: Path, error: Exception) -> OSError:
    return OSError(
        f"the state of the run could not be saved under {root}: {error}. Earlier states are complete; free some "
        "space or repair the folder and run the same command again: it resumes from the newest"
    )


def _json_bytes(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()


def _write_file(path: Path, content: Content) -> list[str]:
    """Write blocks and flush them to the disk, with one retry. Returns the SHA-256 of each block."""
    for last_try in (False, True):
        try:
            hashes = []
            with open(path, "wb") as file:
                for block in content:
                    hashes.append(hashlib.sha256(block).hexdigest())
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            return hashes
        except OSError:
            if last_try:
                raise
            path.unlink(missing_ok=True)
            time.sleep(RETRY_SECONDS)
    raise AssertionError("the second try returns or raises")

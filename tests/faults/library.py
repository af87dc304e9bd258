"""io_faults.c: compiled, loaded into a warmed process, and armed in the processes forked from it."""

import atexit
import ctypes
import functools
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import warm_process

SOURCE = Path(__file__).with_name("io_faults.c")
KINDS = ("open", "read", "write", "fsync", "rename", "unlink", "close", "mkdir", "truncate")
ACTIONS = ("nothing", "kill before", "kill within", "kill after", "fail once", "fail for good", "short")
COUNTS = struct.Struct(f"{len(KINDS)}l")


@functools.cache
def library() -> Path:
    """The compiled library, in a temporary folder that is removed at the end."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    folder = Path(tempfile.mkdtemp(prefix="io-faults-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = folder / f"io_faults-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    command = [compiler, "-std=c11", "-O1", "-shared", "-fPIC", "-o", target, SOURCE, "-pthread"]
    subprocess.run(command, check=True)
    return target


@functools.cache
def faulty_process() -> warm_process.WarmProcess:
    """A warmed process with the library, which is inactive in it."""
    preloaded = os.environ.get("LD_PRELOAD", "")
    return warm_process.WarmProcess.start(LD_PRELOAD=f"{library()} {preloaded}".strip())


@dataclass(frozen=True)
class Fault:
    """The n-th call of a kind on paths below `folder`, which exists, suffers `action`: with `error` where it fails.

    The default: none does. `counts` becomes a file with the number of calls of each kind, `log` one with all calls that
    changed the disk.
    """

    folder: Path
    counts: Path
    kind: str = "write"
    number: int = 0
    action: str = "nothing"
    error: int = 0
    log: Path | None = None

    def arm(self) -> None:
        """In a process with the library."""
        self.counts.write_bytes(bytes(COUNTS.size))
        arm, text, whole = ctypes.CDLL(None).io_faults_arm, ctypes.c_char_p, ctypes.c_int
        arm.argtypes = [text, whole, ctypes.c_long, whole, whole, text, text]
        code = arm(
            os.fsencode(self.folder), KINDS.index(self.kind), self.number, ACTIONS.index(self.action), self.error,
            os.fsencode(self.counts), os.fsencode(self.log or ""),
        )  # fmt: skip
        assert code == 0, f"{self} can't be armed"

    def calls(self) -> dict[str, int]:
        """The number of calls of each kind, after the process."""
        return dict(zip(KINDS, COUNTS.unpack(self.counts.read_bytes()), strict=True))

"""Python programs without their import time: forked from a process that has imported torch, Lightning and the project.

`Popen` and `run` are those of `subprocess` for commands that begin with sys.executable. The child is a real process
with its own arguments, environment, folder, descriptors, session and signals, and ends as the interpreter ends. What
differs from a new interpreter: modules are imported already, so tests of start-up and of imports use `subprocess`; and
options and variables that Python reads at its start (PYTHONPATH, PYTHONUTF8 ...) are those of the warmed process.
preexec_fn must be picklable: a function of a module, or a partial of one.

The warmed process has one thread, and no thread of OpenMP or of autograd has ever run in it: both are unusable in a
fork of a process that has used them. It ends with the process that started it.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import inspect
import os
import pickle
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SERVER = Path(__file__).with_name("warm_server.py")
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>
MESSAGE_BYTES = 1 << 20
DEVNULL, PIPE, STDOUT = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
TimeoutExpired, CompletedProcess = subprocess.TimeoutExpired, subprocess.CompletedProcess


def prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


class WarmProcess:
    """The warmed process, seen from the one that started it. A forked program is a child of the latter: `os.waitpid`,
    its exit status and `os.getppid` are those of a process that was started in the usual way."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._lock = connection, threading.Lock()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_BYTES)

    @classmethod
    def start(cls, **environment: str) -> WarmProcess:
        """`environment`: variables of the warmed process itself, such as LD_PRELOAD."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = subprocess.Popen(
            [sys.executable, SERVER, str(theirs.fileno())],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        atexit.register(process.wait)
        atexit.register(ours.close)  # called first
        return cls(ours)

    def fork(self, request: dict[str, Any], descriptors: Sequence[int]) -> int:
        """The number of a process that runs `request` with these descriptors as its 0, 1 and 2."""
        with self._lock:
            # The program is forked twice and orphaned, and so becomes a child of this process.
            prctl(PR_SET_CHILD_SUBREAPER, 1)
            try:
                socket.send_fds(self._socket, [pickle.dumps(request)], descriptors)
                reply = self._socket.recv(MESSAGE_BYTES)
            finally:
                prctl(PR_SET_CHILD_SUBREAPER, 0)
        assert reply, "the warmed process has ended"
        return int(reply)


of_processes: dict[int, WarmProcess] = {}


def warm_process() -> WarmProcess:
    """This process's own (not that of a process that it was forked from), started when it is first asked for."""
    if os.getpid() not in of_processes:
        of_processes[os.getpid()] = WarmProcess.start()
    return of_processes[os.getpid()]


class Popen(subprocess.Popen):
    """subprocess.Popen. Other programs than this Python, and on other systems than Linux all, are started in the usual
    way."""

    def __init__(self, args: Any, *, warm: WarmProcess | None = None, ranks: bool = False, **kwargs: Any) -> None:
        """`warm` is the process to fork from. With `ranks`, the program's own children are forked as well: it gets a
        warmed process of its own, as a child."""
        self._warm, self._ranks = warm, ranks
        super().__init__(args, **kwargs)

    def _execute_child(self, *args: Any) -> None:
        call = inspect.signature(subprocess_execute_child).bind(self, *args).arguments
        if sys.platform != "linux" or isinstance(call["args"], (str, bytes)) or call["args"][0] != sys.executable:
            super()._execute_child(*args)  # type: ignore[misc]
            return
        assert not call["pass_fds"], "pass_fds is not supported"
        request = {
            "command": [os.fspath(word) for word in call["args"]],
            "cwd": os.fspath(call["cwd"] or os.getcwd()),
            "environment": dict(os.environ if call["env"] is None else call["env"]),
            "preexec_fn": call["preexec_fn"],
            "start_new_session": call["start_new_session"],
            "ranks": self._ranks,
        }
        theirs = (call["p2cread"], call["c2pwrite"], call["errwrite"])
        try:
            descriptors = [i if theirs[i] == -1 else theirs[i] for i in range(3)]
            self.pid = (self._warm or warm_process()).fork(request, descriptors)
            self._child_created = True
        finally:
            self._close_pipe_fds(*(call[name] for name in FDS))  # type: ignore[attr-defined]


subprocess_execute_child = subprocess.Popen._execute_child  # type: ignore[attr-defined]
FDS = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")


def run(
    args: Any, *, input: str | bytes | None = None, capture_output: bool = False, timeout: float | None = None,
    check: bool = False, **kwargs: Any,
) -> subprocess.CompletedProcess:  # fmt: skip
    """subprocess.run with this module's Popen."""
    if input is not None:
        kwargs["stdin"] = PIPE
    if capture_output:
        kwargs["stdout"] = kwargs["stderr"] = PIPE
    with Popen(args, **kwargs) as process:
        try:
            out, err = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = CompletedProcess(process.args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


CLIENT = """#!{python} -IS
import os, pickle, socket, sys
words = sys.argv[1:]
if words[0] != "-m" and not words[0].endswith(".py"):
    os.execv({python!r}, [{python!r}, *words])
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect({address!r})
socket.send_fds(connection, [pickle.dumps((words, os.getcwd(), dict(os.environ)))], [0, 1, 2])
os._exit(int(connection.recv(8)))
"""


@contextmanager
def python_for_scripts(folder: Path) -> Iterator[Path]:
    """An executable in `folder` for scripts that call Python: `FILE.py ...` and `-m MODULE ...` are forked, anything
    else starts a new interpreter. What the warmed process has imported of this project is from this checkout, in
    whatever folder the script runs."""
    if sys.platform != "linux":
        yield Path(sys.executable)
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("")  # a name that the system chooses
        listener.listen()
        client = folder / "python"
        client.write_text(CLIENT.format(python=sys.executable, address=listener.getsockname()))
        client.chmod(0o755)
        threading.Thread(target=_serve_scripts, args=(listener,), daemon=True).start()
        yield client
        listener.shutdown(socket.SHUT_RDWR)  # ends the thread


def _serve_scripts(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_run_for_script, args=(connection,), daemon=True).start()


def _run_for_script(connection: socket.socket) -> None:
    with connection:
        message, (stdin, stdout, stderr), _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 3)
        words, folder, environment = pickle.loads(message)
        try:
            command = [sys.executable, *words]
            process = Popen(command, cwd=folder, env=environment, stdin=stdin, stdout=stdout, stderr=stderr)
        finally:
            for descriptor in (stdin, stdout, stderr):
                os.close(descriptor)
        code = process.wait()
        connection.send(str(code if code >= 0 else 128 - code).encode())


def take_terminal() -> None:
    """As preexec_fn: makes standard input the terminal that controls this session."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)

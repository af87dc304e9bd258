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
import gc
import inspect
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
IMPORTED = (
    "numpy", "torch", "torch.profiler", "pytorch_lightning", "safetensors.torch", "tokenizers", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "src.cli", "src.training.run",
    "src.inference.generate", "API_DEMO_CHAT", "training_runs",
)  # fmt: skip
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>
MESSAGE_BYTES = 1 << 20
# as the tests were started: Ctrl-C is ignored in background jobs of a shell
ON_INTERRUPT = signal.getsignal(signal.SIGINT)
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
            [sys.executable, __file__, str(theirs.fileno())],
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


_warmed: dict[int, WarmProcess] = {}


def warm_process() -> WarmProcess:
    """This process's own (not that of a process that it was forked from), started when it is first asked for."""
    if os.getpid() not in _warmed:
        _warmed[os.getpid()] = WarmProcess.start()
    return _warmed[os.getpid()]


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


# ---- the warmed process ----------------------------------------------------------------------------------------------


def _serve(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Forks a process per request. Returns in each of them, with the request and its descriptors; ends the process at
    the end of the connection."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 3)
        if not message:
            os._exit(0)
        read_end, write_end = os.pipe()
        between = os.fork()
        if between == 0:
            parent = os.getpid()
            child = os.fork()
            if child:
                os.write(write_end, str(child).encode())
                os._exit(0)
            while os.getppid() == parent:
                time.sleep(0.0002)
            os.close(read_end)
            os.close(write_end)
            connection.close()
            return pickle.loads(message), descriptors
        os.waitpid(between, 0)  # the child has its new parent now
        os.close(write_end)
        with open(read_end, "rb") as pipe:
            reply = pipe.read()
        for descriptor in descriptors:
            os.close(descriptor)
        connection.send(reply)


def _start(connection: socket.socket) -> Callable[[], None]:
    """Waits for requests. Returns in each process that is forked for one, with its program."""
    request, descriptors = _serve(connection)
    if request["ranks"]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            for descriptor in (*descriptors, ours.detach()):
                os.close(descriptor)
            return _start(theirs)
        theirs.close()
        _warmed[os.getpid()] = WarmProcess(ours)
        subprocess.Popen = Popen  # type: ignore[misc]
    _become(request, descriptors)
    return _program(request["command"])


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Makes this forked process what the request asks for."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if request["start_new_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, ON_INTERRUPT)
    if request["preexec_fn"] is not None:
        request["preexec_fn"]()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as at the start of Python
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _open_standard_streams()
    sys.modules["numpy"].random.seed()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads != "1":
        sys.modules["torch"].set_num_threads(int(threads or len(os.sched_getaffinity(0))))


def _open_standard_streams() -> None:
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")

    def settings(before: Any) -> dict[str, Any]:
        return {"encoding": encoding or before.encoding, "errors": errors or before.errors, "closefd": False}

    sys.stdin = sys.__stdin__ = open(0, **settings(sys.stdin))  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", **settings(sys.stdout))  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", **{**settings(sys.stderr), "errors": "backslashreplace"}, buffering=1)  # noqa: SIM115


def take_terminal() -> None:
    """As preexec_fn: makes standard input the terminal that controls this session."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _program(command: list[str]) -> Callable[[], None]:
    """Of `python FILE ...`, `python -m MODULE ...` or `python -c CODE ...`: sets sys.argv and the module path."""
    sys.orig_argv = list(command)
    kind = command[1]
    sys.argv = command[1:] if kind not in ("-m", "-c") else [kind, *command[3:]]
    if kind == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        sys.path[0] = ""
        return lambda: exec(compile(command[2], "<string>", "exec"), vars(main))
    if kind == "-m":
        sys.path[0] = os.getcwd()
        sys.modules.pop(command[2], None)  # runpy warns of a module that it finds imported
        return lambda: void(runpy.run_module(command[2], run_name="__main__", alter_sys=True))
    sys.path[0] = str(Path(kind).resolve().parent)
    return lambda: void(runpy.run_path(kind, run_name="__main__"))


def _run_to_end(program: Callable[[], None]) -> NoReturn:
    """Ends as the interpreter does, but for taking all modules apart: that would copy the pages of most objects."""
    code, interrupted = 0, False
    try:
        program()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = 1 if isinstance(end.code, str) else end.code or 0
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        code, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        code = 120
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


def void(_: object) -> None:
    """Drops a result."""


def _warm_up() -> None:
    for name in IMPORTED:
        __import__(name)
    gc.collect()
    gc.freeze()  # forked processes don't copy the pages of these objects by counting references in a collection
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: a fork would be left without them"


if __name__ == "__main__":
    sys.modules["warm_process"] = sys.modules["__main__"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal of the tests
    sys.path.insert(1, str(ROOT))
    with socket.socket(fileno=int(sys.argv[1])) as tests:
        _warm_up()
        program = _start(tests)
    _run_to_end(program)

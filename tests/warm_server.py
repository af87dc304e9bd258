"""The warmed process of warm_process.py: `python tests/warm_server.py DESCRIPTOR`, of a socket that requests come from.

It imports what the programs need, then forks a process per request, which becomes the program.
"""

from __future__ import annotations

import atexit
import gc
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import warm_process
from warm_process import MESSAGE_BYTES, PR_SET_PDEATHSIG, ROOT, WarmProcess, prctl

IMPORTED = (
    "numpy", "torch", "torch.profiler", "pytorch_lightning", "safetensors.torch", "tokenizers", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "src.cli", "src.training.run",
    "src.training.distributed.launch", "src.inference.generate", "API_DEMO_CHAT", "training_runs",
)  # fmt: skip
RANK_STARTER = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
# as the tests were started: Ctrl-C is ignored in background jobs of a shell
ON_INTERRUPT = signal.getsignal(signal.SIGINT)


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
    if request["start_new_session"]:
        os.setsid()
    if request["ranks"]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            for descriptor in (*descriptors, ours.detach()):
                os.close(descriptor)
            return _start(theirs)
        theirs.close()
        warm_process.of_processes[os.getpid()] = WarmProcess(ours)
        subprocess.Popen = warm_process.Popen  # type: ignore[misc]
        # torch's agent, which starts the ranks, has imported the class itself
        sys.modules[RANK_STARTER].Popen = warm_process.Popen  # type: ignore[attr-defined]
    _become(request, descriptors)
    return _program(request["command"])


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Makes this forked process what the request asks for."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None  # TMPDIR may be another one
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal of the tests
    sys.path.insert(1, str(ROOT))
    with socket.socket(fileno=int(sys.argv[1])) as tests:
        _warm_up()
        program = _start(tests)
    _run_to_end(program)

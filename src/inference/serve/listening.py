"""The address a server listens on, what it prints when it does, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn

from src.errors import UserError


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address. Raises UserError when it can't be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        advice = "name another --port, or 0 for any that is free" if error.errno == 98 else ""
        raise UserError(
            f"can't listen there ({error.strerror})", flag="host", given=f"{host}:{port}", advice=advice
        ) from error
    return listener


class _Server(uvicorn.Server):
    """Ends at the first Ctrl-C or SIGTERM when what is being written has ended, at a second one at once.

    uvicorn would raise the signal again afterwards: a traceback, or a process that seems to have been killed.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            # Not by an exception: the engines' threads may be in the middle of a step.
            os.write(2, b"stopped at once\n")
            os._exit(128 + sig)
        os.write(2, b"finishing what is being written; again to stop at once\n")
        self.should_exit = True


def serve(config: uvicorn.Config, listener: socket.socket, names: list[str]) -> int:
    """Run until Ctrl-C or SIGTERM, which let what is being written end; the exit code, 0."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"chat page  http://{shown}:{port}/")
    print(f"base URL   http://{shown}:{port}/v1")
    print(f"models     {', '.join(names)}", flush=True)
    _Server(config).run(sockets=[listener])
    return 0

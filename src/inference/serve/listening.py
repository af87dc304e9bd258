"""The address a server listens on, and what it prints when it does."""

from __future__ import annotations

import socket

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


def serve(config: uvicorn.Config, listener: socket.socket, names: list[str]) -> None:
    """Run until Ctrl-C or SIGTERM, which let what is being written end."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"chat page  http://{shown}:{port}/")
    print(f"base URL   http://{shown}:{port}/v1")
    print(f"models     {', '.join(names)}", flush=True)
    uvicorn.Server(config).run(sockets=[listener])

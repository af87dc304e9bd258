"""A server in a thread, for tests that are its clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from src.inference.serve.app import AppSettings, make_app
from src.inference.serve.listening import bind
from src.inference.serve.live_run import LiveRun
from src.inference.serve.registry import Registry


@contextmanager
def running(registry: Registry, settings: AppSettings | None = None, run: LiveRun | None = None) -> Iterator[str]:
    """Its address, "http://127.0.0.1:PORT"; it is shut down after the block."""
    listener = bind("127.0.0.1", 0)
    app = make_app(registry, settings or AppSettings(drain_seconds=1), run)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()

"""What is refused before a request is read: bodies that are too large, and names that aren't this server's."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from src.inference.serve.errors import ApiError


class Limits:
    """ASGI middleware. A body beyond `body_limit` bytes gets 413, whatever its header says.

    hosts   names in the Host header that are accepted; empty: all. A page of another site can point a name of its own
            at this machine, and a browser would then let it read the answers.
    """

    def __init__(self, app: ASGIApp, body_limit: int, hosts: tuple[str, ...]) -> None:
        self.app, self.body_limit, self.hosts = app, body_limit, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self.hosts and _host_name(headers.get(b"host", b"").decode("latin-1")) not in self.hosts:
            await ApiError(403, "this server isn't addressed by that name (Host)").response()(scope, receive, send)
            return
        declared = headers.get(b"content-length", b"0")
        too_large = ApiError(413, f"the body is larger than {self.body_limit} bytes", code="body_too_large")
        if not declared.isdigit() or int(declared) > self.body_limit:
            await too_large.response()(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.body_limit:
                raise too_large  # the application's handler of errors answers
            return message

        await self.app(scope, counted, send)


def _host_name(host: str) -> str:
    """Without the port: "localhost", "127.0.0.1", "[::1]"."""
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0].lower()

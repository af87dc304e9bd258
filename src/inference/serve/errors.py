"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}} with an HTTP status."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from src.errors import UserError
from src.inference.serve.request import QueueFullError, ShuttingDownError

RETRY_SECONDS = 5  # sent as Retry-After to a client that is refused

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer other than 200. `param` is the field of the request that is at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def payload(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return json_response(self.payload(), self.status, headers)


def json_response(payload: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(payload), status, headers, media_type="application/json")


def to_json(payload: Any) -> str:
    """ASCII only: generated text may hold what UTF-8 can't encode."""
    return json.dumps(payload, separators=(",", ":"))


def as_api_error(error: Exception) -> ApiError:
    """What a client gets to know of an error. A mistake of ours is a 500 without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientDisconnect):  # nobody reads this
        return ApiError(499, "the client has gone")
    if isinstance(error, ShuttingDownError):
        return ApiError(503, str(error), code="shutting_down")
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        return ApiError(400, f"{param}: {first['msg']}" if param else first["msg"], param)
    return ApiError(500, "internal error; the server's log has the details", code="internal_error")

"""The HTTP application: routes, who may ask, how large a request may be, and what becomes of errors."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response

from src.errors import UserError
from src.inference.serve.chat_completions import chat_completion
from src.inference.serve.completions import text_completion
from src.inference.serve.errors import ApiError, as_api_error, json_response
from src.inference.serve.http import EventStream
from src.inference.serve.limits import Limits
from src.inference.serve.live_run import LiveRun
from src.inference.serve.metrics import metrics_text
from src.inference.serve.registry import Registry
from src.inference.serve.schemas import Body, ChatCompletion, Embeddings, SavedState, TextCompletion
from src.inference.serve.served_model import ServedModel, as_messages

PAGE = Path(__file__).with_name("page.html")
BodyType = TypeVar("BodyType", bound=Body)
logger = logging.getLogger("serve")


@dataclass(frozen=True)
class AppSettings:
    """Settings of the server, besides its models. `hosts`: names by which it may be addressed; empty: any."""

    api_keys: tuple[str, ...] = ()
    body_limit: int = 8 << 20
    request_seconds: float = 600.0
    drain_seconds: float = 30.0
    hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()


def make_app(registry: Registry, settings: AppSettings, run: LiveRun | None = None) -> FastAPI:
    """The application. Its engines are closed when it ends. `run`: a run that the page shows."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(registry.close, settings.drain_seconds)

    # No pages that describe the API: they load scripts from other servers.
    app = FastAPI(title="RWKV-7", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    _add_errors(app)

    async def with_model(request: Request, kind: type[BodyType], act: Callable[..., Awaitable[Response]]) -> Response:
        _authorize(request, settings)
        try:
            body = await asyncio.wait_for(_read(request, kind), settings.request_seconds)
        except asyncio.TimeoutError:
            raise ApiError(408, "the body did not arrive in time", code="timeout") from None
        model = registry.find(getattr(body, "model", ""), getattr(body, "adapter", None))
        response = await _within(settings.request_seconds, request, act(model, body))
        if isinstance(response, EventStream):
            response.seconds = settings.request_seconds
        if body.ignored:
            response.headers["x-ignored-fields"] = body.ignored
        return response

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await with_model(request, ChatCompletion, chat_completion)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await with_model(request, TextCompletion, text_completion)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        return await with_model(request, Embeddings, _embed)

    @app.post("/v1/states")
    async def save_state(request: Request) -> Response:
        return await with_model(request, SavedState, _save_state)

    @app.get("/v1/states")
    async def states(request: Request) -> Response:
        _authorize(request, settings)
        data = [
            {"object": "state", "name": name, "model": model.name}
            for model in registry.models
            for name in sorted(model.states)
        ]
        return json_response({"object": "list", "data": data})

    @app.delete("/v1/states/{name}")
    async def delete_state(request: Request, name: str) -> Response:
        _authorize(request, settings)
        registry.find(request.query_params.get("model", ""), None).delete_state(name)
        return json_response({"name": name, "object": "state", "deleted": True})

    @app.get("/v1/models")
    @app.get("/models")
    async def models(request: Request) -> Response:
        _authorize(request, settings)
        return json_response({"object": "list", "data": [_model_payload(model) for model in registry.models]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        _authorize(request, settings)
        return json_response(_model_payload(registry.find(name, None)))

    @app.get("/health")
    async def health() -> Response:
        alive = all(model.engine.is_alive for model in registry.models)
        return json_response({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        _authorize(request, settings)
        return Response(metrics_text(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/")
    async def page() -> Response:
        return FileResponse(PAGE, headers=PAGE_HEADERS)

    @app.get("/run")
    async def show_run(request: Request) -> Response:
        _authorize(request, settings)
        if run is None:
            raise ApiError(404, "the server shows no run (--run)", code="no_run")
        return json_response(await asyncio.to_thread(run.snapshot))

    @app.post("/run/load")
    async def load_run(request: Request) -> Response:
        _authorize(request, settings)
        await _read(request, Body)  # for its check of the content type
        if run is None:
            raise ApiError(404, "the server shows no run (--run)", code="no_run")
        return json_response(_model_payload(await asyncio.to_thread(run.load_newest)))

    app.add_middleware(Limits, body_limit=settings.body_limit, hosts=settings.hosts)  # type: ignore[arg-type]
    if settings.cors_origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware,  # type: ignore[arg-type]
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
        )
    return app


# The page's scripts and styles are in it, and it may talk to this server only; what a model writes can't load anything.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def _add_errors(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        api_error = as_api_error(error)
        if api_error.status == 500:
            logger.exception("%s %s failed", request.method, request.url.path, exc_info=error)
        return api_error.response()

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, message).response()

    app.add_exception_handler(HTTPException, http_error)
    # ClientDisconnect by name, as what only Exception covers is raised again after the answer.
    for kind in (ApiError, UserError, ValueError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, answer)


def _authorize(request: Request, settings: AppSettings) -> None:
    """Raises ApiError without a key that the server knows, if it has any."""
    if not settings.api_keys:
        return
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    # compared in constant time, so that a key can't be guessed letter by letter
    given = key.strip().encode()
    known = [hmac.compare_digest(given, valid.encode()) for valid in settings.api_keys]
    if kind.lower() != "bearer" or not any(known):
        raise ApiError(401, "missing or wrong API key (Authorization: Bearer KEY)", code="invalid_api_key")


async def _read(request: Request, kind: type[BodyType]) -> BodyType:
    """The body, checked. Raises ApiError and pydantic's ValidationError."""
    # A page of another site can make a browser send other types without asking this server first.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON (Content-Type: application/json)")
    data = await request.body()
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
        if b"\\u" in data:  # half of a surrogate pair, which no text has
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return kind.model_validate(value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


async def _within(seconds: float, request: Request, work: Awaitable[Response]) -> Response:
    """The response, unless it takes too long or the client goes away; then what is generated for it stops."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        done, _ = await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        if gone in done:
            raise ApiError(499, "the client has gone")
        raise ApiError(504, f"not finished after {seconds:g} s", code="timeout")
    finally:
        for each in (task, gone):
            each.cancel()


async def _disconnected(request: Request) -> None:
    # the body was read before: what comes now is the end of the connection
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _embed(model: ServedModel, body: Embeddings) -> Response:
    """The final hidden vectors (after the last norm): their mean over the tokens, or the last one; not normalised."""
    data, count = [], 0
    for i, text in enumerate(body.inputs):
        tokens = await asyncio.to_thread(model.text_prompt, text)
        count += len(tokens)
        processed = await model.process(tokens, use_cache=False)
        values = (processed.mean if body.pooling == "mean" else processed.last).tolist()
        vector: Any = values
        if body.encoding_format == "base64":
            vector = base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
        data.append({"object": "embedding", "index": i, "embedding": vector})
    usage = {"prompt_tokens": count, "total_tokens": count}
    return json_response({"object": "list", "data": data, "model": model.name, "usage": usage})


async def _save_state(model: ServedModel, body: SavedState) -> Response:
    if body.prompt is not None:
        tokens = await asyncio.to_thread(model.text_prompt, body.prompt)
    else:
        tokens = await asyncio.to_thread(model.conversation_tokens, as_messages(body.messages or []))
    model.save_state(body.name, (await model.process(tokens)).state)
    return json_response({"object": "state", "name": body.name, "model": model.name, "tokens": len(tokens)})


def _model_payload(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "rwkv",
        "states": sorted(model.states),
        "chat": model.template is not None,
        "think": model.can_skip_thoughts,
        "max_tokens": model.most_tokens,
    }

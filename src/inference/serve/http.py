"""Answers over HTTP: server-sent events, several answers at once, and clients that go away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import anyio
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from src.inference.serve.answer import Answer, Delta
from src.inference.serve.errors import ApiError, as_api_error, to_json

T = TypeVar("T")
logger = logging.getLogger("serve")
SECONDS_TO_SAY_SO = 2.0  # for the event that tells of the time limit, before the connection is closed


async def gather(tasks: list[Coroutine[Any, Any, T]], answers: list[Answer]) -> list[T]:
    """The results of all; the answers are cancelled where one fails or the request is."""
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for answer in answers:
            answer.cancel()


async def merged(answers: list[Answer]) -> AsyncIterator[tuple[int, Delta | None]]:
    """(number of the answer, delta) in the order in which they come; None is an answer's end. Raises what any does."""
    if len(answers) == 1:
        async for delta in answers[0]:
            yield 0, delta
        yield 0, None
        return
    queue: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue()

    async def pump(number: int, answer: Answer) -> None:
        try:
            async for delta in answer:
                queue.put_nowait((number, delta))
            queue.put_nowait((number, None))
        except Exception as error:
            queue.put_nowait((number, error))

    tasks = [asyncio.create_task(pump(i, answer)) for i, answer in enumerate(answers)]
    try:
        running = len(answers)
        while running:
            number, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            running -= item is None
            yield number, item
    finally:
        for task in tasks:
            task.cancel()
        for answer in answers:
            answer.cancel()


class EventStream(StreamingResponse):
    """Chunks as server-sent events, then "[DONE]". An error is an event, as the status was sent already.

    seconds   time limit, also for a client that doesn't read
    """

    def __init__(self, chunks: AsyncIterator[dict[str, Any]], answers: list[Answer]) -> None:
        # Proxies such as nginx would collect the events otherwise.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events(chunks), headers=headers, media_type="text/event-stream")
        self.seconds: float | None = None
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        timer = None
        if self.seconds is not None:
            late = ApiError(504, f"not finished after {self.seconds:g} s", code="timeout")
            timer = asyncio.get_running_loop().call_later(self.seconds, self._cancel, late)
        try:
            with anyio.move_on_after(None if self.seconds is None else self.seconds + SECONDS_TO_SAY_SO):
                await super().__call__(scope, receive, send)
        finally:  # the client may have gone, before the first chunk too
            self._cancel(None)
            if timer is not None:
                timer.cancel()

    def _cancel(self, error: Exception | None) -> None:
        for answer in self._answers:
            answer.cancel(error)

    async def _events(self, chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield f"data: {to_json(chunk)}\n\n"
        except Exception as error:
            api_error = as_api_error(error)
            if api_error.status == 500:
                logger.exception("a stream failed", exc_info=error)
            yield f"data: {to_json(api_error.payload())}\n\n"
        yield "data: [DONE]\n\n"

"""Answers over HTTP: server-sent events, several answers at once, and clients that go away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.responses import StreamingResponse

from src.inference.serve.answer import Answer, Delta
from src.inference.serve.errors import as_api_error, to_json

T = TypeVar("T")
logger = logging.getLogger("serve")


async def gather(tasks: list[Coroutine[Any, Any, T]], answers: list[Answer]) -> list[T]:
    """The results of all; the answers are cancelled where one fails or the request is."""
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for answer in answers:
            answer.cancel()


async def merged(answers: list[Answer]) -> AsyncIterator[tuple[int, Delta | None]]:
    """(number of the answer, delta) in the order in which they come; None is an answer's end. Raises what any does."""
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


def event_stream(
    chunks: AsyncIterator[dict[str, Any]], answers: list[Answer], headers: dict[str, str]
) -> StreamingResponse:
    """Chunks as server-sent events, then "[DONE]". An error is an event, as the status was sent already."""

    async def events() -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield f"data: {to_json(chunk)}\n\n"
        except Exception as error:
            told = as_api_error(error)
            if told.status == 500:
                logger.exception("a stream failed", exc_info=error)
            yield f"data: {to_json(told.payload())}\n\n"
        finally:  # the client may have gone
            for answer in answers:
                answer.cancel()
        yield "data: [DONE]\n\n"

    # Proxies such as nginx would collect the events otherwise.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
    return StreamingResponse(events(), headers=headers, media_type="text/event-stream")

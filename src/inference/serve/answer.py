"""The answer to one request on its way from the engine's thread to the event loop: text, probabilities, counts."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from src.dataset.tokenizer import Tokenizer
from src.inference.answer_stream import AnswerPiece, AnswerStream, joined
from src.inference.characters import CharacterStream
from src.inference.serve.engine import Engine
from src.inference.serve.errors import ApiError
from src.inference.serve.request import CANCELLED, FAILED, Request, TokenLogprobs
from src.inference.serve.sequence import Ticket


@dataclass
class Usage:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Of several answers to one prompt, which counts once."""
        return Usage(
            max(self.prompt_tokens, other.prompt_tokens),
            max(self.cached_tokens, other.cached_tokens),
            self.completion_tokens + other.completion_tokens,
        )

    def payload(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True)
class Delta:
    """What was added to an answer: pieces of text, and the probabilities of the tokens that they come from."""

    pieces: list[AnswerPiece]
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)


@dataclass(frozen=True)
class End:
    reason: str
    error: Exception | None = None


class Mailbox:
    """Brings events from engines' threads to an event loop: one wake-up for all that were posted since the last."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._posted: deque[tuple[asyncio.Queue[Delta | End], Delta | End]] = deque()
        self._is_scheduled = False

    def post(self, queue: asyncio.Queue[Delta | End], event: Delta | End) -> None:
        """From any thread. Raises RuntimeError when the loop is closed."""
        self._posted.append((queue, event))
        if not self._is_scheduled:
            self._is_scheduled = True
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_scheduled = False  # before the events are taken: what is posted from here on has a wake-up of its own
        while self._posted:
            queue, event = self._posted.popleft()
            queue.put_nowait(event)


class Answer:
    """A `Consumer`: iterate over it, in the event loop, for the deltas; then `reason` is "stop" or "length".

    Raises what went wrong. `cancel()` frees the answer's place in the batch; so does leaving the iteration.
    """

    def __init__(self, mailbox: Mailbox, tokenizer: Tokenizer, stream: AnswerStream, prompt_tokens: int) -> None:
        self._characters, self._stream = CharacterStream(tokenizer), stream
        self._mailbox = mailbox
        self._events: asyncio.Queue[Delta | End] = asyncio.Queue()
        self._ticket: Ticket | None = None
        self._is_cancelled = False
        self._error: Exception | None = None
        self.usage = Usage(prompt_tokens)
        self.reason = ""

    def submit(self, engine: Engine, request: Request) -> Answer:
        """Raises UserError for an unfit prompt, QueueFullError when too many requests wait."""
        self._ticket = engine.submit(request, self)
        if self._is_cancelled:  # while it was submitted, in another thread
            self._ticket.cancel()
        return self

    def cancel(self, error: Exception | None = None) -> None:
        """Free the answer's place; whoever waits for the answer gets `error`."""
        self._is_cancelled = True
        self._error = self._error or error
        if self._ticket is not None:
            self._ticket.cancel()

    # ---- in the engine's thread ------------------------------------------------------------------------------

    def started(self, cached_tokens: int) -> None:
        self.usage.cached_tokens = cached_tokens

    def token(self, token: int, logprobs: TokenLogprobs | None) -> bool:
        self.usage.completion_tokens += 1
        pieces = self._stream.feed(self._characters.feed(token))
        if pieces or logprobs is not None:
            self._post(Delta(pieces, [(token, logprobs)] if logprobs is not None else []))
        return self._stream.reached

    def ended(self, reason: str, error: Exception | None = None) -> None:
        pieces = [*self._stream.feed(self._characters.finish()), *self._stream.finish()]
        if pieces:
            self._post(Delta(pieces))
        self._post(End(reason, error))

    def _post(self, event: Delta | End) -> None:
        try:
            self._mailbox.post(self._events, event)
        except RuntimeError:  # the loop is closed: the server has ended, and nobody listens
            self.cancel()

    # ---- in the event loop -----------------------------------------------------------------------------------

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            event = await self._events.get()
            while isinstance(event, Delta):
                following: End | None = None
                # Where the client reads more slowly than the model writes, several tokens go out together.
                while following is None and not self._events.empty():
                    more = self._events.get_nowait()
                    if isinstance(more, End):
                        following = more
                    else:
                        event = Delta(joined([*event.pieces, *more.pieces]), [*event.logprobs, *more.logprobs])
                yield event
                event = following or await self._events.get()
            self.reason = event.reason
            if event.reason == FAILED:
                raise event.error or RuntimeError("the generation failed")
            if event.reason == CANCELLED:
                raise self._error or ApiError(503, "the server is shutting down")
        finally:
            self.cancel()  # without effect on an answer that has ended

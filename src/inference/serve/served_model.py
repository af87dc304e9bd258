"""A model that is served: engine, tokenizer, template, named states; and what the fields of a request mean for it."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from torch import Tensor

from src.config import PLACEHOLDER
from src.dataset.answer_format import MARK, render_prompt, stop_strings
from src.dataset.chat_template import ChatTemplate, Message
from src.dataset.media_parts import OBJECT, medium_kind, named_in_part
from src.dataset.tokenizer import Tokenizer
from src.errors import UserError
from src.inference.chat import uncounted_ids
from src.inference.media_prompt import content_of_data_url, encode_prompt, front_end_of, read_for, rows_of
from src.inference.sampling import SEED_LIMIT, Sampling
from src.inference.serve.answer import Mailbox
from src.inference.serve.constraints import Vocabulary
from src.inference.serve.engine import Engine
from src.inference.serve.errors import ApiError
from src.inference.serve.request import CANCELLED, Processed, Request, Start, TokenLogprobs
from src.inference.serve.schemas import ChatMessage, Generation
from src.inference.serve.sequence import Ticket
from src.model import State

KEPT_MEDIA = 64  # pictures or sounds whose rows are kept, per model
# One file is decoded at a time: a small one may hold hundreds of megabytes of pixels or samples.
_READING = threading.Lock()
MOST_STATES = 256  # that clients may save, per model
# What an answer begins with when the prompt holds an empty thought up to here: the model would write it.
_OPEN_EMPTY_THOUGHT, _ITS_END = "</think", ">\n"


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as tokens. `begun`: the end of the prompt that belongs to the answer (`Prompt.begun`);
    `boundaries`, `embeds`, `media`: as in `Request`; `stops`: texts that end the answer."""

    tokens: list[int]
    begun: str
    boundaries: tuple[int, ...]
    stops: tuple[str, ...]
    embeds: Tensor | None = None
    media: tuple[tuple[bytes, int], ...] = ()


@dataclass
class ServedModel:
    """Everything a request needs of one model. `tuned_states`: those that the server was started with."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate | None
    sampling: Sampling
    default_tokens: int = 1024
    most_tokens: int = 16384
    tuned_states: dict[str, Start] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.vocabulary = Vocabulary(self.tokenizer, self.engine.model.config.vocab_size)
        self.uncounted_ids = uncounted_ids(self.tokenizer)
        self._saved_states: dict[str, Start] = {}
        self._rows: OrderedDict[bytes, Tensor] = OrderedDict()  # of media, by digest
        self._lock = threading.Lock()  # guards _saved_states, _rows
        self._saves = 0
        self._mailbox: Mailbox | None = None

    @property
    def mailbox(self) -> Mailbox:
        """Of the running event loop."""
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = Mailbox(loop)
        return self._mailbox

    async def process(self, tokens: list[int], use_cache: bool = True) -> Processed:
        """Process a text without generating. Raises as `Engine.submit`."""
        result = _Result()
        request = Request(tokens, self.sampling, 1, on_processed=result.processed, use_cache=use_cache)
        try:
            await asyncio.to_thread(result.submit, self.engine, request)
            return await result.future
        finally:
            result.cancel()  # the client may have gone

    # ---- states ----------------------------------------------------------------------------------------------

    @property
    def states(self) -> dict[str, Start]:
        with self._lock:
            return {**self.tuned_states, **self._saved_states}

    def find_start(self, name: str | None) -> Start | None:
        """The state of this name; None for none. Raises ApiError for an unknown one."""
        if name is None:
            return None
        start = self.states.get(name)
        if start is None:
            raise ApiError(404, f"{self.name} has no state {name!r}", "state", "state_not_found")
        return start

    def save_state(self, name: str, state: State) -> None:
        """Keep `state` under `name`, replacing an earlier one. Raises ApiError where it can't."""
        with self._lock:
            if name in self.tuned_states:
                raise ApiError(409, f"{name!r} is a state that the server was started with", "name")
            if name not in self._saved_states and len(self._saved_states) >= MOST_STATES:
                raise ApiError(429, f"{MOST_STATES} states are saved already; delete one", "name", "too_many_states")
            self._saves += 1
            # unique, since texts that were processed from an earlier state of this name are other texts
            self._saved_states[name] = Start(f"{name}#{self._saves}", state)

    def delete_state(self, name: str) -> None:
        """Raises ApiError where there is none."""
        with self._lock:
            if self._saved_states.pop(name, None) is None:
                raise ApiError(404, f"no state {name!r} was saved", "name", "state_not_found")

    # ---- prompts ---------------------------------------------------------------------------------------------

    def chat_prompt(
        self, messages: Sequence[ChatMessage], tools: list[Any] | None, think: str, closed_thought: bool = False
    ) -> ChatPrompt:
        """The prompt of the next answer. `closed_thought`: an empty thought in it is complete, so that the answer
        itself is what the model writes. Raises UserError when the template rejects the conversation."""
        template = self.template
        if template is None:
            raise UserError(
                "this model has no chat template",
                given=self.name,
                advice="use /v1/completions, or start the server with --chat_template rwkv",
            )
        if think:
            template = template.thinking(think)
        contents: list[bytes] | None = [] if front_end_of(self.engine.model) is not None else None
        turns = as_messages(messages, contents)
        media = [self._encoded(content) for content in contents or ()]
        text, literals, begun = render_prompt(template, self.tokenizer, turns, tools)
        if closed_thought and begun.endswith(_OPEN_EMPTY_THOUGHT):
            text, begun = text + _ITS_END, begun + _ITS_END
        tokens, embeds = encode_prompt(self.tokenizer, text, [rows for _, rows in media], literals)
        boundaries = self._boundaries(template, turns, tools, text, tokens, begun)
        digests = tuple((digest, len(rows)) for digest, rows in media)
        return ChatPrompt(tokens, begun, boundaries, stop_strings(template, self.tokenizer), embeds, digests)

    def _encoded(self, content: bytes) -> tuple[bytes, Tensor]:
        """(digest, rows) of a medium: kept, so that what a client sends again with each turn is encoded once. Raises
        UserError where it can't be used."""
        digest = hashlib.blake2b(content, digest_size=16).digest()
        model = self.engine.model
        with self._lock:
            if (rows := self._rows.get(digest)) is not None:
                self._rows.move_to_end(digest)
                return digest, rows
        front_end = front_end_of(model)
        assert front_end is not None
        with _READING:
            medium = read_for(model, front_end.spec.kind, content)
        with self.engine.device_lock:
            rows = rows_of(model, medium)
        with self._lock:
            self._rows[digest] = rows
            while len(self._rows) > KEPT_MEDIA:
                self._rows.popitem(last=False)
        return digest, rows

    def _boundaries(
        self,
        template: ChatTemplate,
        turns: list[Message],
        tools: list[Any] | None,
        text: str,
        tokens: list[int],
        begun: str,
    ) -> tuple[int, ...]:
        """The numbers of tokens up to the first turn after the system's, up to the last turn, and, where the prompt
        holds the beginning of a thought, which later prompts leave out, up to its end."""
        question = {"role": "user", "content": MARK}
        first = next((i for i, turn in enumerate(turns) if turn["role"] not in ("system", "developer")), 0)
        ends = []
        for history in (turns[:first], turns[:-1]):
            try:
                before = render_prompt(template, self.tokenizer, [*history, question], tools).text
            except UserError:  # a template that wants the turns to alternate, say
                continue
            ends.append(before.partition(MARK)[0].rstrip() if MARK in before else "")
        if begun:
            ends.append(template.render(turns, add_generation_prompt=False, tools=tools).rstrip())
        lengths = list(self._lengths(tokens, text))
        positions = list(accumulate(lengths))
        bounds = {sum(p <= len(end.encode()) for p in positions) for end in ends if end and text.startswith(end)}
        return tuple(sorted(bounds - {0}))

    def _lengths(self, tokens: list[int], text: str) -> Iterator[int]:
        """The number of bytes of `text` that each token stands for; of a medium's tokens the last has its character."""
        if PLACEHOLDER not in tokens:
            yield from (len(self.tokenizer.decode_bytes([token])) for token in tokens)
            return
        size = len(OBJECT.encode())
        for token, following in zip(tokens, [*tokens[1:], 0], strict=True):
            if token != PLACEHOLDER:
                yield len(self.tokenizer.decode_bytes([token]))
            else:  # of neighbouring media only the last is counted: a boundary comes too late, not within one
                yield size if following != PLACEHOLDER else 0

    def conversation_tokens(self, turns: list[Message]) -> list[int]:
        """The beginning of a conversation, to which further turns are added. Raises UserError."""
        if self.template is None:
            raise UserError("this model has no chat template", given=self.name, advice="save the state of a prompt")
        text, literals, _ = render_prompt(self.template, self.tokenizer, turns, add_generation_prompt=False)
        return self.tokenizer.encode_rendered(text, literals)

    def text_prompt(self, prompt: str | list[int]) -> list[int]:
        """The tokens of a text to continue; the end of a document where it is empty."""
        tokens = prompt if isinstance(prompt, list) else self.tokenizer.encode(prompt)
        return tokens or [0]

    @property
    def can_skip_thoughts(self) -> bool:
        """Whether the template has a switch for answers without a thought."""
        try:
            return self.template is not None and bool(self.template.thinking("off"))
        except UserError:
            return False

    # ---- settings --------------------------------------------------------------------------------------------

    def sampling_of(self, body: Generation) -> Sampling:
        names = (
            *("temperature", "top_p", "top_k"),
            *("presence_penalty", "frequency_penalty", "penalty_decay"),
        )
        given = {name: value for name in names if (value := getattr(body, name)) is not None}
        return replace(self.sampling, **given)

    def token_limit(self, given: int | None, param: str = "max_tokens") -> int:
        """Raises ApiError above the server's limit."""
        if given is not None and given > self.most_tokens:
            raise ApiError(400, f"{param}: {given} is more than this server's limit, {self.most_tokens}", param)
        return given or self.default_tokens

    def bias_of(self, body: Generation) -> dict[int, float]:
        """The `logit_bias` of a request by token id. Raises ApiError for ids that the model lacks."""
        size = self.engine.model.config.vocab_size
        bias = {}
        for key, value in (body.logit_bias or {}).items():
            if not (key.isascii() and key.isdecimal() and int(key) < size):
                raise ApiError(400, f"logit_bias: {key!r} is no token id below {size}", "logit_bias")
            bias[int(key)] = value
        return bias


class _Result:
    """A `Consumer` for a text that is processed only."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Processed] = self._loop.create_future()
        self._value: Processed | None = None
        self._ticket: Ticket | None = None
        self._is_cancelled = False

    def submit(self, engine: Engine, request: Request) -> None:
        self._ticket = engine.submit(request, self)
        if self._is_cancelled:  # while it was submitted, in another thread
            self._ticket.cancel()

    def cancel(self) -> None:
        self._is_cancelled = True
        if self._ticket is not None:
            self._ticket.cancel()

    def processed(self, value: Processed) -> None:
        self._value = value

    def started(self, cached_tokens: int) -> None:
        pass

    def token(self, token: int, logprobs: TokenLogprobs | None) -> bool:
        return True

    def ended(self, reason: str, error: Exception | None = None) -> None:
        if reason == CANCELLED and error is None:
            error = ApiError(503, "the server is shutting down")

        def finish() -> None:
            if self.future.done():  # cancelled: the client has gone
                return
            if self._value is not None:
                self.future.set_result(self._value)
            else:
                self.future.set_exception(error or RuntimeError("the engine reported nothing"))

        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(finish)


def _without_object(text: str, param: str, media: list[bytes] | None) -> str:
    if media is not None and OBJECT in text:
        raise ApiError(400, f"{param}: U+FFFC stands for pictures and sounds, and can't be in a text", param)
    return text


def _medium(part: dict[str, Any], param: str) -> bytes:
    """The content of a picture or sound. Raises ApiError for what is no data URL: nothing is fetched."""
    try:
        audio = part.get("input_audio")
        if isinstance(audio, dict) and isinstance(audio.get("data"), str):  # OpenAI's form of a sound
            return content_of_data_url(f"data:audio/wav;base64,{audio['data']}")
        return content_of_data_url(named_in_part(part) or "")
    except UserError as error:
        raise ApiError(400, f"{param}: {error}", param) from error


def seed_of(body: Generation, choice: int) -> int | None:
    """The seed of one of several answers."""
    return None if body.seed is None else (body.seed + choice) % SEED_LIMIT


def as_messages(messages: Sequence[ChatMessage], media: list[bytes] | None = None) -> list[Message]:
    """The turns as chat templates take them: content as text, developers as system. Pictures and sounds, which have to
    be data URLs, are added to `media`. Raises ApiError for content that is neither; with `media` None, for all but
    text."""
    return [_as_message(message, f"messages.{i}", media) for i, message in enumerate(messages)]


def _as_message(message: ChatMessage, param: str, media: list[bytes] | None) -> Message:
    fields: dict[str, Any] = {name: value for name, value in (message.model_extra or {}).items() if value is not None}
    content = message.content if message.content is not None else ""
    if isinstance(content, list):
        texts = []
        for i, part in enumerate(content):
            if media is not None and medium_kind(part) is not None:
                media.append(_medium(part, f"{param}.content.{i}"))
                texts.append(OBJECT)
                continue
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ApiError(400, f"{param}.content.{i}: this model reads text only", f"{param}.content")
            texts.append(_without_object(part["text"], param, media))
        content = "\n".join(texts)
    else:
        _without_object(content, param, media)
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    return {**fields, "role": role, "content": content}

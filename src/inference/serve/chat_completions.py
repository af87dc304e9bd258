"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from src.dataset.tokenizer import Tokenizer
from src.dataset.tool_calls import parse_tool_calls
from src.inference.answer_stream import CONTENT, REASONING, AnswerStream
from src.inference.serve.answer import Answer, Delta, Usage
from src.inference.serve.constraints import JsonConstraint
from src.inference.serve.errors import json_response
from src.inference.serve.http import EventStream, gather, merged
from src.inference.serve.request import Constraint, Request, TokenLogprobs
from src.inference.serve.schemas import ChatCompletion
from src.inference.serve.served_model import ServedModel, seed_of

# What a block of calls begins with, in templates' formats: text from here on is held back until it can be parsed.
CALL_BEGINS = ("```json", "<tool_call>")


async def chat_completion(model: ServedModel, body: ChatCompletion) -> Response:
    """Raises ApiError, UserError."""
    answers = await _submit(model, body)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}
    tools = bool(body.tools) and body.tool_choice != "none"
    if body.stream:
        choices = [_Choice(i, model.tokenizer, tools, body.logprobs) for i in range(len(answers))]
        return EventStream(_chunks(answers, choices, head, body.includes_usage), answers)
    collected = await gather([_collect(answer, i, model, body, tools) for i, answer in enumerate(answers)], answers)
    usage = sum((answer.usage for answer in answers), Usage()).payload()
    payload = {**head, "object": "chat.completion", "choices": collected, "usage": usage}
    return json_response(payload)


async def _submit(model: ServedModel, body: ChatCompletion) -> list[Answer]:
    is_json = body.response_format is not None and body.response_format.type != "text"
    tools = None if body.tool_choice == "none" else body.tools or None
    # JSON from the first token on: a thought would not be JSON
    think = body.think_mode or ("off" if is_json and model.can_skip_thoughts else "")
    prompt = await asyncio.to_thread(model.chat_prompt, body.messages, tools, think, is_json)
    limit = model.token_limit(body.max_completion_tokens or body.max_tokens)
    sampling, bias, start = model.sampling_of(body), model.bias_of(body), model.find_start(body.state)
    answers = []
    for choice in range(body.n):
        constraint: Constraint | None = None
        if is_json:
            assert body.response_format is not None
            ids = model.tokenizer.eos_ids
            constraint = await asyncio.to_thread(JsonConstraint, model.vocabulary, body.response_format, ids)
        request = Request(
            prompt.tokens,
            sampling,
            limit,
            seed=seed_of(body, choice),
            stop_ids=frozenset(model.tokenizer.eos_ids),
            uncounted_ids=model.uncounted_ids,
            boundaries=prompt.boundaries,
            start=start,
            logit_bias=bias,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            constraint=constraint,
            embeds=prompt.embeds,
            media=prompt.media,
        )
        stops = () if is_json else (*prompt.stops, *body.stop_strings)
        answer = Answer(model.mailbox, model.tokenizer, AnswerStream(stops, prompt.begun), len(prompt.tokens))
        try:
            await asyncio.to_thread(answer.submit, model.engine, request)
            answers.append(answer)
        except BaseException:  # also when the client goes away
            for other in [*answers, answer]:
                other.cancel()
            raise
    return answers


async def _collect(answer: Answer, index: int, model: ServedModel, body: ChatCompletion, tools: bool) -> dict[str, Any]:
    texts = {CONTENT: "", REASONING: ""}
    logprobs: list[dict[str, Any]] = []
    async for delta in answer:
        for piece in delta.pieces:
            texts[piece.kind] += piece.text
        logprobs += [token_payload(model.tokenizer, *entry) for entry in delta.logprobs]
    calls = parse_tool_calls(texts[CONTENT]) if tools else []
    message: dict[str, Any] = {"role": "assistant", "content": texts[CONTENT].strip() if not calls else None}
    if calls:
        before = _before_calls(texts[CONTENT]).strip()
        message |= {"content": before or None, "tool_calls": [_call_payload(call) for call in calls]}
    if texts[REASONING]:
        message["reasoning_content"] = texts[REASONING]
    return {
        "index": index,
        "message": message,
        "logprobs": {"content": logprobs} if body.logprobs else None,
        "finish_reason": "tool_calls" if calls else answer.reason,
    }


class _Choice:
    """The chunks of one answer. Text that may be a call is held back until the answer ends."""

    def __init__(self, index: int, tokenizer: Tokenizer, tools: bool, logprobs: bool) -> None:
        self.index, self._tokenizer, self._tools, self._logprobs = index, tokenizer, tools, logprobs
        self._held = ""
        self._has_content = False

    def delta(self, delta: Delta) -> list[dict[str, Any]]:
        chunks: list[dict[str, Any]] = []
        for piece in delta.pieces:
            if piece.kind == REASONING:
                chunks.append({"reasoning_content": piece.text})
            elif text := self._content(piece.text):
                chunks.append({"content": text})
        if not self._logprobs:
            return [self._payload(chunk) for chunk in chunks]
        content = [token_payload(self._tokenizer, *entry) for entry in delta.logprobs]
        return [self._payload(chunk) for chunk in chunks[:-1]] + [
            self._payload(chunks[-1] if chunks else {}, logprobs={"content": content})
        ]

    def end(self, reason: str) -> list[dict[str, Any]]:
        calls = parse_tool_calls(self._held) if self._tools else []
        rest = _before_calls(self._held) if calls else self._held
        chunks: list[dict[str, Any]] = [{"content": rest}] if rest.strip() else []
        if calls:
            chunks.append({"tool_calls": [{"index": i, **_call_payload(call)} for i, call in enumerate(calls)]})
        return [*map(self._payload, chunks), self._payload({}, "tool_calls" if calls else reason)]

    def _content(self, text: str) -> str:
        if not self._has_content:  # white space that the template writes before an answer
            text = text.lstrip()
        self._has_content = self._has_content or bool(text)
        if not self._tools:
            return text
        self._held += text
        if any(begin in self._held for begin in CALL_BEGINS):
            certain = len(_before_calls(self._held))
        else:
            ends = (n for begin in CALL_BEGINS for n in range(1, len(begin)) if self._held.endswith(begin[:n]))
            certain = len(self._held) - max(ends, default=0)
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def _payload(
        self, delta: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


async def _chunks(
    answers: list[Answer], choices: list[_Choice], head: dict[str, Any], with_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    head = {**head, "object": "chat.completion.chunk"}
    usage = {"usage": None} if with_usage else {}
    for choice in choices:
        first = {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        yield {**head, "choices": [first], **usage}
    async for i, delta in merged(answers):
        payloads = choices[i].delta(delta) if delta is not None else choices[i].end(answers[i].reason)
        for payload in payloads:
            yield {**head, "choices": [payload], **usage}
    if with_usage:
        total = sum((answer.usage for answer in answers), Usage())
        yield {**head, "choices": [], "usage": total.payload()}


def _before_calls(text: str) -> str:
    begins = [text.index(begin) for begin in CALL_BEGINS if begin in text]
    return text[: min(begins, default=len(text))]


def _call_payload(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call["name"], "arguments": text},
    }


def token_payload(tokenizer: Tokenizer, token: int, logprobs: TokenLogprobs) -> dict[str, Any]:
    """A token with its probability, as chat completions report it."""

    def entry(number: int, logprob: float) -> dict[str, Any]:
        spelled = tokenizer.decode_bytes([number])
        return {"token": spelled.decode(errors="replace"), "logprob": logprob, "bytes": list(spelled)}

    return {**entry(token, logprobs.chosen), "top_logprobs": [entry(*pair) for pair in logprobs.top]}

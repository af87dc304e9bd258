"""POST /v1/completions: continues text."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from src.dataset.tokenizer import Tokenizer
from src.inference.answer_stream import AnswerStream
from src.inference.serve.answer import Answer, Delta, Usage
from src.inference.serve.errors import json_response
from src.inference.serve.http import EventStream, gather, merged
from src.inference.serve.request import Request, TokenLogprobs
from src.inference.serve.schemas import TextCompletion
from src.inference.serve.served_model import ServedModel, seed_of


async def text_completion(model: ServedModel, body: TextCompletion) -> Response:
    """Raises ApiError, UserError."""
    limit, sampling, bias = model.token_limit(body.max_tokens), model.sampling_of(body), model.bias_of(body)
    start = model.find_start(body.state)
    answers: list[Answer] = []
    echoes: list[str] = []
    prompt_tokens = 0
    try:
        for prompt in body.prompts:
            tokens = await asyncio.to_thread(model.text_prompt, prompt)
            prompt_tokens += len(tokens)
            for choice in range(body.n):
                request = Request(
                    tokens,
                    sampling,
                    limit,
                    seed=seed_of(body, choice),
                    stop_ids=frozenset(model.tokenizer.eos_ids),
                    uncounted_ids=model.uncounted_ids,
                    start=start,
                    logit_bias=bias,
                    top_logprobs=body.logprobs,
                )
                stream = AnswerStream(body.stop_strings, thoughts=False)
                answer = Answer(model.mailbox, model.tokenizer, stream, len(tokens))
                answers.append(answer)
                await asyncio.to_thread(answer.submit, model.engine, request)
                echo = prompt if isinstance(prompt, str) else model.tokenizer.decode(tokens)
                echoes.append(echo if body.echo else "")
    except BaseException:  # also when the client goes away
        for answer in answers:
            answer.cancel()
        raise
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
    head["model"] = model.name
    if body.stream:
        chunks = _chunks(answers, echoes, head, body, model.tokenizer, prompt_tokens)
        return EventStream(chunks, answers)
    collected = await gather([_collect(a, i, echoes[i], body, model.tokenizer) for i, a in enumerate(answers)], answers)
    payload = {**head, "choices": collected, "usage": _usage(answers, prompt_tokens)}
    return json_response(payload)


async def _collect(answer: Answer, index: int, echo: str, body: TextCompletion, tokenizer: Tokenizer) -> dict[str, Any]:
    text, logprobs = echo, []
    async for delta in answer:
        text += _text(delta)
        logprobs += delta.logprobs
    payload = _logprobs(tokenizer, logprobs, len(echo)) if body.logprobs is not None else None
    return {"index": index, "text": text, "logprobs": payload, "finish_reason": answer.reason}


async def _chunks(
    answers: list[Answer],
    echoes: list[str],
    head: dict[str, Any],
    body: TextCompletion,
    tokenizer: Tokenizer,
    prompt_tokens: int,
) -> AsyncIterator[dict[str, Any]]:
    usage = {"usage": None} if body.includes_usage else {}
    offsets = [len(echo) for echo in echoes]

    def chunk(index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice], **usage}

    for i, echo in enumerate(echoes):
        if echo:
            yield chunk(i, echo, None, None)
    async for i, delta in merged(answers):
        if delta is None:
            yield chunk(i, "", answers[i].reason, None)
            continue
        logprobs = _logprobs(tokenizer, delta.logprobs, offsets[i]) if body.logprobs is not None else None
        text = _text(delta)
        offsets[i] += len(text)
        yield chunk(i, text, None, logprobs)
    if body.includes_usage:
        yield {**head, "choices": [], "usage": _usage(answers, prompt_tokens)}


def _text(delta: Delta) -> str:
    return "".join(piece.text for piece in delta.pieces)


def _usage(answers: list[Answer], prompt_tokens: int) -> dict[str, object]:
    total = sum((answer.usage for answer in answers), Usage())
    total.prompt_tokens = prompt_tokens
    return total.payload()


def _logprobs(tokenizer: Tokenizer, entries: list[tuple[int, TokenLogprobs]], offset: int) -> dict[str, Any]:
    """As the older API reports them: parallel lists."""
    tokens = [tokenizer.decode([token]) for token, _ in entries]
    offsets = [offset]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [logprobs.chosen for _, logprobs in entries],
        "top_logprobs": [{tokenizer.decode([i]): value for i, value in logprobs.top} for _, logprobs in entries],
        "text_offset": offsets[:-1],
    }

"""The server as its clients see it: the `openai` package, and requests that no client should send."""

import base64
import json
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from chat_models import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import random_model
from served import running

from src.dataset.answer_format import render_prompt
from src.dataset.chat_template import RWKV_TEMPLATE, ChatTemplate
from src.dataset.tokenizer import load_tokenizer
from src.inference.decoder import Decoder
from src.inference.generation import generate
from src.inference.sampling import Sampling
from src.inference.serve.app import AppSettings
from src.inference.serve.engine import Engine
from src.inference.serve.registry import Registry
from src.inference.serve.request import Start
from src.inference.serve.served_model import ServedModel
from src.model import RWKV7

HTTP = httpx.Client(timeout=60)  # one for all: each loads the certificates
QUESTION = [{"role": "user", "content": "what is it?"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["answer", "question"]}, "count": {"type": "integer", "maximum": 9, "minimum": 0}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model() -> RWKV7:
    model = random_model(n_layer=2, n_embd=64, vocab_size=400)
    Decoder(model).step([0])  # compiles the kernels where they aren't yet
    return model


@pytest.fixture(scope="module")
def served(model: RWKV7, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    tokenizer = load_tokenizer(make_tokenizer(Path(tmp_path_factory.mktemp("tokenizer"))))
    engine = Engine(model, tokenizer, max_batch=4)
    decoder = Decoder(model)
    decoder.prefill([[5, 6, 7]])
    tuned = {"tuned": Start("tuned", decoder.state)}
    return ServedModel("tiny", engine, tokenizer, tokenizer.chat_template, Sampling(), 16, 64, tuned)


@pytest.fixture(scope="module")
def address(served: ServedModel) -> Iterator[str]:
    with running(Registry([served])) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)


def post(address: str, path: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HTTP.post(address + path, content=content, headers={"content-type": "application/json", **headers})


def prompt_tokens(served: ServedModel, messages: list[dict[str, str]]) -> list[int]:
    assert served.template is not None
    prompt = render_prompt(served.template, served.tokenizer, messages)
    return served.tokenizer.encode_rendered(prompt.text, prompt.literals)


def greedy(served: ServedModel, tokens: list[int], count: int) -> list[int]:
    ids = generate(served.engine.model, tokens, count, temperature=0, stop_ids=served.tokenizer.eos_ids)
    return list(ids)


def test_a_greedy_answer_is_that_of_generate(served: ServedModel, client: openai.OpenAI) -> None:
    prompt = prompt_tokens(served, QUESTION)
    tokens = greedy(served, prompt, 12)
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=12, temperature=0)  # type: ignore[call-overload]
    assert answer.choices[0].message.content == served.tokenizer.decode(tokens).strip()
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(tokens)
    text = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0, echo=True)
    assert text.choices[0].text == served.tokenizer.decode(prompt + tokens)


def test_a_stream_is_the_same_text(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 12, "seed": 3, "n": 3}
    whole = client.chat.completions.create(**arguments)
    texts, reasons, usage = ["", "", ""], ["", "", ""], None
    stream = client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert [text.strip() for text in texts] == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3  # each choice has a seed of its own
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_text_ends_at_stop_strings(served: ServedModel, client: openai.OpenAI) -> None:
    tokens = greedy(served, served.tokenizer.encode("the answer"), 16)
    text = served.tokenizer.decode(tokens)
    stop = text[5:7]
    answer = client.completions.create(
        model="tiny", prompt="the answer", max_tokens=16, temperature=0, stop=["¤", stop]
    )
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_continued_conversation_costs_its_new_tokens(served: ServedModel, client: openai.OpenAI) -> None:
    messages: list[dict[str, str]] = [
        {"role": "system", "content": "the list of all the answers is the string of the question"},
        {"role": "user", "content": "what is the number of it?"},
    ]
    spent = []
    for _ in range(3):
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, temperature=0.1)  # type: ignore[call-overload]
        cached = answer.usage.prompt_tokens_details.cached_tokens
        spent.append(answer.usage.prompt_tokens - cached)
        messages += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": "what?"},
        ]
    # The end of the answer, the question and the header; an answer of random characters may be tokenised otherwise.
    assert all(count < 40 < spent[0] for count in spent[1:])
    other = [messages[0], {"role": "user", "content": "def?"}]
    again = client.chat.completions.create(model="tiny", messages=other, max_tokens=1)  # type: ignore[call-overload]
    assert again.usage.prompt_tokens_details.cached_tokens >= len(served.tokenizer.encode(messages[0]["content"]))


@pytest.mark.parametrize(
    "format", [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": SCHEMA}}]
)
def test_answers_of_a_schema(client: openai.OpenAI, format: dict[str, Any]) -> None:
    for seed in range(3):
        answer = client.chat.completions.create(
            model="tiny",
            messages=QUESTION,
            max_tokens=64,
            response_format=format,
            seed=seed,
            temperature=0.5,  # type: ignore[call-overload]
        )
        if answer.choices[0].finish_reason == "stop":  # a random model may write a string without an end
            value = json.loads(answer.choices[0].message.content)
            assert isinstance(value, dict)
            if format["type"] == "json_schema":
                assert value["name"] in ("answer", "question")
                assert 0 <= value["count"] <= 9
                break
    else:
        assert format["type"] == "json_object"


def test_logprobs_and_bias(client: openai.OpenAI, served: ServedModel) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=4,  # type: ignore[call-overload]
    )
    logits = served.engine.model(torch.tensor([prompt_tokens(served, QUESTION)]))[0][0, -1]
    exact = torch.log_softmax(logits, -1).topk(4)
    first = answer.choices[0].logprobs.content[0]
    assert [entry.logprob for entry in first.top_logprobs] == pytest.approx(exact.values.tolist(), abs=1e-4)
    assert first.bytes == list(served.tokenizer.decode_bytes([int(exact.indices[0])]))
    biased = client.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        max_tokens=3,
        logit_bias={"50": 100},
        temperature=0,  # type: ignore[call-overload]
    )
    assert biased.choices[0].message.content == served.tokenizer.decode([50] * 3).strip()


def test_embeddings(client: openai.OpenAI, address: str, served: ServedModel) -> None:
    tokens = served.tokenizer.encode("the answer is it")
    hidden = served.engine.model.hidden(torch.tensor([tokens]))[0][0]
    answer = client.embeddings.create(model="tiny", input=["the answer is it", "x"])  # base64 by default
    assert answer.data[0].embedding == pytest.approx(hidden.mean(0).tolist(), abs=1e-4)
    last = post(address, "/v1/embeddings", {"input": tokens, "pooling": "last"}).json()
    assert last["data"][0]["embedding"] == pytest.approx(hidden[-1].tolist(), abs=1e-4)
    coded = post(address, "/v1/embeddings", {"input": tokens, "encoding_format": "base64"}).json()
    values = struct.unpack("<64f", base64.b64decode(coded["data"][0]["embedding"]))
    assert list(values) == pytest.approx(hidden.mean(0).tolist(), abs=1e-4)


def test_states(address: str, served: ServedModel) -> None:
    text = "the list of all is the string"
    saved = post(address, "/v1/states", {"name": "list", "prompt": text})
    assert saved.json()["tokens"] == len(served.tokenizer.encode(text))
    for state, before in (("list", served.tokenizer.encode(text)), ("tuned", [5, 6, 7])):
        body = {"prompt": " what", "max_tokens": 5, "temperature": 0, "state": state}
        answer = post(address, "/v1/completions", body).json()
        tokens = greedy(served, before + served.tokenizer.encode(" what"), 5)
        assert answer["choices"][0]["text"] == served.tokenizer.decode(tokens)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert {entry["name"] for entry in HTTP.get(f"{address}/v1/states").json()["data"]} >= {"list", "tuned"}
    assert post(address, "/v1/states", {"name": "tuned", "prompt": "x"}).status_code == 409
    assert HTTP.delete(f"{address}/v1/states/list").status_code == 200
    assert HTTP.delete(f"{address}/v1/states/list").status_code == 404
    assert post(address, "/v1/completions", {"prompt": "x", "state": "list"}).status_code == 404


def thinking_model(model: RWKV7, template: ChatTemplate, served: ServedModel) -> ServedModel:
    return ServedModel("thinker", Engine(model, served.tokenizer), served.tokenizer, template, Sampling(), 16, 64)


def test_thoughts_and_calls_are_told_from_the_answer(model: RWKV7, served: ServedModel, monkeypatch: Any) -> None:
    """What a model writes is given here; only its way to the client is tested."""
    thinker = thinking_model(model, ChatTemplate(RWKV_TEMPLATE, {}), served)
    texts = iter(
        [
            ">\nit is a list\n</think>\nthe answer\n\nUser:",
            'of course:\n```json\n{"name": "find", "arguments": {"what": "it"}}\n```\n\nUser:',
        ]
    )
    written: dict[int, tuple[Any, list[int]]] = {}  # by sampler, which is kept: another one could get its id

    def next_token(sampler: Any) -> int:
        if id(sampler) not in written:
            written[id(sampler)] = sampler, served.tokenizer.encode(next(texts))
        return written[id(sampler)][1].pop(0)

    monkeypatch.setattr("src.inference.serve.sequence.draw", lambda samplers, _: list(map(next_token, samplers)))
    with running(Registry([thinker])) as address:
        body = {"messages": QUESTION, "think": "on", "max_tokens": 64}
        message = post(address, "/v1/chat/completions", body).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "the answer", "reasoning_content": "it is a list"}
        tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
        body = {"messages": [*QUESTION, {"role": "assistant", "content": "so"}], "tools": tools, "max_tokens": 64}
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)
        content, calls, reason = "", [], None
        for chunk in client.chat.completions.create(model="thinker", stream=True, **body):  # type: ignore[call-overload]
            content += chunk.choices[0].delta.content or ""
            calls += chunk.choices[0].delta.tool_calls or []
            reason = chunk.choices[0].finish_reason
        assert content.strip() == "of course:"
        assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
            ("find", {"what": "it"})
        ]
        assert reason == "tool_calls"


def test_errors_have_openais_form(client: openai.OpenAI, address: str) -> None:
    with pytest.raises(openai.NotFoundError, match="there are: tiny"):
        client.chat.completions.create(model="other", messages=QUESTION)  # type: ignore[call-overload]
    with pytest.raises(openai.BadRequestError, match="limit"):
        client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=65)  # type: ignore[call-overload]
    chat = "/v1/chat/completions"
    nested = b'{"messages":' + b"[" * 50_000
    bodies: list[Any] = [
        *(b"", b"{", b"[]", b"\xff\xfe", nested, b'{"messages": [{"role": "user", "content": "a"}], "top_p": NaN}'),
        *({}, {"messages": []}, {"messages": "x"}, {"messages": [{"role": "cat", "content": "x"}]}),
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        *(
            {"messages": QUESTION, "temperature": -1},
            {"messages": QUESTION, "n": 10**6},
            {"messages": QUESTION, "stop": 3},
        ),
        *({"messages": QUESTION, "logit_bias": {"400": 1}}, {"messages": QUESTION, "think": "on"}),
        {"messages": QUESTION, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "cat"}}}},
    ]
    for body in bodies:
        answer = post(address, chat, body)
        assert answer.status_code == 400, body
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    large = {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 70_000]}}}
    assert "larger" in post(address, chat, {"messages": QUESTION, "response_format": large}).json()["error"]["message"]
    for path, field in (("/v1/embeddings", "input"), ("/v1/completions", "prompt")):
        for value in ([], [[]], [[], "x"], ["x"] * 300, [-1], [400], [5, "x"]):
            assert post(address, path, {field: value}).status_code == 400, value
    assert post(address, chat, {"messages": QUESTION}, **{"content-type": "text/plain"}).status_code == 415
    assert HTTP.get(address + chat).json()["error"]["message"].endswith("Method Not Allowed")
    assert HTTP.get(f"{address}/etc/passwd").status_code == 404
    ignored = post(address, chat, {"messages": QUESTION, "max_tokens": 1, "cat": 1})
    assert ignored.headers["x-ignored-fields"] == "cat"
    odd = {"\u4e2d\r\nx-evil: 1": 1, "input": "x"}
    answer = post(address, "/v1/embeddings", odd)
    assert answer.status_code == 200
    assert answer.headers["x-ignored-fields"].startswith("%E4%B8%AD%0D%0A")
    assert "x-evil" not in answer.headers
    broken = {"messages": QUESTION, "tools": [{"type": "function", "function": {"name": "\ud800"}}]}
    assert post(address, chat, broken).status_code == 400


def test_keys_sizes_and_names(served: ServedModel, model: RWKV7) -> None:
    other = ServedModel("tiny", Engine(model, served.tokenizer), served.tokenizer, served.template, Sampling())
    limits = AppSettings(api_keys=("secret",), body_limit=1000, hosts=("127.0.0.1",), drain_seconds=1)
    with running(Registry([other]), limits) as address:
        chat = "/v1/chat/completions"
        body = {"messages": QUESTION, "max_tokens": 1}
        assert post(address, chat, body).status_code == 401
        assert post(address, chat, body, authorization="Bearer wrong").status_code == 401
        assert post(address, chat, body, authorization="Bearer secret").status_code == 200
        assert HTTP.get(f"{address}/v1/models").status_code == 401
        assert HTTP.get(f"{address}/metrics").status_code == 401
        large = b'{"messages": "' + b"x" * 1000
        assert post(address, chat, large).status_code == 413
        chunks = (b"x" * 100 for _ in range(20))  # no Content-Length
        streamed = HTTP.post(
            address + chat,
            content=chunks,
            headers={"authorization": "Bearer secret", "content-type": "application/json"},
        )
        assert streamed.status_code == 413
        assert HTTP.get(f"{address}/health", headers={"host": "evil.example"}).status_code == 403
        assert (
            "access-control-allow-origin" not in HTTP.get(f"{address}/health", headers={"origin": "http://a"}).headers
        )


def test_a_client_that_goes_away_frees_its_place(address: str, served: ServedModel) -> None:
    before = served.engine.statistics.cancellations
    body = {"prompt": "the", "max_tokens": 64, "logit_bias": {"0": -100, "2": -100}, "n": 4}
    with HTTP.stream("POST", f"{address}/v1/completions", json=body | {"stream": True}) as stream:
        next(stream.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        HTTP.post(
            f"{address}/v1/completions", json=body | {"prompt": "the" * 3000}, timeout=httpx.Timeout(60, read=0.05)
        )
    while served.engine.statistics.running:
        time.sleep(0.01)
    assert served.engine.statistics.cancellations > before


def test_requests_have_a_time_limit(served: ServedModel, model: RWKV7) -> None:
    engine = Engine(model, served.tokenizer)
    other = ServedModel("tiny", engine, served.tokenizer, served.template, Sampling(), 16, 10**7)
    with running(Registry([other]), AppSettings(request_seconds=0.3, drain_seconds=1)) as address:
        body = {"prompt": "the", "max_tokens": 10**7, "logit_bias": {"0": -100, "2": -100}}
        assert post(address, "/v1/completions", body).status_code == 504
        with HTTP.stream("POST", f"{address}/v1/completions", json=body | {"stream": True}) as stream:
            *_, last, done = (line for line in stream.iter_lines() if line)
        assert json.loads(last[6:])["error"]["type"] == "timeout_error"
        assert done == "data: [DONE]"
        while engine.statistics.running:
            time.sleep(0.01)
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9"
            connection.sendall(head + b"\r\n\r\n{")
            assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_full_queue_is_told(served: ServedModel, model: RWKV7) -> None:
    engine = Engine(model, served.tokenizer, max_batch=1, max_waiting=1)
    other = ServedModel("tiny", engine, served.tokenizer, served.template, Sampling(), 16, 10**6)
    with running(Registry([other])) as address:
        body = {"prompt": "the", "max_tokens": 10**6, "logit_bias": {"0": -100, "2": -100}, "n": 4}
        answer = post(address, "/v1/completions", body)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) > 0
        while engine.statistics.running:  # those of the same request that had a place were cancelled
            time.sleep(0.01)
        assert post(address, "/v1/completions", body | {"n": 1, "max_tokens": 1}).status_code == 200


def test_health_and_metrics(address: str, client: openai.OpenAI) -> None:
    assert HTTP.get(f"{address}/health").json() == {"status": "ok"}

    def generated() -> float:
        text = HTTP.get(f"{address}/metrics").text
        found = re.search(r'^rwkv_generated_tokens_total{model="tiny"} (\d+)$', text, re.M)
        assert found
        return float(found[1])

    before = generated()
    client.completions.create(model="tiny", prompt="x", max_tokens=5, temperature=0, logit_bias={"0": -100, "2": -100})
    assert generated() == before + 5
    models = client.models.list().data
    assert [model.id for model in models] == ["tiny"]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_FIELDS = st.sampled_from(
    "messages prompt model n stop seed stream tools logit_bias response_format input max_tokens temperature top_p "
    "top_k logprobs state adapter name think stream_options".split()
)


@settings(max_examples=60)
@given(
    path=st.sampled_from(["chat/completions", "completions", "embeddings", "states"]),
    body=st.dictionaries(_FIELDS, _JSON, max_size=5),
)
def test_no_body_is_a_server_error(address: str, path: str, body: dict[str, Any]) -> None:
    base: dict[str, Any] = {"max_tokens": 1, "messages": QUESTION, "prompt": "x", "input": "x", "name": "x"}
    answer = post(address, f"/v1/{path}", base | body)
    assert answer.status_code in (200, 400, 404, 409, 429), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]

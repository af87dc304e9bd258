"""Requests as programs send them that are too large to install here: their order, headers, and fields."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_models import make_tokenizer
from random_model import random_model
from served import running

from src.dataset.chat_template import RWKV_TEMPLATE, ChatTemplate
from src.dataset.tokenizer import load_tokenizer
from src.inference.sampling import Sampling
from src.inference.serve.app import AppSettings
from src.inference.serve.engine import Engine
from src.inference.serve.registry import Registry
from src.inference.serve.served_model import ServedModel

KEY = {"authorization": "Bearer sk-1"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    model = random_model(n_layer=2, n_embd=64, vocab_size=400)
    tokenizer = load_tokenizer(make_tokenizer(Path(tmp_path_factory.mktemp("tokenizer"))))
    template = ChatTemplate(RWKV_TEMPLATE, {})
    served = ServedModel("tiny", Engine(model, tokenizer), tokenizer, template, Sampling(), 8, 2000)
    with (
        running(Registry([served]), AppSettings(api_keys=("sk-1",), drain_seconds=1)) as address,
        httpx.Client(base_url=f"{address}/v1", headers=KEY, timeout=60) as client,
    ):
        yield client


def events(client: httpx.Client, body: dict[str, Any], **headers: str) -> list[dict[str, Any]]:
    """The chunks of a streamed answer, whose form is checked."""
    with client.stream("POST", "/chat/completions", json=body, headers=headers) as stream:
        assert stream.status_code == 200
        assert stream.headers["content-type"].startswith("text/event-stream")
        text = stream.read().decode()
    blocks = text.removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    return chunks


def test_open_webui(client: httpx.Client) -> None:
    assert httpx.get(f"{client.base_url}models").status_code == 401  # a connection with a wrong key is told from none
    models = client.get("/models", headers={"content-type": "application/json"}).json()["data"]
    assert [(model["id"], model["object"]) for model in models] == [("tiny", "model")]
    user = {"x-openwebui-user-name": "A", "x-openwebui-user-role": "admin", "x-openwebui-chat-id": "1"}
    turns = [{"role": "system", "content": "the answer"}, {"role": "user", "content": "what is it?"}]
    body = {"stream": True, "model": "tiny", "messages": turns, "stream_options": {"include_usage": True}}
    chunks = events(client, body, **user)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    # Then it asks for a title, without streaming, with its own fields still there.
    title = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "### Task:\nGenerate a concise title"}],
        "stream": False,
        "max_completion_tokens": 1000,
        "metadata": {"task": "title_generation", "chat_id": "1"},
    }
    answer = client.post("/chat/completions", json=title)
    assert answer.status_code == 200
    assert answer.headers["x-ignored-fields"] == "metadata"
    # The conversation goes on with a picture in the message's form, but of text only.
    content = [{"type": "text", "text": "and then?"}]
    turns += [{"role": "assistant", "content": "it is"}, {"role": "user", "content": content}]  # type: ignore[dict-item]
    more = events(client, body | {"messages": turns, "temperature": 0.8, "top_k": 40, "seed": 1}, **user)
    assert more[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_the_example_of_the_documentation(client: httpx.Client, capsys: Any) -> None:
    page = (Path(__file__).parents[1] / "docs/serving.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for written, here in (("http://127.0.0.1:8000/v1", str(client.base_url)), ("L12-D768-x070", "tiny")):
        assert written in example
        example = example.replace(written, here)
    exec(example.replace('"unused"', '"sk-1"'), {})
    assert capsys.readouterr().out.strip()


def test_langchain(client: httpx.Client) -> None:
    body: dict[str, Any] = {
        "messages": [{"content": "You are terse.", "role": "system"}, {"content": "what is it?", "role": "user"}],
        "model": "tiny",
        "temperature": 0.0,
        "max_completion_tokens": 5,
        "n": 1,
    }
    answer = client.post("/chat/completions", json=body, headers={"x-stainless-lang": "python"}).json()
    assert answer["usage"]["completion_tokens"] == 5
    streamed = events(client, body | {"stream": True, "stream_options": {"include_usage": True}})
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in streamed if chunk["choices"])
    assert text.strip() == answer["choices"][0]["message"]["content"]

    # An agent: a call that was made, its result, and the tools again.
    tools = [
        {
            "type": "function",
            "function": {
                "name": "find",
                "description": "Find a thing.",
                "parameters": {"properties": {"what": {"type": "string"}}, "required": ["what"], "type": "object"},
            },
        }
    ]
    call = {"type": "function", "id": "call_1", "function": {"name": "find", "arguments": '{"what": "it"}'}}
    turns = [
        *body["messages"],
        {"content": None, "role": "assistant", "tool_calls": [call]},
        {"content": "it is a list", "role": "tool", "tool_call_id": "call_1"},
    ]
    again = client.post(
        "/chat/completions", json=body | {"messages": turns, "tools": tools, "parallel_tool_calls": False}
    )
    assert again.status_code == 200
    assert again.json()["usage"]["prompt_tokens"] > answer["usage"]["prompt_tokens"] + 20

    # with_structured_output
    schema = {"title": "Thing", "type": "object", "properties": {"count": {"type": "integer", "maximum": 9}}}
    format = {"type": "json_schema", "json_schema": {"name": "Thing", "schema": schema, "strict": True}}
    structured = client.post(
        "/chat/completions", json=body | {"response_format": format, "max_completion_tokens": 60}
    ).json()
    assert structured["choices"][0]["message"]["content"].startswith("{")

    # OpenAIEmbeddings: lists of ids, base64
    vectors = client.post("/embeddings", json={"input": [[5, 6], [7]], "model": "tiny", "encoding_format": "base64"})
    assert [entry["index"] for entry in vectors.json()["data"]] == [0, 1]

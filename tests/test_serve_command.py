"""The server's command line: what it loads, what it refuses, and how it ends."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from chat_models import make_tokenizer
from random_adapter import random_adapter
from random_model import random_model
from served import running

from src.adapt.adapter_files import write_adapter
from src.adapt.config import AdapterConfig
from src.errors import UserError
from src.inference.adaptation import Adaptation
from src.inference.decoder import initial_state
from src.inference.generation import generate
from src.inference.load import find_tokenizer, load_model
from src.inference.serve import command
from src.inference.serve.registry import Registry
from src.run_folder import write_run


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.pth, and runs that trained an adapter and initial states beside it."""
    folder = tmp_path_factory.mktemp("out")
    model = random_model(n_layer=2, n_embd=64, vocab_size=400).bfloat16()
    torch.save(model.state_dict(), folder / "base.pth")
    make_tokenizer(folder / "tokenizer")
    for run, config, name in (
        ("poems", AdapterConfig("lora", r=4, lora_alpha=6.0), "adapter"),
        ("calm", AdapterConfig("state", target_modules=()), "state.pth"),
    ):
        (folder / run).mkdir()
        write_adapter(folder / run / name, random_adapter(model, config))
        write_run(folder / run, {"settings": {"load_model": str(folder / "base.pth"), "data_type": "sft"}})
    return folder


def options_of(out: Path, *flags: str):  # type: ignore[no-untyped-def]
    _, options = command.parse([str(out / "base.pth"), "--tokenizer", str(out / "tokenizer"), *flags])
    command.check(options)
    return options


def test_adapters_and_states_by_name(out: Path) -> None:
    poems, calm = str(out / "poems"), str(out / "calm" / "state.pth")
    flags = ("--adapter", poems, "--state", f"quiet={calm}", "--model", f"other={out / 'base.pth'}")
    models = command.load(options_of(out, *flags))
    assert [model.name for model in models] == ["base", "base:poems", "other"]
    assert [list(model.states) for model in models] == [["quiet"], ["quiet"], []]
    tokenizer = find_tokenizer(out / "base.pth", 400, str(out / "tokenizer"))
    prompt = tokenizer.encode("what is it?")

    def expected(adaptation: Adaptation) -> str:
        model = load_model(out / "base.pth", "fp32", "cpu", adaptation)
        return tokenizer.decode(list(generate(model, prompt, 24, temperature=0, stop_ids=tokenizer.eos_ids)))

    with running(Registry(models)) as address:

        def text(**fields: str) -> str:
            body = {"prompt": "what is it?", "max_tokens": 24, "temperature": 0, **fields}
            answer = httpx.post(f"{address}/v1/completions", json=body)
            return answer.json()["choices"][0]["text"] if answer.status_code == 200 else str(answer.status_code)

        plain = expected(Adaptation())
        adapted, tuned = expected(Adaptation(adapter=poems)), expected(Adaptation(state=calm))
        assert len({plain, adapted, tuned}) == 3
        assert (text(), text(model="other")) == (plain, plain)
        assert (text(adapter="poems"), text(model="base:poems")) == (adapted, adapted)
        assert text(state="quiet") == tuned
        assert text(adapter="poems", state="quiet") == expected(Adaptation(adapter=poems, state=calm))
        assert (text(adapter="verse"), text(state="loud")) == ("404", "404")


def test_a_run_that_trained_an_adapter_is_a_model(out: Path) -> None:
    _, options = command.parse([str(out / "poems"), "--tokenizer", str(out / "tokenizer")])
    [model] = command.load(options)
    try:
        assert model.name == "poems"
        merged = load_model(out / "base.pth", "fp32", "cpu", Adaptation(adapter=str(out / "poems")))
        assert torch.equal(model.engine.model.blocks[0].att.key.weight, merged.blocks[0].att.key.weight)
    finally:
        model.engine.close()


def test_a_run_that_tuned_states_is_a_model_and_takes_their_axis_order(out: Path) -> None:
    states = []
    for layout in ((), ("--state_layout", "key-value")):
        _, options = command.parse([str(out / "calm"), "--tokenizer", str(out / "tokenizer"), *layout])
        [model] = command.load(options)
        model.engine.close()
        states.append(initial_state(model.engine.model, 1).layers[0].wkv)
    assert torch.equal(states[1], states[0].transpose(-1, -2))
    assert not torch.equal(*states)


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        (["--host", "0.0.0.0"], "host"),
        (["--port", "70000"], "port"),
        (["--max_batch", "0"], "max_batch"),
        (["--length", "5", "--max_tokens", "4"], "length"),
        (["--drain_seconds", "nan"], "drain_seconds"),
        (["--model", "nameless"], "model"),
        (["--adapter", "a=x", "--adapter", "a=y"], "adapter"),
        (["--think", "on", "--chat_template", "none"], "think"),
        (["--state", "missing.pth"], "state"),
        (["--state_layout", "key-value"], "state_layout"),
    ],
)
def test_mistakes_are_named(out: Path, flags: list[str], flag: str) -> None:
    with pytest.raises(UserError) as caught:
        command.load(options_of(out, *flags))
    assert caught.value.flag in (flag, None, "")
    assert caught.value.flag or flags[-1] in str(caught.value)


def test_keys_and_loopback(out: Path) -> None:
    for flags in (["--host", "0.0.0.0", "--api_key", "k"], ["--host", "::", "--insecure"], ["--host", "127.0.0.2"]):
        options_of(out, *flags)


@contextmanager
def process(out: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    arguments = [str(out / "base.pth"), "--tokenizer", str(out / "tokenizer"), "--port", "0", *flags]
    with subprocess.Popen(
        [sys.executable, "-m", "src.inference.serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    ) as server:
        try:
            assert server.stdout is not None
            address = next(line.split()[-1] for line in server.stdout if line.startswith("base URL"))
            yield server, address
        finally:
            server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_answers_end(out: Path, number: signal.Signals) -> None:
    body = {"prompt": "x", "max_tokens": 1500, "stream": True, "logit_bias": {"0": -100, "2": -100}}
    body["stream_options"] = {"include_usage": True}
    with process(out) as (server, address), httpx.Client(timeout=300) as client:
        with client.stream("POST", f"{address}/completions", json=body) as stream:
            lines = (line for line in stream.iter_lines() if line)
            next(lines)
            server.send_signal(number)
            *_, usage, done = lines
        assert done == "data: [DONE]"
        assert json.loads(usage[6:])["usage"]["completion_tokens"] == 1500
        assert server.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            client.get(f"{address}/models")
        assert server.stderr is not None
        assert server.stderr.read() == "finishing what is being written; again to stop at once\n"


@pytest.mark.slow
def test_what_takes_too_long_is_cut_and_a_second_signal_ends_at_once(out: Path) -> None:
    body = {"prompt": "x", "max_tokens": 10**7, "stream": True, "logit_bias": {"0": -100, "2": -100}}
    for drain, signals, code in (("0.5", [signal.SIGTERM], 0), ("600", [signal.SIGINT, signal.SIGINT], 130)):
        with (
            process(out, "--drain_seconds", drain, "--max_tokens", "10000000") as (server, address),
            httpx.stream("POST", f"{address}/completions", json=body, timeout=300) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            assert server.stderr is not None
            for each in signals:
                server.send_signal(each)
                server.stderr.readline()  # two that are sent at once may arrive as one
            assert server.wait(60) == code

"""The server's speed, as a client sees it: together against one after another, known prefixes, and waiting.

    python tests/bench/serve.py [--n_layer 12 --n_embd 768 --vocab_size 65536] [--streams 16] [--tokens 64]

A model with random values (bf16 numbers, as a released model has) is served by a process of its own. Its head is scaled
so that the next token is about as uncertain as in a trained model (LOGIT_DEVIATION): of a flat distribution top_p would
sort the whole vocabulary.
Every line is a ratio of two figures that were measured one directly after the other, a median over --rounds.

- together: tokens per second of --streams answers at once, against the same answers one after another.
- continued: time to the first token of a conversation of --prompt tokens that goes on by one message, against the same
  length of a text that the server has not seen.
- busy: time to the first token of a new prompt while --streams answers are written, against the idle server's.
  Prompts are processed in pieces, between which the others go on.
"""

# ruff: noqa: E402 (the path is set before the project is imported)
import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import httpx
import torch
from random_model import random_model

# plain words of the World vocabulary, so that prompts have the length that is asked for
# normally distributed logits have an entropy of ln V - deviation^2 / 2: 3 nats for V = 65536
LOGIT_DEVIATION = 4.0
WORDS = ["time", "water", "people", "world", "house", "work", "light", "story", "river", "letter"]


def write_model(options: argparse.Namespace, path: Path) -> None:
    model = random_model(n_layer=options.n_layer, n_embd=options.n_embd, vocab_size=options.vocab_size)
    hidden, _ = model.hidden(torch.arange(1, 65).unsqueeze(0))
    model.head.weight.mul_(LOGIT_DEVIATION / model.head(hidden).std())
    torch.save({name: tensor.bfloat16() for name, tensor in model.state_dict().items()}, path)


def start(path: Path) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "src.inference.serve", str(path), "--tokenizer", "world", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("base URL"):
            return process, line.split()[-1]
    raise SystemExit("the server did not start")


def text_of(tokens: int, seed: int) -> str:
    """About so many tokens that no other seed begins with."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(tokens))


class Client:
    def __init__(self, address: str, http: httpx.AsyncClient) -> None:
        self.address, self.http = address, http

    async def answer(
        self, messages: list[dict[str, str]], tokens: int, started: asyncio.Event | None = None
    ) -> tuple[float, int, str]:
        """Seconds to the first token, tokens, and the text. `started` is set with the first token."""
        body = {
            "messages": messages,
            "max_tokens": tokens,
            "stream": True,
            "temperature": 1.0,
            "seed": 1,
            "logit_bias": {"0": -100, "261": -100},  # ends of an answer
            "stream_options": {"include_usage": True},
        }
        begun, first, text, count = time.perf_counter(), 0.0, "", 0
        async with self.http.stream("POST", f"{self.address}/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise SystemExit(chunk["error"]["message"])
                if chunk.get("usage"):
                    count = chunk["usage"]["completion_tokens"]
                for choice in chunk["choices"]:
                    piece = choice["delta"].get("content") or ""
                    first = first or (time.perf_counter() - begun if piece else 0.0)
                    text += piece
                    if piece and started is not None:
                        started.set()
        return first, count, text


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def together(client: Client, options: argparse.Namespace, seed: int) -> tuple[float, float]:
    """Tokens per second one after another, and at once."""
    prompts = [asked(text_of(8, seed + i)) for i in range(options.streams)]
    begun = time.perf_counter()
    counts = [(await client.answer(prompt, options.tokens))[1] for prompt in prompts[: options.sequential]]
    alone = sum(counts) / (time.perf_counter() - begun)
    begun = time.perf_counter()
    answers = await asyncio.gather(*(client.answer(prompt, options.tokens) for prompt in prompts))
    return alone, sum(count for _, count, _ in answers) / (time.perf_counter() - begun)


async def continued(client: Client, options: argparse.Namespace, seed: int) -> tuple[float, float]:
    """Seconds to the first token of a new text, and of a known one that goes on."""
    history = asked(text_of(options.prompt, seed))
    anew, _, text = await client.answer(history, 8)
    turns = [*history, {"role": "assistant", "content": text}, {"role": "user", "content": "And then?"}]
    known, _, _ = await client.answer(turns, 1)
    return anew, known


async def busy(client: Client, options: argparse.Namespace, seed: int) -> tuple[float, float]:
    """Seconds to the first token on an idle server, and while others are answered."""
    idle, _, _ = await client.answer(asked(text_of(options.new_prompt, seed)), 1)
    started = [asyncio.Event() for _ in range(options.streams)]
    others = [
        asyncio.create_task(client.answer(asked(text_of(8, seed + 100 + i)), 16_000, event))
        for i, event in enumerate(started)
    ]
    await asyncio.gather(*(event.wait() for event in started))
    waited, _, _ = await client.answer(asked(text_of(options.new_prompt, seed + 1)), 1)
    assert not any(task.done() for task in others)
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    return idle, waited


async def measure(address: str, options: argparse.Namespace) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits) as http:
        client = Client(address, http)
        await client.answer(asked("warm up"), 8)
        for name, work, unit in (
            ("together", together, "tokens/s"),
            ("continued", continued, "s"),
            ("busy", busy, "s"),
        ):
            pairs = [await work(client, options, 1000 * (1 + round)) for round in range(options.rounds)]
            first, second = (statistics.median(values) for values in zip(*pairs, strict=True))
            ratio = statistics.median((b / a if name != "continued" else a / b) for a, b in pairs)
            print(f"{name:>10}: {first:8.3f} -> {second:8.3f} {unit}, ratio {ratio:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--sequential", type=int, default=4, help="answers one after another")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--new_prompt", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        write_model(options, path)
        process, address = start(path)
        try:
            asyncio.run(measure(address, options))
        finally:
            process.terminate()
            process.wait(60)


if __name__ == "__main__":
    main()

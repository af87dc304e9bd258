"""Uses a server as many clients at once do, well and badly, and says what it makes of that.

    python tests/serve_soak.py 20000 [--connections 64] [--n_layer 2 --n_embd 64]

Each request is drawn from: answers with and without a stream, streams that are left in the middle, connections that are
closed while the answer is awaited, readers that take their time, embeddings, saved states, and bodies that are wrong in
many ways. Printed are the counts of what happened, errors that are not the client's, memory (resident) after each tenth
of the requests, and places that are still taken when all clients have gone. Exit code 1 for errors, for
taken places, and for memory that has grown by more than a tenth.
"""

# ruff: noqa: E402 (the path is set before the project is imported)
from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import httpx
import torch
from chat_models import make_tokenizer
from random_model import random_model

CLIENT_FAULTS = (400, 404, 408, 409, 413, 415, 422, 429)
BAD_BODIES: list[bytes] = [
    *(b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"messages": "x"}', b'{"prompt": {}}', b'{"n": -1}'),
    b'{"messages":' + b"[" * 20_000,
    b'{"prompt": "x", "max_tokens": 1e999}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "logit_bias": {"x": 1}}',
    b'{"prompt": [999999]}',
    b'{"model": "none", "messages": [{"role": "user", "content": "x"}]}',
    b'{"prompt": "' + b"x" * (2 << 20) + b'"}',  # beyond --body_limit_mb 1
]
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/states")
WORDS = "the answer is it what string list number of all question def return".split()


class Soak:
    def __init__(self, address: str, options: argparse.Namespace) -> None:
        self.address, self.options = address, options
        self.host, self.port = address.removeprefix("http://").split(":")
        self.draw = random.Random(options.seed)
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self.left = options.requests

    async def run(self, tenth: Callable[[], None]) -> None:
        """`tenth` is called after each tenth of the requests."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.options.connections)
        async with httpx.AsyncClient(timeout=120, limits=limits) as self.http:
            workers = [asyncio.create_task(self.worker()) for _ in range(self.options.connections)]
            for done in range(1, 10):
                while self.left > (1 - done / 10) * self.options.requests:
                    await asyncio.sleep(0.1)
                tenth()
            await asyncio.gather(*workers)

    async def worker(self) -> None:
        acts = (self.whole, self.stream, self.abandon, self.hang_up, self.slow, self.embed, self.state, self.bad)
        while self.left > 0:
            self.left -= 1
            act = self.draw.choices(acts, weights=(4, 4, 4, 2, 1, 1, 1, 3))[0]
            try:
                status = await act()
            except Exception as error:
                self.errors.append(f"{act.__name__}: {error!r}")
                continue
            self.counts[f"{act.__name__} {status}"] += 1
            if status != 200 and status not in CLIENT_FAULTS:
                self.errors.append(f"{act.__name__}: status {status}")

    # ---- what a client does; each returns a status -----------------------------------------------------------

    def body(self) -> dict[str, Any]:
        shared = " ".join(WORDS[:8]) + " "
        text = shared + " ".join(self.draw.choices(WORDS, k=self.draw.choice([1, 5, 60])))
        body: dict[str, Any] = {"max_tokens": self.draw.choice([1, 8, 40]), "n": self.draw.choice([1, 1, 1, 2])}
        body |= self.draw.choice([{}, {"temperature": 0}, {"seed": 1, "top_p": 1}, {"presence_penalty": 0.3}])
        return body | {"prompt": text}

    def chat(self) -> dict[str, Any]:
        body = self.body()
        content = body.pop("prompt")
        body |= self.draw.choice([{}, {}, {"response_format": {"type": "json_object"}}, {"logprobs": True}])
        return body | {"messages": [{"role": "system", "content": "the list"}, {"role": "user", "content": content}]}

    def request(self) -> tuple[str, dict[str, Any]]:
        return self.draw.choice([(PATHS[0], self.chat()), (PATHS[1], self.body())])

    async def whole(self) -> int:
        path, body = self.request()
        answer = await self.http.post(self.address + path, json=body)
        if answer.status_code == 200:
            assert len(answer.json()["choices"]) == body["n"]
        return answer.status_code

    async def stream(self, until: int = 10**9, pause: float = 0.0) -> int:
        path, body = self.request()
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if until < 10**9:
            body["max_tokens"] = 400
        async with self.http.stream("POST", self.address + path, json=body) as answer:
            last = ""
            async for line in answer.aiter_lines():
                until -= bool(line)
                last = line or last
                if until < 0:
                    return answer.status_code
                if pause:
                    await asyncio.sleep(pause)
            if answer.status_code == 200:
                assert last == "data: [DONE]", last
            return answer.status_code

    async def abandon(self) -> int:
        return await self.stream(until=self.draw.randrange(6))

    async def slow(self) -> int:
        """Reads from a socket with a small buffer, and stops in the middle."""
        reader, writer = await asyncio.open_connection(self.host, int(self.port), limit=256)
        try:
            data = json.dumps(self.body() | {"stream": True, "max_tokens": 100}).encode()
            head = f"POST {PATHS[1]} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode())
            for i in range(0, len(data), 40):
                writer.write(data[i : i + 40])
                await asyncio.sleep(0.02)
            status = int((await reader.readline()).split()[1])
            for _ in range(self.draw.randrange(20)):
                await reader.read(64)
                await asyncio.sleep(0.05)
            return status
        finally:
            writer.close()

    async def hang_up(self) -> int:
        """Closes the connection after the body, or within it."""
        _, writer = await asyncio.open_connection(self.host, int(self.port))
        data = json.dumps(self.body() | {"max_tokens": 400}).encode()
        head = f"POST {PATHS[1]} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        sent = data[: self.draw.choice([len(data), len(data) // 2])]
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + sent)
        await writer.drain()
        await asyncio.sleep(self.draw.random() * 0.1)
        writer.close()
        return 200

    async def embed(self) -> int:
        inputs = [self.body()["prompt"] for _ in range(self.draw.choice([1, 3]))]
        return (await self.http.post(self.address + PATHS[2], json={"input": inputs})).status_code

    async def state(self) -> int:
        name = f"s{self.draw.randrange(8)}"
        if self.draw.random() < 0.3:
            return (await self.http.delete(f"{self.address}/v1/states/{name}")).status_code
        if self.draw.random() < 0.5:
            body = self.body() | {"state": name}
            return (await self.http.post(self.address + PATHS[1], json=body)).status_code
        body = {"name": name, "prompt": self.body()["prompt"]}
        return (await self.http.post(self.address + PATHS[3], json=body)).status_code

    async def bad(self) -> int:
        headers = {"content-type": self.draw.choice(["application/json"] * 4 + ["text/plain"])}
        path, data = self.draw.choice([*PATHS, "/v1/nothing"]), self.draw.choice(BAD_BODIES)
        answer = await self.http.post(self.address + path, content=data, headers=headers)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        return answer.status_code


def resident_mb(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024


def start(options: argparse.Namespace, folder: Path) -> tuple[subprocess.Popen[str], str]:
    model = random_model(n_layer=options.n_layer, n_embd=options.n_embd, vocab_size=400)
    torch.save(model.state_dict(), folder / "model.pth")
    flags = ["--tokenizer", str(make_tokenizer(folder / "tokenizer")), "--port", "0", "--body_limit_mb", "1"]
    # a small cache, which is full before the first measurement
    flags += ["--state_cache_mb", "4", "--max_batch", "16", "--max_waiting", "100", "--drain_seconds", "1"]
    command = [sys.executable, "-m", "src.inference.serve", str(folder / "model.pth"), *flags]
    log = (folder / "errors").open("w")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=Path(__file__).parents[1])
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("base URL"):
            return process, line.split()[-1].removesuffix("/v1")
    raise SystemExit("the server did not start")


def taken_places(address: str) -> dict[str, int]:
    text = httpx.get(f"{address}/metrics").text
    return {name: int(n) for name, n in re.findall(r"^rwkv_(running|waiting|failures_total){[^}]*} (\d+)", text, re.M)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", type=int)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n_layer", type=int, default=2)
    parser.add_argument("--n_embd", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        process, address = start(options, Path(folder))
        try:
            memory: list[float] = []
            soak, begun = Soak(address, options), time.monotonic()
            asyncio.run(soak.run(lambda: memory.append(resident_mb(process.pid))))
            seconds = time.monotonic() - begun
            for _ in range(100):  # the server notices within a moment that clients have gone
                places = taken_places(address)
                if not (places["running"] or places["waiting"]):
                    break
                time.sleep(0.1)
            memory.append(resident_mb(process.pid))
            healthy = httpx.get(f"{address}/health").status_code == 200
        finally:
            process.terminate()
            code = process.wait(60)
        logged = (Path(folder) / "errors").read_text().splitlines()
    soak.errors += [f"logged: {line}" for line in logged if not line.startswith((" ", "finishing what"))]
    for name, count in sorted(soak.counts.items()):
        print(f"{count:7}  {name}")
    print(f"{options.requests} requests in {seconds:.0f} s, {len(soak.errors)} errors that are not the client's")
    for error, count in Counter(soak.errors).most_common(10):
        print(f"{count:7}  {error}")
    print(f"resident memory in MB after each tenth: {' '.join(f'{size:.0f}' for size in memory)}")
    print(f"places at the end {places}; healthy {healthy}; exit code {code}")
    stuck = places["running"] or places["waiting"] or places["failures_total"]
    return int(bool(soak.errors or stuck or code or not healthy or memory[-1] > 1.1 * memory[0]))


if __name__ == "__main__":
    sys.exit(main())

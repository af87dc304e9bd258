"""The chat page in a real browser: headless Chromium of the system, driven by playwright."""

import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import make_tokenizer
from random_model import random_model
from served import running

from src.dataset.tokenizer import load_tokenizer
from src.inference.decoder import Decoder
from src.inference.sampling import Sampling
from src.inference.serve.app import AppSettings
from src.inference.serve.engine import Engine
from src.inference.serve.live_run import LiveRun
from src.inference.serve.registry import Registry
from src.inference.serve.request import Start
from src.inference.serve.served_model import ServedModel

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
expect = playwright.expect
expect.set_options(timeout=60_000)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)"),
]

# What the model writes: every kind of block, and attempts to be more than text.
ANSWER = """# A heading

Some **bold** text, `code <b>`, *emphasis*, <script>window.evil = 1</script>, <img src=x onerror="window.evil = 2">.

- [good](https://example.org/a) and [bad](javascript:window.evil=3)
- ![x](http://example.org/x.png) <iframe srcdoc="<script>parent.evil=4</script>"></iframe>

```python
print("<b>" + "</code></pre><script>window.evil = 5</script>")
```

| a | b |
|---|---|
| 1 | <svg onload="window.evil=6"> |
"""


@pytest.fixture  # of each test, since a server closes its engines
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    model = random_model(n_layer=2, n_embd=64, vocab_size=400)
    decoder = Decoder(model)
    decoder.prefill([[5, 6]])
    tokenizer = load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    states = {"tuned": Start("tuned", decoder.state)}
    return ServedModel(
        "tiny", Engine(model, tokenizer), tokenizer, tokenizer.chat_template, Sampling(), 600, 4096, states
    )


@pytest.fixture
def written(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model writes ANSWER, a token every 2 ms."""

    class Writer:
        def __init__(self, *_: Any) -> None:
            self.tokens = [*served.tokenizer.encode(ANSWER), served.tokenizer.eos_ids[-1]]

        def __call__(self, logits: torch.Tensor) -> int:
            time.sleep(0.002)
            return self.tokens.pop(0)

    monkeypatch.setattr("src.inference.serve.engine.Sampler", Writer)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page whose errors, and whatever it asks of other servers, fail the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 760}, locale="en-GB")
    context.set_default_timeout(60_000)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(("http://127.0.0.1", "data:")) else problems.append(r.url))
    yield page
    context.close()
    assert not problems


def send(page: Any, text: str) -> None:
    answers = page.locator(".message.model .stats").count()
    page.fill("#input", text)
    page.keyboard.press("Enter")
    expect(page.locator(".message.model .stats")).to_have_count(answers + 1)


def test_a_conversation(served: ServedModel, written: None, page: Any) -> None:
    with running(Registry([served])) as address:
        page.goto(address)
        page.wait_for_selector("#model option", state="attached")
        page.fill("#input", "What is **it**?\n<b>tell</b>")
        page.keyboard.press("Enter")
        expect(page.locator(".message.model .body")).to_contain_text("heading")
        assert page.locator(".stats").count() == 0  # still written
        page.wait_for_selector(".stats")
        assert re.match(r"\d+ tokens, [\d.]+ tokens/s; prompt \d+, \d+ known", page.inner_text(".stats"))
        assert page.inner_text(".message.user .body") == "What is **it**?\n<b>tell</b>"
        assert page.locator(".body h3").inner_text() == "A heading"
        assert page.locator(".body strong").inner_text() == "bold"
        assert page.locator(".body table td").first.inner_text() == "1"
        assert 'print("<b>"' in page.locator(".code pre").inner_text()
        # A model's text is text: no element, link or request of its own, and nothing ran.
        assert page.evaluate("window.evil") is None
        assert page.locator(".body script, .body img, .body iframe, .body svg").count() == 0
        assert [a.get_attribute("href") for a in page.locator(".body a").all()] == [
            "https://example.org/a",
            "http://example.org/x.png",
        ]

        send(page, "And then?")
        assert page.locator(".message").count() == 4
        page.reload()  # kept in the browser
        page.wait_for_selector(".stats")
        assert page.locator(".message").count() == 4
        assert page.locator("#chats li").count() == 1

        # An edited question drops what came after it.
        page.locator(".message.user").first.get_by_text("Edit").click()
        page.fill("textarea.edit", "Something else?")
        page.keyboard.press("Control+Enter")
        expect(page.locator(".message")).to_have_count(2)
        expect(page.locator(".stats")).to_have_count(1)
        assert page.locator(".message.user .body").inner_text() == "Something else?"
        page.get_by_text("Retry").click()
        expect(page.locator("#send")).to_have_text("Stop")
        expect(page.locator(".stats")).to_have_count(1)
        assert page.locator(".message").count() == 2

        page.click("#new")
        send(page, "A second conversation")
        assert page.locator("#chats li").count() == 2
        page.on("dialog", lambda dialog: dialog.accept())
        page.locator("#chats li").first.get_by_label("Delete").click()
        expect(page.locator("#chats li")).to_have_count(1)


def test_stop_leaves_what_was_written(served: ServedModel, written: None, page: Any) -> None:
    with running(Registry([served])) as address:
        page.goto(address)
        page.wait_for_selector("#model option", state="attached")
        page.fill("#input", "Go on")
        page.keyboard.press("Enter")
        expect(page.locator(".message.model .body")).to_contain_text("Some")
        page.keyboard.press("Escape")
        page.wait_for_selector("text=Retry")
        text = page.inner_text(".message.model .body")
        assert "A heading" in text
        assert "window.evil=6" not in text  # the end
        while served.engine.statistics.running:  # the server stopped, too
            time.sleep(0.01)


def test_settings_reach_the_request(served: ServedModel, page: Any) -> None:
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda r: bodies.append(json.loads(r.post_data)) if r.method == "POST" else None)
    keys = AppSettings(api_keys=("secret",), drain_seconds=1)
    with running(Registry([served]), keys) as address:
        page.goto(address)
        page.wait_for_selector(".error")  # the server asks for a key
        page.click("#open-settings")
        page.fill("#key", "secret")
        page.fill("#system", "Be brief.")
        page.fill("#set-temperature", "0.5")
        page.fill("#set-max_tokens", "3")
        page.keyboard.press("Tab")
        page.keyboard.press("Escape")
        page.wait_for_selector("#model option", state="attached")
        page.click("#open-settings")
        page.select_option("#set-state", "tuned")
        page.click("#settings button")
        send(page, "Hello")
        body = bodies[-1]
        assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        assert {name: body[name] for name in ("temperature", "max_tokens", "state")} == {
            "temperature": 0.5,
            "max_tokens": 3,
            "state": "tuned",
        }


def test_a_phone_and_two_languages(served: ServedModel, written: None, page: Any) -> None:
    with running(Registry([served])) as address:
        page.set_viewport_size({"width": 360, "height": 640})
        page.goto(address)
        page.wait_for_selector("#model option", state="attached")
        send(page, "Hello")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out
        assert not page.is_visible("#list")
        page.click("#menu")
        assert page.is_visible("#list")
        page.keyboard.press("Escape")
        assert not page.is_visible("#list")
        expect(page.locator("#menu")).to_be_focused()
        page.click("#menu")
        page.click("#chats button.open")
        assert not page.is_visible("#list")
        assert page.locator("header").bounding_box()["height"] < 60  # one row
        page.click("#language")
        assert page.inner_text("#send") == "发送"
        assert page.get_attribute("html", "lang") == "zh-CN"
        before = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.click("#theme")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


def test_a_run_while_it_trains(served: ServedModel, page: Any, tmp_path: Path) -> None:
    def train(steps: int) -> None:
        rows = [f"{i},{i * 512},{i * 0.4},{2 + 6 * math.exp(-i / 80)},6e-4,1.0,1200" for i in range(1, steps + 1)]
        (tmp_path / "metrics.csv").write_text(
            "step,tokens,seconds,loss,lr,grad_norm,tokens_per_second\n" + "\n".join(rows) + "\n"
        )

    train(20)
    (tmp_path / "samples.json").write_text(json.dumps([{"prompt": "<b>x</b>", "generated": "y", "original": "z"}]))
    loaded: list[Path] = []

    def load(name: str, weights: Path) -> ServedModel:
        loaded.append(weights)
        return ServedModel(name, Engine(served.engine.model, served.tokenizer), served.tokenizer, None, Sampling())

    registry = Registry([served])
    with running(registry, run=LiveRun(tmp_path, registry, "tiny", load)) as address:
        page.goto(address)
        page.locator("#tab-run").wait_for()
        page.focus("#tab-chat")
        page.keyboard.press("ArrowRight")
        expect(page.locator("#tab-run")).to_be_focused()
        page.wait_for_selector("svg polyline")
        before = page.locator("svg polyline").nth(0).get_attribute("points")
        assert "<b>x</b>" in page.inner_text("#run")
        train(200)
        (tmp_path / "rwkv-0.pth").write_bytes(b"")
        curve = page.locator("svg polyline").nth(0)
        expect(curve).not_to_have_attribute("points", before, timeout=20_000)  # drawn again by itself
        page.get_by_text("Load them").click()
        expect(page.locator("#run button")).to_have_count(0)
        assert loaded == [tmp_path / "rwkv-0.pth"]
        page.click("#tab-chat")
        page.wait_for_selector("text=no chat template")

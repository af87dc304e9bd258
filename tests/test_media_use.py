"""A model with a front end in use: chat, generation, answers, the server. The model is random: what is compared are
states, tokens and counts."""

import base64
import threading

import pytest
import torch
from media_data import byte_tokenizer, coloured
from random_model import random_model

from src.config import PLACEHOLDER
from src.dataset.tokenizer import load_tokenizer
from src.errors import UserError
from src.inference import media_prompt
from src.inference.answers import answer_all, read_questions, report
from src.inference.chat import Conversation
from src.inference.decoder import Decoder
from src.inference.generation import generate
from src.inference.media_prompt import content_of_data_url, read_for, rows_of
from src.inference.sampling import Sampling
from src.inference.serve.engine import Engine
from src.inference.serve.errors import ApiError
from src.inference.serve.prefix_cache import TextDigest
from src.inference.serve.request import Request
from src.inference.serve.schemas import ChatMessage
from src.inference.serve.served_model import ServedModel
from src.multimodal.config import MediaConfig
from src.multimodal.front_end import attach_front_end


@pytest.fixture(scope="module")
def model():
    model = random_model(n_layer=2, n_embd=32, head_size=16, vocab_size=259, kernel="reference")
    torch.manual_seed(0)
    attach_front_end(model, MediaConfig("patches", image_size=(16, 16), encoder_dim=16))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return coloured(tmp_path_factory.mktemp("pictures"), 6)


def conversation(model, tokenizer):
    greedy = Sampling(temperature=0)
    return Conversation(Decoder(model), tokenizer, tokenizer.chat_template, greedy, seed=0, max_new_tokens=5)


def text(pieces):
    return "".join(piece.text for piece in pieces)


def test_prompts_with_rows_in_pieces_are_the_model_called_once(model):
    rows = torch.randn(3, 32)
    prompt = [5, PLACEHOLDER, 7, PLACEHOLDER, PLACEHOLDER, 9]
    expected = model(torch.tensor([prompt]), embeds=rows)[0][0, -1]
    decoder = Decoder(model, batch=2)
    logits = decoder.prefill([prompt, [5, 6]], [rows, None])
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], model(torch.tensor([[5, 6]]))[0][0, -1], rtol=1e-4, atol=1e-4)


def test_a_chat_encodes_a_picture_once_and_continues_from_a_file(model, tokenizer, pictures, tmp_path, monkeypatch):
    calls = []
    original = media_prompt.front_end_of(model).forward
    monkeypatch.setattr(media_prompt.front_end_of(model), "forward", lambda *a: calls.append(1) or original(*a))
    chat = conversation(model, tokenizer)
    chat.attach("image", pictures.parent / "0.png")
    first = text(chat.ask("Colour?"))
    assert text(chat.retry()) == first
    chat.save(tmp_path / "chat.state")
    second = text(chat.ask("Sure?"))
    assert len(calls) == 1
    again = conversation(model, tokenizer)
    again.load(tmp_path / "chat.state")
    assert text(again.ask("Sure?")) == second
    # the state is that of the whole conversation at once
    other = conversation(model, tokenizer)
    other.attach("image", pictures.parent / "1.png")
    text(other.ask("Colour?"))
    states = [c.decoder.state.layers[-1].wkv for c in (chat, other)]
    assert not torch.allclose(*states)
    chat.reset()
    with pytest.raises(UserError, match="U\\+FFFC"):
        chat.ask("\ufffc")
    with pytest.raises(UserError, match="reads images, not sounds"):
        chat.attach("sound", pictures.parent / "1.png")
    with pytest.raises(UserError, match="missing image file"):
        chat.attach("image", pictures.parent / "none.png")


def test_answers_are_counted_with_and_without_the_picture(model, tokenizer, pictures):
    questions = list(read_questions(pictures, "image"))
    assert [q.answer for q in questions[:3]] == ["red", "green", "blue"]
    assert questions[0].text == "Colour?"
    assert questions[0].files == (pictures.parent / "0.png",)
    assert "\ufffc" not in questions[0].without_media.messages[0]["content"]
    answers = answer_all(model, tokenizer, questions, length=4, batch=4)
    assert len(answers) == 6
    rows = rows_of(model, read_for(model, "image", pictures.parent / "0.png"))
    chat = conversation(model, tokenizer)
    chat.max_new_tokens = 4
    chat.attach("image", pictures.parent / "0.png")
    assert answers[0] == text(chat.ask("Colour?")).strip()
    assert len(rows) == 4
    assert report(questions, ["red"] * 6, "x").startswith("x: 33.3% of 6")


def test_urls_are_data_or_refused():
    content = b"\x00picture"
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    assert content_of_data_url(url) == content
    for bad in ("https://example.com/x.png", "file:///etc/passwd", "", "data:image/png,abc", "data:image/png;base64,*"):
        with pytest.raises(UserError):
            content_of_data_url(bad)


def test_prompts_of_the_server(model, tokenizer, pictures):
    engine = Engine(model, tokenizer)
    try:
        served = ServedModel("m", engine, tokenizer, tokenizer.chat_template, Sampling(temperature=0))

        def message(name):
            content = base64.b64encode((pictures.parent / name).read_bytes()).decode()
            part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}
            return [ChatMessage(role="user", content=[part, {"type": "text", "text": "Colour?"}])]

        prompts = [served.chat_prompt(message(name), None, "") for name in ("0.png", "1.png", "0.png")]
        assert all(prompt.tokens == prompts[0].tokens and prompt.tokens.count(PLACEHOLDER) == 4 for prompt in prompts)
        assert len(served._rows) == 2
        digests = [TextDigest(tokenizer).add_all(p.tokens, p.media)[-1] for p in prompts]
        assert digests[0] == digests[2] != digests[1]
        part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}
        with pytest.raises(ApiError, match="data URL"):
            served.chat_prompt([ChatMessage(role="user", content=[part])], None, "")
        # the engine gives what the decoder gives, and begins at the state after the picture when it is asked again
        expected = list(generate(model, prompts[0].tokens, 3, temperature=0, embeds=prompts[0].embeds))
        for cached in (False, True):
            answer = Answer(engine, prompts[0])
            assert answer.tokens == expected
            assert (answer.cached > 4) == cached
    finally:
        engine.close()


class Answer:
    def __init__(self, engine, prompt):
        self.tokens, self.cached, self.done = [], 0, threading.Event()
        media = {"embeds": prompt.embeds, "media": prompt.media}
        engine.submit(Request(prompt.tokens, Sampling(temperature=0), 3, **media), self)
        assert self.done.wait(60)

    def started(self, cached_tokens):
        self.cached = cached_tokens

    def token(self, token, logprobs):
        self.tokens.append(token)
        return False

    def ended(self, reason, error=None):
        self.error = error
        self.done.set()

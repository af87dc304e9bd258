"""Answers that think and call functions: what prompts say, what ends an answer, how it is divided, calls read back."""

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from chat_models import CHATML, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import random_model
from test_conversation_formats import EMPTY_THOUGHT, TOOLS

from src.config.flags import THINK_MODES
from src.dataset.answer_format import answer_format, render_prompt, stop_strings
from src.dataset.chat_template import RWKV_TEMPLATE, ChatTemplate
from src.dataset.encode_conversation import chat_tokenizer, encode_conversation
from src.dataset.sft_cache import open_conversations
from src.dataset.tokenizer import Tokenizer, load_tokenizer
from src.dataset.tool_calls import parse_tool_calls
from src.errors import UserError
from src.inference.answer_stream import CONTENT, REASONING, AnswerStream
from src.inference.answer_text import AnswerText
from src.inference.chat import Conversation
from src.inference.decoder import Decoder
from src.inference.generate import main as generate_main
from src.inference.harness import HarnessMethods
from src.inference.sampling import Sampling

RWKV = ChatTemplate(RWKV_TEMPLATE, {})
# As Qwen3's: the prompt of an answer that doesn't think holds an empty thought.
SWITCH = EMPTY_THOUGHT.replace(
    "{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}",
)
THOUGHT = "<think>\none\n\ntwo\n</think>\n"
CODE = "def f():\n\n    return 1\n\nIt returns 1."


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("bpe"), SWITCH))


@pytest.fixture(scope="module")
def world() -> Tokenizer:
    pytest.importorskip("pyrwkv_tokenizer")
    tokenizer = chat_tokenizer("world")
    tokenizer.decode([1])  # reads the vocabulary, once for all modes
    return tokenizer


def with_mode(tokenizer: Tokenizer, mode: str) -> Tokenizer:
    """As `chat_tokenizer(name, mode)`."""
    assert tokenizer.chat_template is not None
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.thinking(mode)  # type: ignore[union-attr]
    return tokenizer


# Prompts


@pytest.mark.parametrize(
    ("mode", "end", "begun"),
    [
        ("", "User: a\nb\n\nAssistant:", ""),
        ("on", "User: a\nb (think)\n\nAssistant: <think", "<think"),
        ("short", "User: a\nb (think a bit)\n\nAssistant: <think", "<think"),
        ("long", "User: a\nb (think a lot)\n\nAssistant: <think", "<think"),
        ("off", "User: a\nb\n\nAssistant: <think>\n</think", "<think>\n</think"),
    ],
)
def test_prompts_of_rwkv_in_each_mode(bpe: Tokenizer, mode: str, end: str, begun: str) -> None:
    """Only the last question asks for a thought, and thoughts of earlier answers are left out."""
    history = [user("q\r\n\r\nr"), assistant(THOUGHT + CODE)]
    prompt = render_prompt(RWKV.thinking(mode), bpe, [*history, user("a\n\n\nb")])
    assert prompt.text == f"User: q\nr\n\nAssistant: {CODE}\n\n{end}"
    assert prompt.begun == begun


@pytest.mark.parametrize(
    ("source", "mode", "expected"),
    [(CHATML, "on", ""), (CHATML, "off", ""), (SWITCH, "short", "on or off"), (SWITCH, "long", "on or off")],
)
def test_a_mode_that_the_template_lacks_is_refused(source: str, mode: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        ChatTemplate(source, {}).thinking(mode)
    assert (caught.value.flag, caught.value.given, caught.value.expected) == ("think", mode, expected or None) or (
        not expected and "enable_thinking" in caught.value.problem and caught.value.flag == "think"
    )


def test_templates_of_other_models_get_enable_thinking(bpe: Tokenizer) -> None:
    template = ChatTemplate(SWITCH, bpe.specials)
    header = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    prompts = [render_prompt(template.thinking(mode), bpe, [user("q")]) for mode in ("", "on", "off")]
    assert [prompt.text for prompt in prompts] == [header, header, header + "<think>\n\n</think>\n\n"]
    assert [prompt.begun for prompt in prompts] == ["", "", "<think>\n\n</think>\n\n"]


@pytest.mark.parametrize(
    ("source", "mode", "stops"),
    [
        (RWKV_TEMPLATE, "", ("\n\n", "\n\nUser:")),
        *[(RWKV_TEMPLATE, mode, ("\n\nUser:",)) for mode in THINK_MODES],
        (SWITCH, "on", ()),  # the token <|im_end|> ends the answer
    ],
)
def test_the_texts_that_end_an_answer(bpe: Tokenizer, source: str, mode: str, stops: tuple[str, ...]) -> None:
    template = ChatTemplate(source, bpe.specials).thinking(mode)
    assert stop_strings(template, bpe) == stops
    if mode != "":
        return
    # The prompt plus an answer is the conversation as fine-tuning renders it.
    form = answer_format(template)
    assert template.render([user("q"), assistant("A")]) == f"User: q{form.header}{form.separator}A{form.end}"


# Division of answers

BLANK = ("\n\n", "\n\nUser:")


@pytest.mark.parametrize(
    ("text", "stops", "begun", "reasoning", "content", "reached"),
    [
        ("yes\n\nUser: no", BLANK, "", "", "yes", True),
        (" yes", BLANK, "", "", " yes", False),
        ("\n\nyes", BLANK, "", "", "", True),  # a World model that has nothing to say
        (THOUGHT + "\nyes\n\nno", BLANK, "", "one\n\ntwo", "yes", True),
        ("<think>a</think>\n\nyes\n\nno", BLANK, "", "a", "yes", True),
        (">\na\n\nb\n</think>\n\nyes\n\nno", BLANK, "<think", "a\n\nb", "yes", True),
        (f">\n{CODE}\n\nUser: x", BLANK[1:], "<think>\n</think", "", CODE, True),
        ("<think>a</think>\n\nUser: x", BLANK, "", "a", "", True),
        ("<think>a\n\nUser: x", BLANK, "", "a", "", True),  # a thought without end
        ("<think>a\n\nb", BLANK, "", "a\n\nb", "", False),
        ("about <think> tags</think>", BLANK, "", "", "about <think> tags</think>", False),
        ("<th", BLANK, "", "", "<th", False),
        ("\n{}\n```\n\n", BLANK, "```json", "", "```json\n{}\n```", True),
        ("yes<|im_end|>\nno", ("<|im_end|>",), "<think>\n\n</think>\n\n", "", "yes", True),
        ("", BLANK, "<think", "", "", False),
    ],
)
def test_an_answer_is_divided(
    text: str, stops: tuple[str, ...], begun: str, reasoning: str, content: str, reached: bool
) -> None:
    for size in (1, 2, 100):
        stream = AnswerStream(stops, begun)
        pieces = [piece for i in range(0, len(text), size) for piece in stream.feed(text[i : i + size])]
        pieces += stream.finish()
        assert "".join(piece.text for piece in pieces if piece.kind == REASONING) == reasoning
        assert "".join(piece.text for piece in pieces if piece.kind == CONTENT) == content
        assert stream.reached == reached
        assert (begun + text).startswith(stream.text)


PARTS = st.sampled_from(["<think>", "</think>", "<th", "\n", "\n\n", "\n\nUser:", "User", ":", "a", "b c", " ", "ab"])


@settings(max_examples=150)
@given(
    parts=st.lists(PARTS, max_size=9),
    stops=st.sampled_from([(), BLANK, BLANK[1:], ("ab", "a b"), ("b c", "\n")]),
    begun=st.sampled_from(["", "<think", "<think>\n</think", "```json"]),
)
def test_the_division_does_not_depend_on_the_pieces(parts: list[str], stops: tuple[str, ...], begun: str) -> None:
    def outcome(pieces: list[str]) -> Any:
        stream = AnswerStream(stops, begun)
        divided = [*(piece for text in pieces for piece in stream.feed(text)), *stream.finish()]
        texts = ["".join(piece.text for piece in divided if piece.kind == kind) for kind in (REASONING, CONTENT)]
        return texts, stream.text, stream.reached

    text = "".join(parts)
    assert outcome(parts) == outcome([text]) == outcome(list(text))
    (reasoning, content), _, reached = outcome(parts)
    if not begun and "<think>" not in text:
        # As one string: up to the stop string that is complete first.
        ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
        assert (reasoning, content, reached) == ("", text[: min(ends)[1]] if ends else text, bool(ends))


@pytest.mark.parametrize("colors", [False, True])
def test_a_thought_is_shown_apart(colors: bool) -> None:
    stream, text = AnswerStream(BLANK), AnswerText(colors)
    shown = "".join(text.add(piece) for piece in stream.feed(THOUGHT + "yes\n\n")) + text.finish()
    dim, reset = ("\033[2m", "\033[0m") if colors else ("", "")
    assert shown == f"{dim}thinking:\none\n\ntwo{reset}\n\nanswer:\nyes"
    plain, unfinished = AnswerText(colors), AnswerText(colors)
    assert "".join(plain.add(piece) for piece in AnswerStream().feed("yes ")) + plain.finish() == "yes "
    shown = "".join(unfinished.add(piece) for piece in AnswerStream().feed("<think>hm ")) + unfinished.finish()
    assert shown == f"{dim}thinking:\nhm{reset}"


# Fine-tuning

CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}
ADD = {"name": "add", "parameters": {"a": "int"}}
WITH_TOOLS = {
    "messages": [
        {"role": "system", "content": "Be\n\nbrief"},
        user("1+2?"),
        assistant("", tool_calls=json.dumps([{"id": "c1", "type": "function", "function": CALL}])),
        {"role": "tool", "content": '{"sum":\n\n3}', "tool_call_id": "c1"},
        assistant("3"),
    ],
    "tools": [ADD],
}
JSON_CALL = '```json\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n```'


@pytest.mark.parametrize(
    ("mode", "turns", "text", "counted"),
    [
        ("", [user("q"), assistant(THOUGHT + "a")], f"User: q\n\nAssistant:[ {THOUGHT}a\n\n]", ()),
        ("on", [user("q"), assistant(THOUGHT + CODE)],
         f"User: q (think)\n\nAssistant: <think[{THOUGHT[6:]}{CODE}\n\nUser:]", ()),
        ("short", [user("q"), assistant("a", reasoning_content="one\n\ntwo")],
         f"User: q (think a bit)\n\nAssistant: <think[{THOUGHT[6:]}a\n\nUser:]", ()),
        ("on", [user("q"), assistant("a")], "User: q\n\nAssistant:[ a\n\nUser:]", ()),
        ("off", [user("q"), assistant("a"), user("r"), assistant("b")],
         "User: q\n\nAssistant:[ a\n\nUser:] r\n\nAssistant: <think>\n</think[>\nb\n\nUser:]", ()),
        ("off", [user("q"), assistant(THOUGHT + "a")], f"User: q\n\nAssistant:[ {THOUGHT}a\n\nUser:]", ()),
        ("long", [user("q"), assistant(THOUGHT + "a"), user("r"), assistant(THOUGHT + "b")],
         f"User: q\n\nAssistant:[ a\n\nUser:] r (think a lot)\n\nAssistant: <think[{THOUGHT[6:]}b\n\nUser:]",
         ("earlier thought (left out by the chat template)",)),
        ("", WITH_TOOLS, f"System: Be\nbrief\nTools:\n[{json.dumps(ADD)}]\nReturn only a JSON function call.\n\n"
         f"User: 1+2?\n\nAssistant:[ {JSON_CALL}\n\n]User: Function output:\n"
         "{\"sum\":\n3}\n\nAssistant:[ 3\n\n]", ()),
        ("off", [user("q"), assistant("so", tool_calls=[CALL, CALL])],
         "User: q\n\nAssistant: <think>\n</think[>\nso\n```json\n"
         f"[{json.dumps(CALL)}, {json.dumps(CALL)}]\n```\n\nUser:]", ()),
    ],
)  # fmt: skip
def test_training_text_of_rwkv(world: Tokenizer, mode: str, turns: Any, text: str, counted: tuple[str, ...]) -> None:
    """In brackets: what has a loss. The prompt's part of a thought has none."""
    world = with_mode(world, mode)
    encoded = encode_conversation(world, json.dumps(turns).encode())
    flips = np.flatnonzero(np.diff(encoded.is_answer, prepend=False, append=False))
    marked = "".join(
        "[]"[i % 2] + world.decode(encoded.ids[begin:end])
        for i, (begin, end) in enumerate(zip(flips, [*flips[1:], len(encoded.ids)], strict=True))
    )
    assert world.decode(encoded.ids[: flips[0]]) + marked == text
    assert tuple(encoded.unused) == counted


@pytest.mark.parametrize("mode", ["", *THINK_MODES])
def test_a_prompt_is_the_beginning_of_the_training_text(world: Tokenizer, mode: str) -> None:
    """The tokens that the chat processes are those of fine-tuning, up to the answer and of the answer itself."""
    world = with_mode(world, mode)
    assert world.chat_template is not None
    answer = THOUGHT + CODE if mode not in ("", "off") else CODE
    turns = [user("q"), assistant("a"), user("r")]
    encoded = encode_conversation(world, json.dumps([*turns, assistant(answer)]).encode())
    prompt = render_prompt(world.chat_template, world, turns)
    ids = world.encode_rendered(prompt.text, prompt.literals)
    assert encoded.ids[: len(ids)] == ids
    assert encoded.is_answer[len(ids) :].all()
    # What the model learned to write ends where the chat ends it.
    stream = AnswerStream(stop_strings(world.chat_template, world), prompt.begun)
    pieces = [*stream.feed(world.decode(encoded.ids[len(ids) :])), *stream.finish()]
    assert stream.reached
    content = "".join(piece.text for piece in pieces if piece.kind == CONTENT)
    # Without a mode the first blank line ends an answer, as with World models.
    assert content == (CODE if mode else " " + CODE.partition("\n\n")[0])


def test_a_cache_of_another_mode_is_not_used(tmp_path: Any) -> None:
    folder = str(make_tokenizer(tmp_path / "tokenizer", RWKV_TEMPLATE))
    (tmp_path / "x.jsonl").write_text(json.dumps([user("q"), assistant("a")]) + "\n")
    tokenizer = load_tokenizer(folder)
    texts = [
        tokenizer.decode(open_conversations(str(tmp_path / "x.jsonl"), folder, workers=1, think=m).read(0)[0].tolist())
        for m in ("", "off", "")
    ]
    assert texts[0] == texts[2] == "User: q\n\nAssistant: a\n\n"
    assert texts[1] == "User: q\n\nAssistant: <think>\n</think>\na\n\nUser:"


# Calls

VALUES = st.recursive(
    st.text('a`\n{}"<>/ \\', max_size=6) | st.integers(-9, 9) | st.booleans() | st.none(),
    lambda children: st.lists(children, max_size=2) | st.dictionaries(st.text("ab`", max_size=3), children, max_size=2),
    max_leaves=4,
)
CALLS = st.fixed_dictionaries(
    {
        "name": st.text('ab`_{"\n', min_size=1, max_size=6) | st.just("```json"),
        "arguments": st.dictionaries(st.text("ab", max_size=3), VALUES, max_size=3),
    }
)
# Names as text in the template of ChatML's kind, where they stand unescaped between quotes.
PLAIN_CALLS = CALLS.filter(lambda call: not set(call["name"]) & set('"\n'))


@settings(max_examples=60)
@given(data=st.data(), content=st.sampled_from(["", "so", "so\n\n`x` {1}", THOUGHT, THOUGHT + "so"]))
@pytest.mark.parametrize(("template", "calls"), [(RWKV, CALLS), (ChatTemplate(TOOLS, {}), PLAIN_CALLS)])
def test_calls_are_parsed_from_what_was_rendered(
    template: ChatTemplate, calls: st.SearchStrategy[Any], data: st.DataObject, content: str
) -> None:
    wanted = data.draw(st.lists(calls, min_size=1, max_size=3))
    wrapped = [{"type": "function", "function": call} for call in wanted]
    for form in (wanted, wrapped):
        text = template.render([user("q"), assistant(content, tool_calls=form)])
        assert parse_tool_calls(text) == wanted


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("```json\n{\"name\": \"f\"}\n```", [{"name": "f", "arguments": {}}]),
        ("```json\n{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}", [{"name": "f", "arguments": {"a": 1}}]),
        ("<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>", [{"name": "f", "arguments": {}}]),
        ("For example\n```json\n{\"size\": 3}\n```", []),
        ("```json\n{\"name\": \"f\"", []),
        ("```json\n{\"name\": \"f\"} and more\n```", []),
        ("{\"name\": \"f\"}", []),
        ("```json\n[1]\n```\n```json\n{\"name\": \"g\"}\n```", [{"name": "g", "arguments": {}}]),
    ],
)  # fmt: skip
def test_what_is_a_call(text: str, calls: list[Any]) -> None:
    assert parse_tool_calls(text) == calls


def test_a_question_with_tools_is_answered_by_a_call_and_its_result_freely(bpe: Tokenizer) -> None:
    asked = render_prompt(RWKV, bpe, [user("1+2?")], [ADD])
    assert asked.text.endswith("Return only a JSON function call.\n\nUser: 1+2?\n\nAssistant: ```json")
    assert asked.begun == "```json"
    stream = AnswerStream(stop_strings(RWKV, bpe), asked.begun)
    stream.feed('\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n```\n\nUser:')
    assert parse_tool_calls(stream.text) == [CALL]
    turns = [user("1+2?"), assistant(stream.text), {"role": "tool", "content": "3"}]
    assert render_prompt(RWKV, bpe, turns, [ADD]).text.endswith("User: Function output:\n3\n\nAssistant:")
    assert render_prompt(RWKV.thinking("on"), bpe, [user("1+2?")], [ADD]).begun == "<think"


# Programs


def scripted(decoder: Decoder, scripts: list[list[int]]) -> list[list[int]]:
    """Makes a decoder generate the scripts, one for each answer; returns its prompts, which grow."""
    prompts: list[list[int]] = []
    original: tuple[Callable[..., Any], Callable[..., Any]] = (decoder.prefill, decoder.step)
    position = [0]

    def logits(like: torch.Tensor) -> torch.Tensor:
        script = scripts[0] if position[0] < len(scripts[0]) else [0]
        token = script[min(position[0], len(script) - 1)]
        return torch.nn.functional.one_hot(torch.tensor([token]), like.shape[1]).float()

    def prefill(batch: Any, embeds: Any = None) -> torch.Tensor:
        prompts.append(list(batch[0]))
        position[0] = 0
        return logits(original[0](batch, embeds))

    def step(tokens: Any) -> torch.Tensor:
        position[0] += 1
        return logits(original[1](tokens))

    decoder.prefill, decoder.step = prefill, step  # type: ignore[method-assign]
    return prompts


def test_a_chat_that_thinks_processes_only_the_last_turn_again(bpe: Tokenizer) -> None:
    """An answer with blank lines in thought and text; earlier thoughts are left out, without starting from zero."""
    model = random_model(n_layer=1, n_embd=64, vocab_size=400)
    talk = Conversation(Decoder(model), bpe, RWKV.thinking("on"), Sampling(temperature=0), 1, 500)
    scripts = [bpe.encode(f"{THOUGHT[6:]}{CODE}\n\nUser: never")]
    prompts = scripted(talk.decoder, scripts)
    for turn in range(4):
        pieces = list(talk.ask(f"question {turn}"))
        assert "".join(piece.text for piece in pieces if piece.kind == REASONING) == "one\n\ntwo"
        assert "".join(piece.text for piece in pieces if piece.kind == CONTENT) == CODE
        assert talk.transcript.messages[-1] == assistant(THOUGHT + CODE)
    turns = [bpe.decode(ids) for ids in prompts]
    assert turns[0] == "User: question 0 (think)\n\nAssistant: <think"
    # From the third turn on: the last question and answer without its thought, then the new question.
    assert turns[-2] == f" question 2\n\nAssistant: {CODE}\n\nUser:"
    assert turns[-1] == " question 3 (think)\n\nAssistant: <think"
    rendered = RWKV.thinking("on").render(talk.transcript.messages[:-1], add_generation_prompt=True)
    assert talk.transcript.processed.decode().startswith(rendered)
    # The state is that of the whole text.
    state = talk.decoder.state
    whole = Decoder(model)
    whole.prefill([bpe.encode(talk.transcript.processed.decode())])
    for layer, expected in zip(state.layers, whole.state.layers, strict=True):
        for a, b in zip(layer, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_mode_of_a_chat_can_be_changed(bpe: Tokenizer) -> None:
    talk = Conversation(Decoder(random_model(n_layer=1, n_embd=64, vocab_size=400)), bpe, RWKV, Sampling())
    assert talk.settings()["think"] is None
    talk.change("think", "short")
    assert talk.settings()["think"] == "short"
    assert talk.template is not None
    assert talk.template.think == "short"
    talk.change("think", "none")
    assert talk.settings()["think"] is None
    with pytest.raises(UserError) as caught:
        talk.change("think", "much")
    assert caught.value.given == "/set think much"
    talk.template = ChatTemplate(CHATML, {})
    with pytest.raises(UserError, match="enable_thinking"):
        talk.change("think", "on")


def test_harness_answers_do_not_end_within_a_thought(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = HarnessMethods(random_model(n_layer=1, n_embd=64, vocab_size=400), bpe, RWKV)
    written = bpe.encode(f" {THOUGHT}\nyes\n\nUser: never")

    def answer(network: Any, encoded: Any, *args: Any, is_complete: Any, **kwargs: Any) -> list[list[int]]:
        return [written[: next(n for n in range(len(written)) if is_complete(written[:n]))]]

    monkeypatch.setattr("src.inference.harness.generate_batch", answer)

    class Request:
        args = (methods.apply_chat_template([{"role": "user", "content": "q"}]), {"until": ["\n\n"]})

    assert methods.generate_until([Request]) == [f"{THOUGHT}\nyes"]


def test_generate_shows_the_thought_apart(tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    make_tokenizer(tmp_path / "tokenizer", RWKV_TEMPLATE)
    torch.save(random_model(n_layer=1, n_embd=64, vocab_size=400).state_dict(), tmp_path / "rwkv-final.pth")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    prompts = []

    def written(model: Any, prompt: list[int], *args: Any, **kwargs: Any) -> Any:
        prompts.append(tokenizer.decode(prompt))
        return iter(tokenizer.encode(f"{THOUGHT[6:]}{CODE}\n\nUser: never"))

    monkeypatch.setattr("src.inference.generate.generate", written)
    arguments = [str(tmp_path), "--device", "cpu", "--prompt", "q"]
    assert generate_main([*arguments, "--think", "on"]) == 0
    assert capsys.readouterr().out == f"thinking:\none\n\ntwo\n\nanswer:\n{CODE}\n"
    assert prompts == ["User: q (think)\n\nAssistant: <think"]
    (tmp_path / "plain.jinja").write_text(CHATML)
    for flags, problem in (
        (["--think", "on", "--chat_template", "none"], "needs a chat template"),
        (["--think", "on", "--chat_template", str(tmp_path / "plain.jinja")], "enable_thinking"),
        (["--chat_template", "rwkv"], "needs --think"),
    ):
        with pytest.raises(SystemExit):
            generate_main([*arguments, *flags])
        assert problem in capsys.readouterr().err

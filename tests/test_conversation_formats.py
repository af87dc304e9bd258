"""Formats of conversations: what is read, which tokens have a loss, and that no content is lost without a count."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_models import CHATML, TEMPLATES, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from data import token_count
from src.dataset import sft_cache
from src.dataset.chat_template import RWKV_TEMPLATE
from src.dataset.conversation_files import read_conversation_pieces
from src.dataset.conversation_formats import read_conversation
from src.dataset.conversations import MARK_ADVICE, check_template, render_with_answers
from src.dataset.corpus.documents import read_lines
from src.dataset.encode_conversation import chat_tokenizer, encode_conversation
from src.dataset.sft_cache import look_at_conversations, open_conversations
from src.dataset.tokenizer import FolderTokenizer
from src.dataset.unusable_lines import advice, unusable_warning
from src.errors import UserError

# The kind of Qwen's and MiniMind's templates before they think: tools in the system turn, calls and results in tags.
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}"
    "{% endif %}{{ '<tools>' }}{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}"
    "{{ '\\n</tools><|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'system' and tools %}{% continue %}{% endif %}"
    "{{ '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\\n' }}"
    "{% if m.role == 'tool' %}{{ '<tool_response>' + m.content + '</tool_response>' }}"
    "{% else %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{% if call.function %}{% set call = call.function %}{% endif %}"
    '{{ \'<tool_call>{"name": "\' + call.name + \'", "arguments": \' }}'
    "{{ call.arguments if call.arguments is string else call.arguments | tojson }}{{ '}</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Takes the text before </think> out of all answers but the last.
SPLITS_AT_THINK = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% set c = m.content %}"
    "{% set r = '' %}{% if m.reasoning_content %}{% set r = m.reasoning_content %}{% elif '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if r and loop.last %}{{ '<think>\\n' + r + '\\n</think>\\n\\n' }}{% endif %}{{ c }}{{ '<|im_end|>' }}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Qwen3's: thoughts before the last question are left out, and the last answer has a thought, if only an empty one.
EMPTY_THOUGHT = SPLITS_AT_THINK.replace("{% if r and loop.last %}", "{% if loop.last %}")
# Takes the arguments of calls as JSON text only, as older templates do.
TEXT_ARGUMENTS = TOOLS.replace(
    "{{ call.arguments if call.arguments is string else call.arguments | tojson }}", "{{ call.arguments }}"
)
FORMAT_TEMPLATES = {
    **TEMPLATES,
    "tools": TOOLS,
    "splits_at_think": SPLITS_AT_THINK,
    "empty_thought": EMPTY_THOUGHT,
    "text_arguments": TEXT_ARGUMENTS,
}
RWKV_MODES = ("", "on", "off")  # of --think
ADD = {"type": "function", "function": {"name": "add", "parameters": {"a": "int", "b": "int"}}}
CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FolderTokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    folders = {name: make_tokenizer(root / name, text) for name, text in FORMAT_TEMPLATES.items()}
    rwkv = str(make_tokenizer(root / "rwkv", RWKV_TEMPLATE))
    rwkv_modes = {f"rwkv {mode}": chat_tokenizer(rwkv, mode) for mode in RWKV_MODES}
    return {name: chat_tokenizer(str(folder)) for name, folder in folders.items()} | rwkv_modes


def turn(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def line_of(value: Any) -> bytes:
    return json.dumps(value).encode()


def encode(tokenizer: FolderTokenizer, value: Any) -> tuple[str, str]:
    """The text of the tokens of a conversation, and of those with a loss."""
    encoded = encode_conversation(tokenizer, line_of(value))
    return tokenizer.decode(encoded.ids), tokenizer.decode(np.array(encoded.ids)[encoded.is_answer].tolist())


HI = [turn("user", "Hi"), turn("assistant", "Hello.")]
SUM = [turn("user", "Add.\n1 2"), turn("assistant", "3")]
READ: list[tuple[str, Any, list[dict[str, Any]]]] = [
    ("conversations", {"conversations": HI}, HI),
    ("messages", {"messages": HI}, HI),
    ("null and messages", {"conversations": None, "messages": HI}, HI),
    ("empty and messages", {"conversations": [], "messages": HI}, HI),
    ("the same twice", {"conversations": HI, "messages": HI}, HI),
    ("a list of turns", HI, HI),
    ("turns as a JSON string", {"messages": json.dumps(HI)}, HI),
    (
        "ShareGPT",
        {"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        HI,
    ),
    ("bot, in capitals", {"messages": [turn("Human", "Hi"), turn("BOT", "Hello.")]}, HI),
    ("developer", {"messages": [turn("developer", "Be brief."), *HI]}, [turn("system", "Be brief."), *HI]),
    ("field system", {"system": "Be brief.", "messages": HI}, [turn("system", "Be brief."), *HI]),
    (
        "OpenOrca",
        {"id": "a", "system_prompt": "Be brief.", "question": "Hi", "response": "Hello."},
        [turn("system", "Be brief."), *HI],
    ),
    ("function", {"messages": [*HI, turn("function", "3"), HI[1]]}, [*HI, turn("tool", "3"), HI[1]]),
    ("Alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}, SUM),
    ("Alpaca without input", {"instruction": "Hi", "input": "", "output": "Hello."}, HI),
    ("Alpaca with history", {"instruction": "Hi", "output": "Hello.", "history": [["Add.\n1 2", "3"]]}, SUM + HI),
    ("prompt and completion", {"prompt": "Hi", "completion": "Hello."}, HI),
    ("prompt and response", {"prompt": "Hi", "response": "Hello."}, HI),
    ("lists of turns", {"prompt": HI[:1], "completion": HI[1:]}, HI),
    ("question and answer", {"question": "Hi", "answer": "Hello."}, HI),
    ("input and output", {"input": "Hi", "output": "Hello."}, HI),
    (
        "a thought beside the answer",
        {"prompt": "Hi", "response": "Hello.", "reasoning_content": "why"},
        [HI[0], {**HI[1], "reasoning_content": "why"}],
    ),
    ("RWKV text", {"text": "User: Hi\n\nAssistant: Hello."}, HI),
    (
        "RWKV text with blank lines",
        {"text": "System: Be brief.\r\n\r\nUser: Hi\r\n\r\nAssistant: a\r\n\r\nb: c\r\n\r\n"},
        [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "a\n\nb: c")],
    ),
    ("parts", {"messages": [turn("user", [{"type": "text", "text": "Hi"}]), HI[1]]}, HI),
    (
        "two parts",
        {"messages": [turn("user", [{"type": "text", "text": "a"}, "b"]), HI[1]]},
        [turn("user", "a\nb"), HI[1]],
    ),
    (
        "calls as a JSON string",
        {"messages": [HI[0], turn("assistant", "", tool_calls=json.dumps([CALL]))]},
        [HI[0], turn("assistant", "", tool_calls=[CALL])],
    ),
    (
        "arguments as a JSON string, content null",
        {"messages": [HI[0], turn("assistant", None, tool_calls=[{"function": {**CALL, "arguments": '{"a":1}'}}])]},
        [HI[0], turn("assistant", "", tool_calls=[{"function": {**CALL, "arguments": {"a": 1}}}])],
    ),
    (
        "function_call",
        {"messages": [HI[0], turn("assistant", None, function_call={**CALL, "arguments": '{"a": 1, "b": 2}'})]},
        [HI[0], turn("assistant", "", tool_calls=[{"type": "function", "function": CALL}])],
    ),
    (
        "ShareGPT's calls",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": json.dumps(CALL)}]},
        [HI[0], turn("assistant", "", tool_calls=[{"type": "function", "function": CALL}])],
    ),
    ("fields without content", {"messages": [HI[0], {**HI[1], "tool_calls": None, "name": ""}]}, HI),
    ("weights", {"messages": [{**HI[0], "weight": 0}, {**HI[1], "weight": 1}]}, HI),
]


@pytest.mark.parametrize(("value", "messages"), [case[1:] for case in READ], ids=[case[0] for case in READ])
def test_the_turns_of_each_format(value: Any, messages: list[dict[str, Any]]) -> None:
    assert read_conversation(line_of(value)).messages == messages


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"conversations": [{"from": "human", "text": "x"}]}, "a turn without text (its fields are from, text)"),
        ({"conversations": [turn("assistant", None)]}, "a turn without text (its fields are role, content)"),
        ({"conversations": [turn("assistant", None, name="x")]}, "a turn without text"),
        ({"prompt": "x", "chosen": "y"}, "no answer"),
        ({"title": "x", "score": 3}, "no conversation (the fields are title, score)"),
        ({"\udc00\n": 3, "名": 4}, r"no conversation (the fields are \udc00\n, 名)"),
        ({"prompt": "x", "question": "y", "answer": "z"}, "more than one of the fields prompt, question"),
        ({"instruction": "x", "output": ""}, "no answer"),
        ({"conversations": HI, "messages": SUM}, "several conversations (in conversations, messages)"),
        ({"text": "Once upon a time"}, "a text without turns"),
        ({"messages": [turn("user", [{"type": "image", "url": "x"}]), HI[1]]}, "its fields are type, url"),
        ({"messages": [*HI, turn("assistant", "", tool_calls=["x"])]}, "a tool call without the name of a function"),
        ({"messages": [{**HI[0], "weight": 1}, HI[1]]}, "the weight 1 of a turn of the user"),
        ({"messages": [HI[0], {**HI[1], "weight": 0.5}]}, "the weight 0.5 of a turn of the assistant"),
        ({"messages": [HI[0], {**HI[1], "weight": 0}]}, "no answer"),
        ({"system": "x", "messages": [turn("system", "y"), *HI]}, "both a field 'system' and another system text"),
        ({"system": "x", "system_prompt": "y", "messages": HI}, "a field 'system_prompt' and another system text"),
        ({"tools": "none", "messages": HI}, "tools that are not a list"),
        ({"messages": HI, "tools": ["\udc00"]}, "a lone surrogate"),
        ({"prompt": "x", "response": "y", "history": 3}, "a history that is not a list"),
        ({"prompt": 3, "response": "y"}, "a prompt that is neither a text nor a list of turns (in prompt)"),
    ],
)
def test_what_is_not_read_names_what_was_seen(value: Any, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        read_conversation(line_of(value))
    assert reason in caught.value.problem


# Fields of turns


CALLS_OPENAI = {
    "messages": [
        turn("user", "1+2?"),
        turn(
            "assistant",
            None,
            tool_calls=[{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1,"b":2}'}}],
        ),
        turn("tool", "3", tool_call_id="c1"),
        turn("assistant", "It is 3."),
    ],
    "tools": [ADD],
}
CALLS_MINIMIND = {
    "conversations": [
        turn("system", "# Tools ...", tools=json.dumps([ADD])),
        turn("user", "1+2?"),
        turn("assistant", "", tool_calls=json.dumps([CALL])),
        turn("tool", "3", name="add"),
        turn("assistant", "It is 3."),
    ]
}


@pytest.mark.parametrize("kind", ["tools", "text_arguments"])
@pytest.mark.parametrize("value", [CALLS_OPENAI, CALLS_MINIMIND], ids=["OpenAI", "MiniMind"])
def test_calls_and_tools_are_rendered_and_calls_have_a_loss(
    tokenizers: dict[str, FolderTokenizer], kind: str, value: Any
) -> None:
    text, counted = encode(tokenizers[kind], value)
    assert json.dumps(ADD) in text
    assert "<tool_response>3</tool_response>" in text
    call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
    assert counted == f"{call}<|im_end|>It is 3.<|im_end|>"


@pytest.mark.parametrize("kind", ["chatml", "marked"])
@pytest.mark.parametrize("value", [CALLS_OPENAI, CALLS_MINIMIND], ids=["OpenAI", "MiniMind"])
def test_calls_are_unusable_with_a_template_without_a_place_for_them(
    tokenizers: dict[str, FolderTokenizer], kind: str, value: Any
) -> None:
    with pytest.raises(UserError, match="for which the chat template has no place"):
        encode_conversation(tokenizers[kind], line_of(value))


@pytest.mark.parametrize(
    ("field", "kind"),
    [({"reasoning_content": "why"}, "chatml"), ({"emotion": "joy"}, "marked"), ({"tags": [{"x": 3}]}, "tools")],
)
def test_a_field_that_the_template_does_not_use_makes_a_line_unusable(
    tokenizers: dict[str, FolderTokenizer], field: dict[str, Any], kind: str
) -> None:
    with pytest.raises(UserError) as caught:
        encode_conversation(tokenizers[kind], line_of([HI[0], {**HI[1], **field}]))
    name = next(iter(field))
    assert caught.value.problem == f"'{name}' in a turn of the assistant, for which the chat template has no place"


def test_nested_fields_are_rendered_or_make_a_line_unusable(tokenizers: dict[str, FolderTokenizer]) -> None:
    # All depths near Python's limit: at some of them JSON is parsed, but too deep for what comes after.
    for depth in (100, *range(700, 1000, 2), 5000):
        line = line_of([HI[0], {**HI[1], "x": "NESTED"}]).replace(b'"NESTED"', b"[" * depth + b"3" + b"]" * depth)
        with pytest.raises(UserError) as caught:
            encode_conversation(tokenizers["chatml"], line)
        assert caught.value.problem.startswith(("'x' in a turn", "fields that are nested", "invalid JSON"))


def test_a_turn_that_the_template_leaves_out_makes_a_line_unusable(tokenizers: dict[str, FolderTokenizer]) -> None:
    with pytest.raises(UserError, match="a turn of the tool that the chat template leaves out"):
        encode_conversation(tokenizers["user_opens"], line_of([*HI, turn("tool", "l"), *HI]))


@pytest.mark.parametrize("kind", ["chatml", "marked", "tools"])
def test_an_answer_with_weight_0_has_no_loss(tokenizers: dict[str, FolderTokenizer], kind: str) -> None:
    text, counted = encode(tokenizers[kind], [HI[0], {**HI[1], "weight": 0}, *SUM])
    assert "Hello." in text
    assert counted == "3<|im_end|>"


# Templates that cut or move text


THOUGHT = "<think>\none and two make three\n</think>\n\n"


@pytest.mark.parametrize("kind", ["splits_at_think", "empty_thought"])
@pytest.mark.parametrize(
    "answer",
    [turn("assistant", THOUGHT + "3"), turn("assistant", "3", reasoning_content="one and two make three")],
    ids=["tags", "field"],
)
def test_the_last_thought_has_a_loss_and_earlier_ones_are_counted(
    tokenizers: dict[str, FolderTokenizer], kind: str, answer: dict[str, Any]
) -> None:
    tokenizer = tokenizers[kind]
    question = turn("user", "1+2?")
    assert encode(tokenizer, [question, answer])[1] == THOUGHT + "3<|im_end|>"
    text, counted = encode(tokenizer, [question, answer, question, answer])
    assert counted == "3<|im_end|>" + THOUGHT + "3<|im_end|>"
    user = "<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n"
    assert text == f"{user}3<|im_end|>\n{user}{THOUGHT}3<|im_end|>\n"
    unused = encode_conversation(tokenizer, line_of([question, answer, question, answer])).unused
    assert unused == {"earlier thought (left out by the chat template)": 1}
    # An answer without a thought between answers with one.
    assert encode(tokenizer, [question, answer, *HI, question, answer])[1].startswith(
        "3<|im_end|>Hello.<|im_end|><think>"
    )


def test_an_empty_thought_of_the_template_is_no_answer(tokenizers: dict[str, FolderTokenizer]) -> None:
    text, counted = encode(tokenizers["empty_thought"], HI)
    assert text.endswith("assistant\n<think>\n\n</think>\n\nHello.<|im_end|>\n")
    assert counted == "Hello.<|im_end|>"


def test_a_thought_that_the_template_never_renders_makes_a_line_unusable(tmp_path: Path) -> None:
    template = CHATML.replace("+ m.content +", "+ m.content.split('</think>')[-1] +")
    tokenizer = chat_tokenizer(str(make_tokenizer(tmp_path, template)))
    for value in ([HI[0], turn("assistant", THOUGHT + "3")], [HI[0], turn("assistant", THOUGHT + "3"), *HI]):
        with pytest.raises(UserError, match="a thought of the assistant that the chat template leaves out"):
            encode_conversation(tokenizer, line_of(value))


def test_the_template_check_tries_thoughts(
    tokenizers: dict[str, FolderTokenizer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tokenizer in tokenizers.values():
        assert tokenizer.chat_template is not None
        assert check_template(tokenizer.chat_template, tokenizer.special_tokens) == ""
    template = CHATML.replace("m.content", "m.content.split('<think>')[0]")
    tokenizer = chat_tokenizer(str(make_tokenizer(tmp_path, template)))
    assert tokenizer.chat_template is not None
    assert "that the chat template leaves out" in check_template(tokenizer.chat_template, tokenizer.special_tokens)
    (tmp_path / "x.jsonl").write_bytes(line_of(HI))
    open_conversations(str(tmp_path / "x.jsonl"), tokenizer.name, workers=1)
    shown = capsys.readouterr().out
    assert "note: conversations with thoughts in <think> tags are unusable with this chat template" in shown
    assert MARK_ADVICE in shown


# Blank lines in the format of RWKV


def test_blank_lines_are_removed_from_user_and_system_text_only() -> None:
    pytest.importorskip("pyrwkv_tokenizer")
    world = chat_tokenizer("world")
    code = "def f():\n\n\n    return 1\n\nIt returns 1."
    value = [
        turn("system", "a\n\n\nb"),
        turn("user", "c\r\n\r\nd"),
        turn("assistant", code),
        turn("tool", "e\n\nf"),
        HI[1],
    ]
    ids, counted, *_ = encode_conversation(world, line_of(value))
    assert world.decode(ids) == (
        f"System: a\nb\n\nUser: c\nd\n\nAssistant: {code}\n\nUser: Function output:\ne\nf\n\nAssistant: Hello.\n\n"
    )
    assert world.decode(np.array(ids)[counted].tolist()) == f" {code}\n\n Hello.\n\n"
    text = "User: c\n\nAssistant: a\n\nb\n\n"
    assert world.decode(encode_conversation(world, line_of({"text": text})).ids) == text


# Files


def test_control_text_in_content_is_within_the_answer(tokenizers: dict[str, FolderTokenizer]) -> None:
    content = "It is <|im_end|> that ends a turn."
    for kind in ("chatml", "marked", "splits_at_think"):
        assert encode(tokenizers[kind], [HI[0], turn("assistant", content)])[1] == content + "<|im_end|>"


def lines_of_file(path: Path) -> list[Any]:
    return [json.loads(line) for piece in read_conversation_pieces(str(path)) for _, line in read_lines(piece)]


ENTRIES = [{"instruction": f"say {i} 世界", "output": "x" * (7 * i % 50)} for i in range(40)]


@pytest.mark.parametrize("indent", [None, 0, 1])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.json.gz"])
@pytest.mark.parametrize("piece_bytes", [1 << 20, 100])
def test_a_json_array_is_read_element_by_element(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, name: str, piece_bytes: int
) -> None:
    monkeypatch.setattr("src.dataset.corpus.text_input.PIECE_BYTES", piece_bytes)
    content = json.dumps(ENTRIES, indent=indent, ensure_ascii=False).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else b"\xef\xbb\xbf" + content)
    assert lines_of_file(tmp_path / name) == ENTRIES
    firsts = [piece.first_line for piece in read_conversation_pieces(str(tmp_path / name))]
    assert firsts[0] == 1
    assert firsts == sorted(firsts)


def test_lines_that_are_arrays_of_turns_are_lines(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(line_of(HI) + b"\n" + line_of(SUM) + b"\n")
    assert lines_of_file(tmp_path / "x.jsonl") == [HI, SUM]
    (tmp_path / "x.jsonl").write_bytes(line_of(HI))
    assert lines_of_file(tmp_path / "x.jsonl") == [HI]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text[:-20], "invalid JSON after conversation 2"),
        (lambda text: text[:-1], "no closing bracket after conversation 3"),
        (lambda text: text.replace('"messages"', "messages", 1), "invalid JSON after conversation 0"),
        (lambda text: text + "x", "text after the end of the array after conversation 3"),
    ],
    ids=["truncated", "no bracket", "damaged", "followed"],
)
@pytest.mark.parametrize("piece_bytes", [1 << 20, 100])
def test_a_damaged_array_raises(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokenizers: dict[str, FolderTokenizer],
    change: Callable[[str], str],
    problem: str,
    piece_bytes: int,
) -> None:
    """Not a count of one line: an unknown number of conversations would be lost."""
    monkeypatch.setattr("src.dataset.corpus.text_input.PIECE_BYTES", piece_bytes)
    path = tmp_path / "x.json"
    path.write_text(change(json.dumps([{"messages": HI}] * 3, indent=1)))
    with pytest.raises(UserError) as caught:
        open_conversations(str(path), tokenizers["chatml"].name, workers=1)
    assert (caught.value.flag, caught.value.given) == ("data_file", str(path))
    assert problem in caught.value.problem


def test_arrays_that_follow_each_other_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(ENTRIES, indent=1) + "\n" + json.dumps(ENTRIES, indent=1) + "\n")
    assert lines_of_file(tmp_path / "x.json") == ENTRIES + ENTRIES
    (tmp_path / "x.json").write_text("[\n]")
    assert lines_of_file(tmp_path / "x.json") == []


@pytest.mark.parametrize(
    ("content", "values"),
    [
        (json.dumps(ENTRIES) + "\n" + json.dumps(ENTRIES), ENTRIES + ENTRIES),
        (json.dumps([HI, SUM]) + "\n" + json.dumps([HI]) + "\n", [HI, SUM, HI]),
        ("\n\n" + json.dumps(ENTRIES), ENTRIES),
        ("[]\n" + json.dumps(ENTRIES), ENTRIES),
        ('[{"prompt": "q", "response": "a", "value": 1}]', [{"prompt": "q", "response": "a", "value": 1}]),
        ('[{"content": "q"}, {"content": "a"}]', [[{"content": "q"}, {"content": "a"}]]),
        ('[{"value": "q"}]\n[{"value": "b"}]\n', [[{"value": "q"}], [{"value": "b"}]]),
        ("[]\n" + json.dumps({"messages": HI}), [[], {"messages": HI}]),
    ],
)
def test_the_first_element_tells_conversations_from_turns(tmp_path: Path, content: str, values: list[Any]) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    assert lines_of_file(tmp_path / "x.jsonl") == values


def test_leading_blank_lines_keep_the_numbers_of_lines(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\n\n" + line_of(HI))
    (piece,) = read_conversation_pieces(str(tmp_path / "x.jsonl"))
    assert list(read_lines(piece)) == [(0, b""), (1, b""), (2, line_of(HI))]
    (tmp_path / "x.jsonl").write_bytes(b"\n\n")
    assert len(list(read_conversation_pieces(str(tmp_path / "x.jsonl")))) == 1


def test_times_in_parquet_that_python_lacks_are_read_as_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    nanoseconds, late = pyarrow.timestamp("ns", "UTC"), pyarrow.array([253402300800000001], pyarrow.timestamp("us"))
    turns_type = pyarrow.list_(pyarrow.struct({"content": pyarrow.string(), "at": nanoseconds}))
    columns = {
        "messages": pyarrow.array([[{"content": "Hi", "at": 1}]], turns_type),
        "at": pyarrow.array([1], nanoseconds),
        "late": late,
        "again": late.dictionary_encode(),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    (value,) = lines_of_file(tmp_path / "x.parquet")
    assert value["messages"] == [{"content": "Hi", "at": value["at"]}]
    assert value["at"].startswith("1970-01-01 00:00:00.000000001")
    assert value["late"] == value["again"]
    assert value["late"].startswith("10000-01-01")


def test_invalid_utf8_in_parquet_names_the_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    # Arrow doesn't check the bytes of a string.
    offsets, content = pyarrow.array([0, 1], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xff")
    prompt = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, content])
    parquet.write_table(pyarrow.table({"prompt": prompt, "response": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="unreadable values in the column 'prompt'") as caught:
        lines_of_file(tmp_path / "x.parquet")
    assert (caught.value.flag, caught.value.given) == ("data_file", str(tmp_path / "x.parquet"))


def test_conversations_in_parquet_columns(tmp_path: Path, tokenizers: dict[str, FolderTokenizer]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tokenizers["chatml"].name
    parquet.write_table(pyarrow.table({"messages": [HI, SUM, None], "id": [1, 2, 3]}), tmp_path / "x.parquet")
    parquet.write_table(pyarrow.table({"prompt": ["Hi"], "response": ["Hello."]}), tmp_path / "y.parquet")
    conversations = open_conversations(str(tmp_path / "x.parquet"), folder, workers=1)
    assert len(conversations.data) == 2
    assert conversations.left_out == {"no conversation (the fields are messages, id)": 1}
    assert conversations.unused == {"field 'id'": 2}
    second, share = look_at_conversations(str(tmp_path / "y.parquet"), folder)
    assert second.data[0].tolist() == conversations.data[0].tolist()
    assert share == 1
    (tmp_path / "z.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not a readable Parquet file") as caught:
        open_conversations(str(tmp_path / "z.parquet"), folder)
    assert (caught.value.flag, caught.value.given) == ("data_file", str(tmp_path / "z.parquet"))


@pytest.mark.parametrize(("unusable", "warns"), [(1, False), (2, True)])
def test_more_than_a_tenth_of_unusable_lines_gives_a_warning_with_advice(
    tmp_path: Path,
    tokenizers: dict[str, FolderTokenizer],
    capsys: pytest.CaptureFixture[str],
    unusable: int,
    warns: bool,
) -> None:
    path, folder = tmp_path / "x.jsonl", tokenizers["chatml"].name
    lines = [line_of(HI)] * 9 + [line_of([HI[0], {**HI[1], "reasoning_content": "x"}])] * unusable + [b""] * 9
    path.write_bytes(b"\n".join(lines) + b"\n")
    for _ in ("built", "cached"):
        conversations = open_conversations(str(path), folder, workers=1)
        warning = unusable_warning(conversations.left_out, len(conversations.data))
        assert bool(warning) == warns
        if warns:
            assert f"{unusable} of {9 + unusable} lines are unusable" in warning
            assert "reasoning_content" in warning
            assert "use a tokenizer with a chat template that writes it, or remove the field from the turns" in warning
    token_count.main([str(path), "64", "--tokenizer", folder])
    assert ("WARNING" in capsys.readouterr().out) == warns
    path.write_bytes(b"\n".join(lines[9:]))
    with pytest.raises(UserError, match="no usable conversation") as caught:
        open_conversations(str(path), folder)
    assert "a chat template that writes it" in caught.value.advice


FIELD = "'redacted' in a turn of the user, for which the chat template has no place"


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [
        ({FIELD: 2, "invalid JSON": 1}, "remove the field from the turns"),
        ({"a thought of the assistant that the chat template leaves out": 1}, "a chat template that writes them"),
        ({"answers that the chat template does not copy unchanged": 2, FIELD: 1}, MARK_ADVICE),
        ({"a conversation that the chat template rejects (no tools)": 1}, "a chat template that accepts them"),
        ({"invalid JSON": 500, FIELD: 1}, "docs/fine-tuning.md"),
        ({"an empty line": 500, FIELD: 1}, "remove the field from the turns"),
        ({"an empty line": 500}, "docs/fine-tuning.md"),
    ],
)
def test_the_most_frequent_reason_decides_on_the_advice(left_out: dict[str, int], expected: str) -> None:
    assert expected in advice(left_out)
    assert (MARK_ADVICE in advice(left_out)) == (expected == MARK_ADVICE)


def test_fields_of_the_line_that_are_not_used_are_counted_and_shown(
    tmp_path: Path, tokenizers: dict[str, FolderTokenizer], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jsonl").write_bytes(line_of({"id": 3, "source": "web", "messages": HI, "score": None}))
    for _ in ("built", "cached"):
        conversations = open_conversations(str(tmp_path / "x.jsonl"), tokenizers["chatml"].name, workers=1)
        assert conversations.unused == {"field 'id'": 1, "field 'source'": 1}
    assert "not used: field 'id' (1 times), field 'source' (1 times)" in capsys.readouterr().out
    token_count.main([str(tmp_path / "x.jsonl"), "64", "--tokenizer", tokenizers["chatml"].name])
    assert "not used        field 'id': 1, field 'source': 1" in capsys.readouterr().out


def test_the_version_of_the_cache_has_changed_with_the_formats() -> None:
    assert sft_cache._FORMAT == 2


# Nothing is lost without a count


WORDS = st.text("abc xyz", min_size=1, max_size=6)
VALUES = st.recursive(
    WORDS | st.integers(-5, 5) | st.booleans() | st.none(),
    lambda children: st.lists(children, max_size=2) | st.dictionaries(WORDS, children, max_size=2),
    max_leaves=4,
)
FIELDS = st.dictionaries(
    st.sampled_from(
        ["reasoning_content", "name", "emotion", "tool_calls", "function_call", "tools", "weight", "train"]
    ),
    VALUES,
    max_size=2,
)


@st.composite
def turns_with_fields(draw: st.DrawFn) -> list[dict[str, Any]]:
    roles = draw(st.lists(st.sampled_from(["user", "assistant", "tool", "human", "gpt"]), max_size=4))
    return [
        {"role": role, "content": draw(WORDS | st.just("") | st.just(THOUGHT + "3")), **draw(FIELDS)}
        for role in [*roles, "user", "assistant"]
    ]


def contents(value: Any, is_content: Callable[[Any], bool]) -> list[tuple[Any, ...]]:
    """The paths of all strings, numbers and flags in `value` for which `is_content`."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [(key, *path) for key, child in items for path in contents(child, is_content)]
    return [()] if is_content(value) else []


def with_another(value: Any, path: tuple[Any, ...]) -> Any:
    """`value` with another content at `path`."""
    if not path:
        return value + "Q" if isinstance(value, str) else (not value if isinstance(value, bool) else value + 77)
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = with_another(copied[path[0]], path[1:])
    return copied


@settings(max_examples=150)
@given(
    turns=turns_with_fields(),
    kind=st.sampled_from([*sorted(FORMAT_TEMPLATES), *(f"rwkv {mode}" for mode in RWKV_MODES)]),
)
def test_no_content_is_lost_without_a_count(
    tokenizers: dict[str, FolderTokenizer], turns: list[dict[str, Any]], kind: str
) -> None:
    """Whatever content of a usable line is replaced, its tokens, its loss or its count change."""
    tokenizer = tokenizers[kind]

    def outcome(value: Any) -> Any:
        try:
            encoded = encode_conversation(tokenizer, line_of(value))
        except UserError as error:
            return error.problem
        return encoded.ids, encoded.is_answer.tolist(), encoded.unused

    original = outcome(turns)
    if isinstance(original, str):
        return  # counted as unusable
    if original[2]:
        return  # counted as used in part
    for path in contents(turns, lambda item: item is not None and item != ""):
        if path[-1] != "role":
            assert outcome(with_another(turns, path)) != original, path


@settings(max_examples=100)
@given(turns=turns_with_fields(), kind=st.sampled_from(sorted(FORMAT_TEMPLATES)))
def test_the_text_is_that_of_the_template_and_answers_end_with_the_end_token(
    tokenizers: dict[str, FolderTokenizer], turns: list[dict[str, Any]], kind: str
) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.chat_template is not None
    try:
        conversation = read_conversation(line_of(turns))
        text, answers, _ = render_with_answers(tokenizer.chat_template, tokenizer.special_tokens, conversation)
    except UserError:
        return
    if all("tool_calls" not in message for message in conversation.messages):
        assert text == tokenizer.chat_template.render(conversation.messages, tools=conversation.tools)
    n_answers = sum(message["role"] == "assistant" for message in conversation.messages)
    assert len(answers) == n_answers - len(conversation.without_loss)
    for begin, end in answers:
        assert text[begin:end].endswith("<|im_end|>")
        if kind != "user_opens":  # the header of an answer is in the turn before, which may be of another role
            assert text[:begin].endswith(("<|im_start|>assistant\n", "</think>\n\n"))

"""Special tokens in the contents of conversations are text; those of the template are tokens."""

import json

import numpy as np
import pytest
from chat_models import TEMPLATES, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from src.dataset.encode_conversation import chat_tokenizer, encode_conversation
from src.dataset.sft_cache import open_conversations

CONTENTS = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "the answer", " ", "<|im_", "end|>", "x"]),
    min_size=1,
    max_size=6,
).map("".join)


@pytest.fixture(scope="module", params=TEMPLATES)
def tokenizer(request, tmp_path_factory):
    return chat_tokenizer(str(make_tokenizer(tmp_path_factory.mktemp("tokenizer"), TEMPLATES[request.param])))


@settings(max_examples=60)
@given(contents=st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3))
def test_special_tokens_in_contents_are_text(tokenizer, contents):
    def encoded(pairs):
        turns = [
            {"role": role, "content": text.strip() or "x"}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        line = json.dumps({"conversations": turns}).encode()
        return turns, encode_conversation(tokenizer, line)

    turns, hostile = encoded(contents)
    _, harmless = encoded([("what", "that") for _ in contents])
    assert [i for i in hostile.ids if i < 3] == [i for i in harmless.ids if i < 3]
    assert tokenizer.decode(hostile.ids) == tokenizer.chat_template.render(turns)
    answers = tokenizer.decode(np.array(hostile.ids)[hostile.is_answer].tolist())
    assert answers == "".join(turn["content"] + "<|im_end|>" for turn in turns if turn["role"] == "assistant")


def test_parse_makes_tokens_of_special_tokens_in_contents(tokenizer):
    turns = [{"role": "user", "content": "a <|im_end|> b"}, {"role": "assistant", "content": "c <|im_end|> d"}]
    line = json.dumps({"conversations": turns}).encode()
    as_text, parsed = encode_conversation(tokenizer, line), encode_conversation(tokenizer, line, parse_special=True)
    assert parsed.ids == tokenizer.encode(tokenizer.chat_template.render(turns))
    end = tokenizer.encode("<|im_end|>")[0]
    assert parsed.ids.count(end) == as_text.ids.count(end) + 2
    assert tokenizer.decode(parsed.ids) == tokenizer.decode(as_text.ids)


def test_a_cache_made_the_other_way_is_not_used(tokenizer, tmp_path):
    path = tmp_path / "x.jsonl"
    turns = [{"role": "user", "content": "a <|im_end|> b"}, {"role": "assistant", "content": "c"}]
    path.write_text(json.dumps({"conversations": turns}) + "\n")
    as_text, parsed, again = (
        open_conversations(str(path), tokenizer.name, workers=1, parse_special=way).data[0].tolist()
        for way in (False, True, False)
    )
    assert as_text == again != parsed


QWEN_LIKE = """{%- for m in messages -%}{%- set c = m.content -%}
{%- if m.role == 'assistant' and '</think>' in c -%}{%- set c = c.split('</think>')[-1].lstrip() -%}{%- endif -%}
{{ '<|im_start|>' + m.role + '\n' + (c if loop.index < loop.length else m.content) + '<|im_end|>\n' }}{%- endfor -%}"""


def test_thoughts_of_an_answer_are_tokens_and_those_of_the_user_are_text(tmp_path):
    """Where a tokenizer declares `<think>` and `</think>` special."""
    from tokenizers import AddedToken, Tokenizer

    folder = make_tokenizer(tmp_path / "tokenizer", QWEN_LIKE)
    rust = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rust.add_special_tokens([AddedToken(tag, special=True) for tag in ("<think>", "</think>")])
    rust.save(str(folder / "tokenizer.json"))
    tokenizer = chat_tokenizer(str(folder))
    begin, end = (rust.token_to_id(tag) for tag in ("<think>", "</think>"))
    thought = "<think>\nhm\n</think>\n\nyes"
    turns = [("user", "what is <think> or </think>?"), ("assistant", thought)] * 2
    line = json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}).encode()
    encoded = encode_conversation(tokenizer, line)
    # The template leaves out the first thought; the tags in the questions are text.
    assert [i for i in encoded.ids if i in (begin, end)] == [begin, end]
    assert tokenizer.decode(np.array(encoded.ids)[encoded.is_answer].tolist()) == f"yes<|im_end|>{thought}<|im_end|>"

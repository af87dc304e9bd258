"""Tokenizers: text is restored, partial characters too, and folders agree with transformers."""

import json
import shutil
from pathlib import Path

import pytest
from chat_models import TEMPLATES, chat_ids, make_tokenizer, tokenizer_with_entries
from hypothesis import given
from hypothesis import strategies as st

from src.dataset.chat_template import ChatTemplate
from src.dataset.control_tokens import ContentMarks
from src.dataset.tokenizer import FolderTokenizer, Tokenizer, load_tokenizer
from src.dataset.tokenizer_files import MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES, TOKENIZER_FILES, copy_tokenizer
from src.errors import UserError

MESSAGES = [
    {"role": "user", "content": "what is <it>? 世界 & more"},
    {"role": "assistant", "content": "the 'answer' <|im_end|> 🙂"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "  spaced\n"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=["world", "folder"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "folder":
        return load_tokenizer(request.getfixturevalue("folder"))
    pytest.importorskip("pyrwkv_tokenizer")
    return load_tokenizer("world")


def template_of(folder: Path) -> ChatTemplate:
    template = load_tokenizer(folder).chat_template
    assert template is not None
    return template


@given(text=st.text())
def test_text_is_restored(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, ""]) == [ids, []]
    assert all(0 < i < tokenizer.vocab_size for i in ids), "0 is the end of a document, never part of text"
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == text.encode(), (
        "also where a token is part of a character"
    )


def test_unused_ids_are_decoded_without_an_error(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.vocab_size - 1, 0, 300])
    assert tokenizer.decode([]) == ""


def test_ids_outside_the_vocabulary_are_replacement_characters(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders

    if tokenizer.name == "world":
        tokenizers = [tokenizer]
    else:  # and one whose tokens have no fixed bytes
        folder = make_tokenizer(tmp_path)
        rust_tokenizer = RustTokenizer.from_file(str(folder / "tokenizer.json"))
        rust_tokenizer.decoder = decoders.Fuse()
        rust_tokenizer.save(str(folder / "tokenizer.json"))
        tokenizers = [tokenizer, load_tokenizer(folder)]
    for each in tokenizers:
        ids = each.encode("a")
        assert each.decode([-1, *ids, 70000, *ids, -65536]) == "\ufffda\ufffda\ufffd"


def test_lone_surrogates_raise(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="surrogates"):
        tokenizer.encode("\ud800")


def test_world_is_the_published_vocabulary() -> None:
    pytest.importorskip("pyrwkv_tokenizer")
    world = load_tokenizer("world")
    assert world.encode("Today is a beautiful day. 今天是美好的一天。") == [
        *[33520, 4600, 332, 59219, 21509, 47, 33],
        *[10381, 11639, 13091, 15597, 11685, 14734, 10250, 11639, 10080],
    ]
    assert (world.name, world.vocab_size, world.eos_ids, world.text_of_0) == ("world", 65536, (0,), "")
    assert world.largest_id == 65529
    assert world.decode([65529]) != "\ufffd"
    assert [world.decode_bytes([i]) for i in range(65530, 65536)] == ["\ufffd".encode()] * 6
    assert world.decode([0]) == ""


def test_the_world_template_ends_turns_with_a_blank_line() -> None:
    pytest.importorskip("pyrwkv_tokenizer")
    template = load_tokenizer("world").chat_template
    assert template is not None
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " one\r\n\r\n\ntwo\n    three \n"},
        {"role": "assistant", "content": "4\n\n5"},
    ]
    assert template.render(messages) == "System: Be brief.\n\nUser: one\ntwo\n    three\n\nAssistant: 4\n\n5\n\n"
    assert template.render(messages[:2], add_generation_prompt=True).endswith("three\n\nAssistant:")


def test_properties_of_a_folder_tokenizer(folder: Path) -> None:
    ours = load_tokenizer(folder)
    assert (ours.name, ours.vocab_size, ours.largest_id, ours.eos_ids) == (str(folder), 314, 313, (0, 2))
    assert ours.decode([0, 1, 2]) == "<|endoftext|><|im_start|><|im_end|>"


def test_a_vocabulary_whose_id_0_is_text(tmp_path: Path) -> None:
    """As in GPT-2: id 0 is "!", which doesn't end an answer."""
    ours = load_tokenizer(tokenizer_with_entries(tmp_path, ["!", "H", "i", "<end>"], "<end>"))
    assert ours.encode("Hi!") == [1, 2, 0]
    assert (ours.text_of_0, ours.eos_ids) == ("!", (3,))


def test_a_vocabulary_with_unused_ids_and_entries_outside_of_the_byte_alphabet(tmp_path: Path) -> None:
    ours = load_tokenizer(tokenizer_with_entries(tmp_path, ["<end>", "H", "", "", "<unused 1>", "i"], "<end>"))
    assert (ours.vocab_size, ours.eos_ids) == (6, (0,))
    assert ours.decode(ours.encode("Hi")) == "Hi"
    assert ours.decode([1, 3, 4, 5]) == "H\N{REPLACEMENT CHARACTER}<unused 1>i"


@pytest.mark.parametrize("kind", TEMPLATES)
def test_conversations_are_rendered_as_by_transformers(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = make_tokenizer(tmp_path, TEMPLATES[kind])
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == ours.vocab_size
    for messages in (MESSAGES, MESSAGES[:1], [{"role": "system", "content": "S"}, *MESSAGES]):
        for generation in (False, True):
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
            assert chat_ids(ours, messages, generation) == theirs.encode(text, add_special_tokens=False)


def test_a_template_in_its_own_file_and_in_a_list(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path, None)
    assert load_tokenizer(folder).chat_template is None
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert template_of(folder).render(MESSAGES) == "D"
    (folder / "chat_template.jinja").write_text("{{ eos_token }}{{ messages | tojson }}")
    assert template_of(folder).render(MESSAGES) == "<|im_end|>" + json.dumps(MESSAGES, ensure_ascii=False)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no system turn') }}", "{{ 'no system turn' + none }}", "{{ 'x'.index('y') }}"]
)
def test_a_template_that_rejects_a_conversation_raises(tmp_path: Path, template: str) -> None:
    make_tokenizer(tmp_path, template)
    with pytest.raises(UserError) as caught:
        template_of(tmp_path).render(MESSAGES)
    assert caught.value.problem.startswith("a conversation that the chat template rejects")
    assert ("no system turn" in caught.value.problem) == ("raise_exception" in template)


def test_a_template_with_a_syntax_error_names_the_tokenizer(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, "{% for %}")
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert (caught.value.flag, caught.value.given) == ("tokenizer", tmp_path)
    assert "chat template" in caught.value.problem


def test_a_copy_contains_the_tokenizer_files_only(folder: Path, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    shutil.copytree(folder, source)
    (source / "model.safetensors").write_bytes(b"gigabytes")
    copy.mkdir()
    (copy / "chat_template.jinja").write_text("of another tokenizer")
    (source / "chat_template.jinja").unlink(missing_ok=True)
    copy_tokenizer(source, copy)
    kept = {name: (source / name).read_bytes() for name in TOKENIZER_FILES if (source / name).exists()}
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == kept
    copy_tokenizer(copy, copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == kept


def test_unusable_tokenizer_folders_raise(tmp_path: Path) -> None:
    def error() -> UserError:
        with pytest.raises(UserError) as caught:
            load_tokenizer(tmp_path)
        return caught.value

    missing = error()
    assert (missing.flag, missing.given) == ("tokenizer", tmp_path)
    assert "no tokenizer.json" in missing.problem
    assert "world" in missing.expected
    (tmp_path / "tokenizer.json").write_text("{}")
    damaged = error()
    assert (damaged.flag, damaged.given) == ("tokenizer", tmp_path)
    assert "not readable" in damaged.problem
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    assert "UTF-8" in error().problem
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    unknown_token = error()
    assert (unknown_token.flag, unknown_token.given) == ("tokenizer", str(tmp_path))
    assert "'</s>'" in unknown_token.problem
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert error().given == tmp_path / "tokenizer_config.json"


HOSTILE_TOKENIZERS = {
    "an array": lambda _: [],
    "a model of another type": lambda j: j | {"model": 7},
    "merges of unknown tokens": lambda j: j | {"model": j["model"] | {"merges": [["zz", "yy"]]}},
    "a panic while it is read": lambda j: j | {"model": j["model"] | {"continuing_subword_prefix": "#" * 20}},
    "a panic while a text is read": lambda j: j | {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "an error while a text is read": lambda j: (
        j | {"model": {"type": "Unigram", "unk_id": None, "vocab": [["x", 0.0]]}, "added_tokens": []}
    ),
    "an id of four billion": lambda j: j | {"model": j["model"] | {"vocab": j["model"]["vocab"] | {"zz": 4294967295}}},
}


@pytest.mark.parametrize("kind", HOSTILE_TOKENIZERS)
def test_a_hostile_tokenizer_json_is_named(tmp_path: Path, kind: str) -> None:
    """A panic of the package's Rust code is no Exception: unless converted, it ends the program."""
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(HOSTILE_TOKENIZERS[kind](json.loads(path.read_text()))))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path).encode_batch_as_text(["what is it?"])
    assert str(caught.value.given) == str(tmp_path)
    assert "tokenizer.json" in caught.value.problem
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("use", ["encode", "encode_as_text", "encode_batch"])
def test_a_panic_is_an_error_wherever_a_text_is_read(tmp_path: Path, use: str) -> None:
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(HOSTILE_TOKENIZERS["a panic while a text is read"](json.loads(path.read_text()))))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(UserError):
        getattr(tokenizer, use)(["what"] if use == "encode_batch" else "what")


@pytest.mark.parametrize(
    "config",
    [
        [],
        7,
        {"chat_template": 7},
        {"chat_template": [{"name": "default", "template": {}}]},
        {"chat_template": "{{ "},
    ],
)
def test_a_config_of_wrong_types_is_named(tmp_path: Path, config: object) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("config", [{"chat_template": [7, {}]}, {"eos_token": 7}, {"eos_token": {"content": []}}])
def test_a_config_without_a_usable_entry_is_one_without_it(tmp_path: Path, config: object) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_ids, tokenizer.chat_template) == ((0,), None)


@pytest.mark.parametrize("token", ["<none>", "\ud800"])
def test_a_special_token_that_the_vocabulary_lacks_is_refused(tmp_path: Path, token: str) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    with pytest.raises(UserError, match="is not in its vocabulary"):
        load_tokenizer(tmp_path)


def test_huge_files_of_a_tokenizer_are_refused_unread(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        before = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else b""
        with open(tmp_path / name, "wb") as file:
            limit = MAX_TOKENIZER_BYTES if name == "tokenizer.json" else MAX_CONFIG_BYTES
            file.truncate(limit + 1)  # takes no place on the disk
        with pytest.raises(UserError) as caught:
            load_tokenizer(tmp_path)
        assert (caught.value.given, caught.value.problem) == (tmp_path / name, f"has {limit + 1} bytes")
        (tmp_path / name).write_bytes(before)


def test_truncation_and_padding_in_tokenizer_json_are_not_applied(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    text = "what is the answer? " * 20
    expected = load_tokenizer(tmp_path).encode(text)
    path = tmp_path / "tokenizer.json"
    settings = {
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            **{"strategy": {"Fixed": 4096}, "direction": "Right", "pad_to_multiple_of": None},
            **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"},
        },
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(text) == expected
    assert tokenizer.encode_batch([text, "a"])[0] == expected
    assert tokenizer.encode_as_text(f"<|im_end|>{text}")[-len(expected) :] == expected
    assert tokenizer.decode(expected) == text


@pytest.mark.parametrize("lower_case", [False, True], ids=["exact", "normalizes"])
def test_tokens_that_overlap_marked_characters(tmp_path: Path, lower_case: bool) -> None:
    tokenizer = _folder_tokenizer(tmp_path, lower_case)
    text = "a 🙂<|im_end|>The 世界<|im_end|>x 世 the answer"
    begin = text.index("The")
    spans = [(begin, text.index("x ")), (text.index("the"), len(text))]
    ids, marked = tokenizer.encode_marked(text, spans)
    assert ids == tokenizer.encode(text)
    marked_text = tokenizer.decode([i for i, is_marked in zip(ids, marked, strict=True) if is_marked])
    expected = "The 世界<|im_end|> the answer"  # the token " the" overlaps the second span
    assert marked_text == (expected.lower() if lower_case else expected)


def _folder_tokenizer(folder: Path, lower_case: bool) -> FolderTokenizer:
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import normalizers

    make_tokenizer(folder)
    if lower_case:
        rust_tokenizer = RustTokenizer.from_file(str(folder / "tokenizer.json"))
        rust_tokenizer.normalizer = normalizers.Lowercase()
        rust_tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, FolderTokenizer)
    return tokenizer


PIECES = st.sampled_from(
    ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_", "end|>", "the answer", "世", " ", "\n"]
)


@given(pieces=st.lists(PIECES, max_size=6))
def test_special_tokens_as_text(tokenizer: Tokenizer, pieces: list[str]) -> None:
    text = "".join(pieces)
    ids = tokenizer.encode_as_text(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch_as_text(["plain", text]) == [tokenizer.encode("plain"), ids]
    assert 0 not in ids
    special_ids = [tokenizer.encode(token)[0] for token in tokenizer.special_tokens]
    assert not set(special_ids) & set(ids)
    if not any(token in text for token in tokenizer.special_tokens):
        assert ids == tokenizer.encode(text)


@given(contents=st.lists(st.lists(PIECES, max_size=5).map("".join), min_size=1, max_size=4))
def test_only_the_template_writes_control_tokens(folder: Path, contents: list[str]) -> None:
    """The control tokens of a conversation are those of its template, and its text is unchanged."""
    tokenizer = load_tokenizer(folder)
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    rendered = template_of(folder).render(messages)
    marks = ContentMarks(tokenizer.special_tokens, contents)
    marked = [marks.add_to_message(message) for message in messages]
    text, literals = marks.remove(template_of(folder).render(marked))
    assert text == rendered
    ids = tokenizer.encode_rendered(text, literals)
    assert tokenizer.decode(ids) == rendered
    assert [i for i in ids if i < 3] == [1, 2] * len(messages)
    # Between control tokens, the text is tokenized as a whole: the content together with the role before it.
    segments = [f"{message['role']}\n{message['content']}" for message in messages]
    assert ids == [
        i for segment in segments for i in (1, *tokenizer.encode_as_text(segment), 2, *tokenizer.encode("\n"))
    ]


def test_a_mark_is_a_character_that_no_content_has() -> None:
    marks = ContentMarks(["<s>", "s>"], ["\ue000", "\ue001 <s>"])
    assert marks.mark == "\ue002"
    assert marks.add("\ue001 <s>") == "\ue001 <\ue002s\ue002>"
    assert marks.remove("<s>" + marks.add("\ue001 <s>") + "s>") == ("<s>\ue001 <s>s>", {5, 6})
    assert ContentMarks([], ["x"]).add("<s>") == "<s>"


def test_marks_in_values_and_spans_between_them() -> None:
    marks = ContentMarks(["<s>"], [])
    m = marks.mark
    value = {"<s>": "a<s>", "list": ["<s><s>", 1, None, {"x": "y"}]}
    assert marks.add_to_strings(value) == {"<s>": f"a<{m}s>", "list": [f"<{m}s><{m}s>", 1, None, {"x": "y"}]}
    rendered = f"<s>a<{m}s> b<{m}s>c<s>"
    text, _ = marks.remove(rendered)
    for begin in range(len(text)):
        for end in range(begin, len(text) + 1):
            part = text[begin:end]
            spans = [
                (i, j)
                for i in range(len(rendered) + 1)
                for j in range(i, len(rendered) + 1)
                if rendered[:i].replace(m, "") == text[:begin] and rendered[i:j].replace(m, "") == part
            ]
            assert set(marks.spans_without_marks(rendered, spans)) == {(begin, end)}


@pytest.mark.parametrize("lower_case", [False, True], ids=["exact", "normalizes"])
def test_spans_that_contain_special_tokens_as_text(tmp_path: Path, lower_case: bool) -> None:
    tokenizer = _folder_tokenizer(tmp_path, lower_case)
    text = "<|im_start|>世 <|im_end|>the answer<|im_end|>\n"
    literal, begin = text.index("<|im_end|>"), text.index("世")
    ids, marked = tokenizer.encode_marked(text, [(begin, len(text) - 1)], {literal})
    assert ids == tokenizer.encode_rendered(text, {literal})
    assert [i for i in ids if i < 3] == [1, 2]
    counted = [i for i, is_marked in zip(ids, marked, strict=True) if is_marked]
    assert tokenizer.decode(counted) == text[begin:-1]
    assert counted[-1] == 2

"""Tokenizers: text comes back, half characters too, and a folder gives what transformers gives."""

import json
import shutil
from pathlib import Path

import pytest
from chat_models import TEMPLATES, chat_ids, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from src.dataset.chat_template import ChatTemplate
from src.dataset.tokenizer import TOKENIZER_FILES, FolderTokenizer, Tokenizer, copy_tokenizer, load_tokenizer

TALK = [
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


@settings(deadline=None)  # the first call reads the vocabulary
@given(text=st.text())
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, ""]) == [ids, []]
    assert all(0 < i < tokenizer.vocab_size for i in ids), "0 is the end of a document, text never holds it"
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == text.encode(), "also when a token is half a character"


def test_ids_that_mean_nothing_do_not_break_the_decoder(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.vocab_size - 1, 0, 300])
    assert tokenizer.decode([]) == ""


def test_ids_outside_the_vocabulary_are_replacement_characters(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders

    if tokenizer.name == "world":
        tokenizers = [tokenizer]
    else:  # one whose tokens don't stand for bytes one by one too
        folder = make_tokenizer(tmp_path)
        rust = Rust.from_file(str(folder / "tokenizer.json"))
        rust.decoder = decoders.Fuse()
        rust.save(str(folder / "tokenizer.json"))
        tokenizers = [tokenizer, load_tokenizer(folder)]
    for each in tokenizers:
        word = each.encode("a")
        assert each.decode([-1, *word, 70000, *word, -65536]) == "\ufffda\ufffda\ufffd"


def test_lone_surrogates_are_a_value_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("\ud800")


def test_world_is_the_published_vocabulary() -> None:
    pytest.importorskip("pyrwkv_tokenizer")
    world = load_tokenizer("world")
    assert world.encode("Today is a beautiful day. 今天是美好的一天。") == [
        *[33520, 4600, 332, 59219, 21509, 47, 33],
        *[10381, 11639, 13091, 15597, 11685, 14734, 10250, 11639, 10080],
    ]
    assert (world.name, world.vocab_size, world.eos_ids, world.text_of_0) == ("world", 65536, (0,), "")
    assert world.decode([0]) == ""


def test_world_speaks_in_turns_that_a_blank_line_ends() -> None:
    pytest.importorskip("pyrwkv_tokenizer")
    template = load_tokenizer("world").chat_template
    assert template is not None
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " one\r\n\r\n\ntwo\n    three \n"},
        {"role": "assistant", "content": "4\n\n5"},
    ]
    assert template.render(talk) == "System: Be brief.\n\nUser: one\ntwo\n    three\n\nAssistant: 4\n5\n\n"
    assert template.render(talk[:2], add_generation_prompt=True).endswith("three\n\nAssistant:")


def test_a_folder_in_our_words(folder: Path) -> None:
    ours = load_tokenizer(folder)
    assert (ours.name, ours.vocab_size, ours.eos_ids) == (str(folder), 314, (0, 2))
    assert ours.decode([0, 1, 2]) == "<|endoftext|><|im_start|><|im_end|>"


def of_entries(folder: Path, entries: list[str], end: str) -> Path:
    """A byte-level folder whose vocabulary is this list, an empty entry an id that is left out; `end` is its special eos_token."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Rust

    rust = Rust(models.BPE(vocab={entry: number for number, entry in enumerate(entries) if entry}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(end, special=True)])
    rust.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    return folder


def test_a_vocabulary_whose_first_entry_is_text(tmp_path: Path) -> None:
    """As GPT-2's and its kin: 0 is "!", which ends no answer."""
    ours = load_tokenizer(of_entries(tmp_path, ["!", "H", "i", "<end>"], "<end>"))
    assert ours.encode("Hi!") == [1, 2, 0]
    assert (ours.text_of_0, ours.eos_ids) == ("!", (3,))


def test_a_vocabulary_with_gaps_and_words_that_are_no_bytes(tmp_path: Path) -> None:
    ours = load_tokenizer(of_entries(tmp_path, ["<end>", "H", "", "", "<unused 1>", "i"], "<end>"))
    assert (ours.vocab_size, ours.eos_ids) == (6, (0,))
    assert ours.decode(ours.encode("Hi")) == "Hi"
    assert ours.decode([1, 3, 4, 5]) == "H\N{REPLACEMENT CHARACTER}<unused 1>i"


@pytest.mark.parametrize("shape", TEMPLATES)
def test_conversations_are_rendered_as_by_transformers(tmp_path: Path, shape: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = make_tokenizer(tmp_path, TEMPLATES[shape])
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == ours.vocab_size
    for talk in (TALK, TALK[:1], [{"role": "system", "content": "S"}, *TALK]):
        for generation in (False, True):
            text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=generation)
            assert chat_ids(ours, talk, generation) == theirs.encode(text, add_special_tokens=False)


def test_a_template_in_its_own_file_and_the_list_form(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path, None)
    assert load_tokenizer(folder).chat_template is None
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert template_of(folder).render(TALK) == "D"
    (folder / "chat_template.jinja").write_text("{{ eos_token }}{{ messages | tojson }}")
    assert template_of(folder).render(TALK) == "<|im_end|>" + json.dumps(TALK, ensure_ascii=False)


@pytest.mark.parametrize(
    ("template", "words"),
    [("{% for %}", "can't be read"), ("{{ raise_exception('no system turn') }}", "no system turn")],
)
def test_a_template_that_fails_says_why(tmp_path: Path, template: str, words: str) -> None:
    make_tokenizer(tmp_path, template)
    with pytest.raises(ValueError, match=words):
        template_of(tmp_path).render(TALK)


def test_a_copy_is_the_tokenizer_and_nothing_else(folder: Path, tmp_path: Path) -> None:
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


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json in it.*world"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json can't be read"):
        load_tokenizer(tmp_path)
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(ValueError, match="eos_token '</s>' is not in its vocabulary"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("lower_case", [False, True], ids=["exact", "changes the text"])
def test_tokens_of_marked_characters(tmp_path: Path, lower_case: bool) -> None:
    from tokenizers import Tokenizer as Rust
    from tokenizers import normalizers

    folder = make_tokenizer(tmp_path)
    if lower_case:
        rust = Rust.from_file(str(folder / "tokenizer.json"))
        rust.normalizer = normalizers.Lowercase()
        rust.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, FolderTokenizer)
    text = "a 🙂<|im_end|>The 世界<|im_end|>x 世 the answer"
    begin = text.index("The")
    spans = [(begin, text.index("x ")), (text.index("the"), len(text))]
    ids, marked = tokenizer.encode_marked(text, spans)
    assert ids == tokenizer.encode(text)
    heard = tokenizer.decode([i for i, is_marked in zip(ids, marked, strict=True) if is_marked])
    expected = "The 世界<|im_end|> the answer"  # the token " the" begins before the mark and belongs to it
    assert heard == (expected.lower() if lower_case else expected)

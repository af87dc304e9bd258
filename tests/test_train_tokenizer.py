"""A tokenizer of one's own: it spells any text, knows the tokens of a conversation, and the other tools take it."""

import json
import re
from pathlib import Path

import pytest

from data import make_data, train_tokenizer
from src.dataset import MMapIndexedDataset
from src.dataset.sft_cache import chat_tokenizer
from src.dataset.tokenizer import load_tokenizer

TEXTS = [
    f"{word} {number} ist der Text, 文本 {number} 也在这里，и ещё один.\n" for word in "abc" for number in range(40)
]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def test_it_spells_any_text_and_the_other_tools_take_it(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tokenizer"
    train_tokenizer.main([str(mine), "--out", str(folder), "--vocab_size", "300"])
    assert f"--tokenizer {folder}" in capsys.readouterr().out
    tokenizer = chat_tokenizer(str(folder))  # its template can be masked for fine-tuning
    assert tokenizer.vocab_size == 300
    assert tokenizer.eos_ids == (0, 2)
    assert [tokenizer.decode([number]) for number in range(3)] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode(TEXTS[7] + "ü🙂")) == TEXTS[7] + "ü🙂"
    assert len(tokenizer.encode(TEXTS[7])) < len(TEXTS[7].encode()), "it has learned more than bytes"
    make_data.main([str(mine), "1", "16", "--tokenizer", str(folder), "--holdout", "0.1", "--workers", "1"])
    data, heldout = MMapIndexedDataset(tmp_path / "mine"), MMapIndexedDataset(tmp_path / "mine-heldout")
    assert len(data) + len(heldout) == len(TEXTS)
    assert data[0][-1] == 0


def test_little_text_gives_fewer_entries_and_says_so(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tokenizer.main([str(mine), "--out", str(tmp_path / "few"), "--vocab_size", "50000"])
    entries = load_tokenizer(tmp_path / "few").vocab_size
    assert f"note: {entries} entries: there is too little text for 50000" in capsys.readouterr().out


def test_no_more_text_is_read_than_was_asked_for(mine: Path) -> None:
    half = sum(len(text.encode()) for text in TEXTS) / 2
    read = list(train_tokenizer.texts_of(str(mine), "text", half))
    assert read == TEXTS[: len(read)]
    assert sum(len(text.encode()) for text in read[:-1]) < half <= sum(len(text.encode()) for text in read)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--vocab_size", "258"], "--vocab_size 258: expected at least 259"),
        (["--megabytes", "0"], "--megabytes 0.0: expected more than 0"),
        (["--field", "body"], 'no text in .*mine.jsonl; expected lines like {"body"'),
        (["nothing.jsonl"], "nothing.jsonl does not exist"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_named(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_tokenizer.main([str(mine), *changed, "--out", str(tmp_path / "tokenizer")])
    assert stopped.value.code == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "tokenizer").exists()


def test_a_tokenizer_that_is_there_stays(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tokenizer.main([str(mine), "--out", str(tmp_path / "tokenizer"), "--vocab_size", "300"])
    before = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    with pytest.raises(SystemExit):
        train_tokenizer.main([str(mine), "--out", str(tmp_path / "tokenizer")])
    assert "holds a tokenizer already" in capsys.readouterr().err
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_bytes() == before

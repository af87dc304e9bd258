"""train_tokenizer: the tokenizer encodes any text, has a chat template, and works with the other programs."""

import json
from pathlib import Path

import pytest

from data import make_data, train_tokenizer
from src.dataset import MMapIndexedDataset
from src.dataset.encode_conversation import chat_tokenizer
from src.dataset.tokenizer import load_tokenizer

TEXTS = [
    f"{word} {number} ist der Text, 文本 {number} 也在这里，и ещё один.\n" for word in "abc" for number in range(40)
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def test_it_encodes_any_text_and_works_with_the_other_programs(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tokenizer"
    train_tokenizer.main([str(source), "--out", str(folder), "--vocab_size", "300"])
    assert f"--tokenizer {folder}" in capsys.readouterr().out
    tokenizer = chat_tokenizer(str(folder))  # its template marks the answers
    assert tokenizer.vocab_size == 300
    assert tokenizer.eos_ids == (0, 2)
    assert [tokenizer.decode([number]) for number in range(3)] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode(TEXTS[7] + "ü🙂")) == TEXTS[7] + "ü🙂"
    assert len(tokenizer.encode(TEXTS[7])) < len(TEXTS[7].encode()), "it has entries longer than a byte"
    make_data.main([str(source), "1", "16", "--tokenizer", str(folder), "--holdout", "0.1", "--workers", "1"])
    data, heldout = MMapIndexedDataset(tmp_path / "x"), MMapIndexedDataset(tmp_path / "x-heldout")
    assert len(data) + len(heldout) == len(TEXTS)
    assert data[0][-1] == 0


def test_short_text_gives_fewer_entries_with_a_note(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tokenizer.main([str(source), "--out", str(tmp_path / "few"), "--vocab_size", "50000"])
    entries = load_tokenizer(tmp_path / "few").vocab_size
    assert f"note: {entries} entries" in capsys.readouterr().out


def test_reading_stops_at_the_given_size(source: Path) -> None:
    half = sum(len(text.encode()) for text in TEXTS) / 2
    read = list(train_tokenizer.read_texts(str(source), "text", half))
    assert read == TEXTS[: len(read)]
    assert sum(len(text.encode()) for text in read[:-1]) < half <= sum(len(text.encode()) for text in read)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab_size", "258"], "--vocab_size 258: expected at least 259"),
        (["--megabytes", "0"], "--megabytes 0.0: expected more than 0"),
        (["--field", "body"], 'x.jsonl: no text; expected lines like {"body"'),
        (["missing.jsonl"], "missing.jsonl: no such file"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_arguments_exit_with_code_2(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_tokenizer.main([str(source), *arguments, "--out", str(tmp_path / "tokenizer")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tokenizer").exists()


def test_an_existing_tokenizer_is_kept(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tokenizer.main([str(source), "--out", str(tmp_path / "tokenizer"), "--vocab_size", "300"])
    before = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    with pytest.raises(SystemExit):
        train_tokenizer.main([str(source), "--out", str(tmp_path / "tokenizer")])
    assert f"--out {tmp_path / 'tokenizer'}: already contains a tokenizer" in capsys.readouterr().err
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_bytes() == before

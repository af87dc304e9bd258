"""inspect_data tells what is in a token file."""

import json
import sys
from pathlib import Path

import pytest
from chat_models import make_tokenizer

from data import inspect_data
from src.dataset import BinIdxWriter
from src.dataset.sft_cache import open_conversations
from src.dataset.tokenizer import load_tokenizer


def test_numbers_and_windows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tokenizer(tmp_path / "tokenizer")
    ids = load_tokenizer(folder).encode("what is the answer?")
    documents = [[*ids, 0], [0], [*ids, *ids, 0], ids]
    with BinIdxWriter(tmp_path / "x", "uint16") as out:
        for document in documents:
            out.add_document(document)
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "x"), "--tokenizer", str(folder), "--windows", "2"])
    inspect_data.main()
    told = capsys.readouterr().out
    assert f"4 documents, {sum(map(len, documents))} tokens of type uint16, ids 0 to {max(ids)}" in told
    assert "do not end with token 0: 1" in told
    assert f"longest {2 * len(ids) + 1}" in told
    assert "token 0: 'what is the answer?<|endoftext|>" in told
    counts = [int(line.split()[3]) for line in told.splitlines() if "#" in line]
    assert sum(counts) == 4


def test_mistakes_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "x")])
    with pytest.raises(SystemExit):
        inspect_data.main()
    assert "does not exist" in capsys.readouterr().err


def test_a_cache_of_fine_tuning_data_is_none_to_look_into(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tokenizer(tmp_path / "tokenizer")
    talk = {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "the answer"}]}
    (tmp_path / "x.jsonl").write_text(json.dumps(talk) + "\n")
    open_conversations(str(tmp_path / "x.jsonl"), str(folder), workers=1)
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "x.jsonl.sft"), "--tokenizer", str(folder)])
    with pytest.raises(SystemExit):
        inspect_data.main()
    assert "holds negative ids, as the cache of fine-tuning data" in capsys.readouterr().err

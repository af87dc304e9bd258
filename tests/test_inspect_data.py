"""inspect_data: the numbers of a token file, windows as text, and wrong arguments."""

import json
import sys
from pathlib import Path

import pytest
from chat_models import make_tokenizer

from data import inspect_data
from src.dataset import BinIdxWriter
from src.dataset.sft_cache import open_conversations
from src.dataset.tokenizer import load_tokenizer


def test_output_has_numbers_histogram_and_windows(
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
    output = capsys.readouterr().out
    assert f"4 documents, {sum(map(len, documents))} tokens of type uint16, ids 0 to {max(ids)}" in output
    assert "do not end with token 0: 1" in output
    assert f"longest {2 * len(ids) + 1}" in output
    assert "token 0: 'what is the answer?<|endoftext|>" in output
    counts = [int(line.split()[3]) for line in output.splitlines() if "#" in line]
    assert sum(counts) == 4


def test_a_missing_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "x")])
    with pytest.raises(SystemExit):
        inspect_data.main()
    assert f"{tmp_path / 'x'}.bin: no such file" in capsys.readouterr().err


def test_a_folder_is_named_as_one_with_the_datasets_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "data"), "--tokenizer", str(folder)])
    with pytest.raises(SystemExit):
        inspect_data.main()
    assert f"{tmp_path / 'data'}: is a folder" in capsys.readouterr().err
    with BinIdxWriter(tmp_path / "data" / "my.text", "uint16") as out:
        out.add_document([5, 0])
    with pytest.raises(SystemExit):
        inspect_data.main()
    assert f"name a dataset in it, such as {tmp_path / 'data' / 'my.text'} (one of 1)" in capsys.readouterr().err
    with BinIdxWriter(tmp_path / "data", "uint16") as out:  # data.bin next to data/
        out.add_document([5, 0])
    inspect_data.main()
    assert "1 documents, 2 tokens" in capsys.readouterr().out


def test_a_cache_of_fine_tuning_data_is_recognized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tokenizer(tmp_path / "tokenizer")
    conversation = {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "the answer"}]}
    (tmp_path / "x.jsonl").write_text(json.dumps(conversation) + "\n")
    open_conversations(str(tmp_path / "x.jsonl"), str(folder), workers=1)
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "x.jsonl.sft"), "--tokenizer", str(folder)])
    with pytest.raises(SystemExit):
        inspect_data.main()
    message = capsys.readouterr().err
    assert "negative ids" in message
    assert "data/token_count.py" in message

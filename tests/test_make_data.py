"""make_data: every document is written, in an order that depends on the seed, and invalid lines are reported."""

import gzip
import io
import json
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_models import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from data import make_data, train_tokenizer
from src.dataset import MMapIndexedDataset
from src.dataset.corpus import external_shuffle, text_input
from src.dataset.tokenizer import load_tokenizer
from src.errors import UserError
from src.files import file_lock

SCRIPT = Path(make_data.__file__)
PROPERTY = settings(max_examples=40)
TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make(source: object, tokenizer: str, out: Path, *flags: object, n_epoch: int = 1, ctx_len: int = 1) -> bytes:
    """Runs make_data in this process; returns the content of both files."""
    arguments = [source, n_epoch, ctx_len, "--tokenizer", tokenizer, "--out", out, "--workers", 1, *flags]
    make_data.main([str(argument) for argument in arguments])
    return out.with_suffix(".bin").read_bytes() + out.with_suffix(".idx").read_bytes()


def documents(prefix: Path, tokenizer: str) -> list[str]:
    data, decoder = MMapIndexedDataset(prefix), load_tokenizer(tokenizer)
    assert all(data[i][-1] == 0 for i in range(len(data)))
    return [decoder.decode(data[i][:-1].tolist()) for i in range(len(data))]


@PROPERTY
@given(texts=st.lists(TEXTS, min_size=3, max_size=30), n_epoch=st.integers(1, 3), size=st.integers(1, 200))
def test_every_document_once_per_epoch_for_any_sizes_of_runs_and_pieces(
    tmp_path: Path, tokenizer: str, texts: list[str], n_epoch: int, size: int
) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    whole = make(source, tokenizer, tmp_path / "whole", n_epoch=n_epoch)
    out = documents(tmp_path / "whole", tokenizer)
    for epoch in range(n_epoch):
        assert Counter(out[epoch * len(texts) : (epoch + 1) * len(texts)]) == Counter(texts)
    with pytest.MonkeyPatch.context() as patch:  # many runs, many ranges, many pieces
        patch.setattr(external_shuffle, "RUN_BYTES", size)
        patch.setattr(external_shuffle, "_JOINED_DOCUMENTS", 2)
        patch.setattr(text_input, "PIECE_BYTES", size)
        assert make(source, tokenizer, tmp_path / "parts", n_epoch=n_epoch) == whole
    assert sorted(path.name for path in tmp_path.iterdir() if "making" in path.name or "part" in path.suffix) == []


@pytest.mark.parametrize("flags", [("--workers", 2), ("--workers", 3, "--holdout", 0.3), ("--holdout", 0.3)])
def test_the_number_of_workers_does_not_change_the_result(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch, flags: tuple
) -> None:
    monkeypatch.setattr(text_input, "PIECE_BYTES", 1000)
    source = write_jsonl(tmp_path / "x.jsonl", [f"text number {i} " * (i % 7 + 1) for i in range(500)])
    single = make(source, tokenizer, tmp_path / "a", *flags, "--workers", 1, n_epoch=2)
    assert make(source, tokenizer, tmp_path / "b", *flags, n_epoch=2) == single


def test_epochs_and_seeds_give_different_random_orders(tmp_path: Path, tokenizer: str) -> None:
    texts = [f"{i:04}" for i in range(1000)]
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    make(source, tokenizer, tmp_path / "a", n_epoch=2)
    make(source, tokenizer, tmp_path / "b", "--seed", 1)
    out = documents(tmp_path / "a", tokenizer)
    orders = [texts, out[:1000], out[1000:], documents(tmp_path / "b", tokenizer)]
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            unmoved = sum(a == b for a, b in zip(one, other, strict=True))
            assert unmoved < 10, "a random order keeps about one document in place"


def test_special_tokens_in_a_document_are_text(tmp_path: Path, tokenizer: str) -> None:
    """A document that quotes the end token doesn't end there; with `--special_tokens parse` it does, as before."""
    texts = ["before<|endoftext|>after", "<|im_start|>user what?<|im_end|>", "plain"]
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    make(source, tokenizer, tmp_path / "text")
    data, encoder = MMapIndexedDataset(tmp_path / "text"), load_tokenizer(tokenizer)
    assert sorted(documents(tmp_path / "text", tokenizer)) == sorted(texts)
    assert [i for i in data.tokens if i < 3] == [0, 0, 0], "the end of each document, and no other special id"
    make(source, tokenizer, tmp_path / "parsed", "--special_tokens", "parse")
    data = MMapIndexedDataset(tmp_path / "parsed")
    parsed = sorted(data[i].tolist() for i in range(3))
    assert parsed == sorted([*encoder.encode(text), 0] for text in texts)
    assert sorted(i for i in data.tokens if i < 3) == [0, 0, 0, 0, 1, 2]


def test_held_out_documents_are_not_in_the_training_data(tmp_path: Path, tokenizer: str) -> None:
    texts = [f"text {i % 800}" for i in range(1600)]  # each of them twice
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    make(source, tokenizer, tmp_path / "a", "--holdout", 0.1, n_epoch=2)
    held, kept = documents(tmp_path / "a-heldout", tokenizer), documents(tmp_path / "a", tokenizer)
    assert set(held).isdisjoint(kept)
    assert Counter(held + kept[: len(kept) // 2]) == Counter(texts)
    assert len(held) / len(texts) == pytest.approx(0.1, abs=0.04)


def test_held_out_data_of_an_earlier_call(
    tmp_path: Path, tokenizer: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --holdout it is kept, with a note; with it, the index is deleted before training data is written."""
    source = write_jsonl(tmp_path / "x.jsonl", [f"text {i}" for i in range(400)])
    make(source, tokenizer, tmp_path / "a", "--holdout", 0.1)
    held = (tmp_path / "a-heldout.bin").read_bytes()
    assert "exists from before" not in capfd.readouterr().out
    make(source, tokenizer, tmp_path / "a")
    assert "a-heldout.bin exists from before" in capfd.readouterr().out
    assert (tmp_path / "a-heldout.bin").read_bytes() == held

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(make_data, "write_dataset", interrupt)
    with pytest.raises(SystemExit, match="interrupted"):
        make(source, tokenizer, tmp_path / "a", "--holdout", 0.1, "--seed", 5)
    assert not (tmp_path / "a-heldout.idx").exists()


def test_all_kinds_of_input_give_the_same_result(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"text {i} 世界" * 3 for i in range(300)]
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    content = source.read_bytes()
    expected = make(source, tokenizer, tmp_path / "expected")
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(content[:4000]) + gzip.compress(content[4000:]))
    assert make(tmp_path / "y.jsonl.gz", tokenizer, tmp_path / "gz") == expected
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n").rstrip(b"\r\n"))
    assert make(tmp_path / "bom.jsonl", tokenizer, tmp_path / "bom") == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert make("-", tokenizer, tmp_path / "stdin") == expected
    names = []
    for i, text in enumerate(texts):
        names.append(tmp_path / f"{i}.txt")
        names[-1].write_text(text, encoding="utf-8")
    assert make(names[0], tokenizer, tmp_path / "one")
    make_data.main([*map(str, names), "1", "1", "--tokenizer", tokenizer, "--out", str(tmp_path / "txt")])
    assert (tmp_path / "txt.bin").read_bytes() == (tmp_path / "expected.bin").read_bytes()


@pytest.mark.parametrize(("limit", "value"), [("RUN_BYTES", 100), ("RUN_DOCUMENTS", 7)])
def test_a_run_of_the_shuffle_is_written_when_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    """Whatever is added: what is in memory never exceeds the limit by more than one batch."""
    monkeypatch.setattr(external_shuffle, limit, value)
    written = []
    write_run = external_shuffle._Epoch.write_run

    def recorded(self: Any, tokens: bytes, sizes: Any, keys: Any, itemsize: int) -> None:
        written.append((len(tokens), len(sizes)))
        write_run(self, tokens, sizes, keys, itemsize)

    monkeypatch.setattr(external_shuffle._Epoch, "write_run", recorded)
    shuffle = external_shuffle.ExternalShuffle(tmp_path, "x", 2, epochs=1, seed=0)
    for n in range(50):  # of 3 documents, 18 bytes
        tokens = np.arange(9 * n, 9 * n + 9, dtype=np.uint16)
        shuffle.add(tokens.tobytes(), np.array([2, 3, 4], np.int32), np.arange(3 * n, 3 * n + 3, dtype=np.uint64))
        assert len(written) == (n + 1) // (6 if limit == "RUN_BYTES" else 3)
    batches = list(shuffle.shuffled())
    assert sum(size for size, _ in written) == 50 * 18
    sizes = np.concatenate([sizes for _, sizes in batches])
    ids = np.frombuffer(b"".join(tokens for tokens, _ in batches), np.uint16)
    assert sorted(sizes.tolist()) == sorted([2, 3, 4] * 50)
    assert sorted(ids.tolist()) == list(range(450))
    assert list(tmp_path.iterdir()) == []  # deleted with the last document of the epoch


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".json.gz"])
def test_a_compressed_line_beyond_the_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """Before it is in memory: a few kB that unpack to 100 MB, with a limit of a hundredth of the real one."""
    zstandard = pytest.importorskip("zstandard")
    from src.dataset.conversation_files import read_conversation_pieces

    monkeypatch.setattr(text_input, "MAX_LINE_BYTES", 1 << 21)
    compress = zstandard.compress if ending.endswith("zst") else gzip.compress
    path = tmp_path / f"x{ending}"
    path.write_bytes(compress(b'{"text": "a"}\n{"text": "' + b"a" * 100_000_000 + b'"}\n'))
    read = read_conversation_pieces if ending == ".json.gz" else lambda path: text_input.read_pieces([path], "text")
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            list(read(str(path)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.given == str(path)
    assert caught.value.problem.startswith("line 2 has more than")
    assert peak < (90_000_000 if ending.endswith("zst") else 10_000_000)  # zst: of 1 kB at once


def test_zst_files_are_read_in_pieces_of_the_usual_size(tmp_path: Path) -> None:
    """Although they are decompressed in small steps: each piece is sent to a worker."""
    zstandard = pytest.importorskip("zstandard")
    content = b"".join(b'{"text": "%d"}\n' % (i * 7919 % 1_000_003) for i in range(300_000))
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(zstandard.compress(content))
    pieces = [piece.lines for piece in text_input.read_pieces([str(path)], "text")]
    assert b"".join(pieces) == content
    assert len(pieces) <= len(content) // text_input.PIECE_BYTES + 1


def test_zst_files_and_truncated_ones(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    zstandard = pytest.importorskip("zstandard")
    source = write_jsonl(tmp_path / "x.jsonl", [f"text {i}" for i in range(3000)])
    content = source.read_bytes()
    compressed = zstandard.compress(content[:10000]) + zstandard.compress(content[10000:])
    (tmp_path / "y.jsonl.zst").write_bytes(compressed)
    assert make(tmp_path / "y.jsonl.zst", tokenizer, tmp_path / "y") == make(source, tokenizer, tmp_path / "x")
    (tmp_path / "y.jsonl.zst").write_bytes(compressed[:-20])
    with pytest.raises(SystemExit):
        make(tmp_path / "y.jsonl.zst", tokenizer, tmp_path / "cut")
    assert "y.jsonl.zst: damaged or truncated" in capsys.readouterr().err


def test_parquet(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"text {i}" for i in range(2000)]
    expected = make(write_jsonl(tmp_path / "x.jsonl", texts), tokenizer, tmp_path / "x")
    file = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"content": texts, "other": range(2000)}), file, row_group_size=300)
    assert make(file, tokenizer, tmp_path / "y", "--field", "content") == expected
    with pytest.raises(SystemExit):
        make(file, tokenizer, tmp_path / "z")
    assert "x.parquet: no column 'text'; the columns are ['content', 'other']" in capsys.readouterr().err
    monkeypatch.setattr("src.dataset.parquet.BATCH_BYTES", 500)  # a few rows of a row group at a time
    assert make(file, tokenizer, tmp_path / "w", "--field", "content") == expected
    monkeypatch.setattr("src.dataset.parquet.MOST_BYTES", 500)
    with pytest.raises(SystemExit):
        make(file, tokenizer, tmp_path / "z", "--field", "content")
    assert "bytes without compression; expected at most 500" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SystemExit):
        make(file, tokenizer, tmp_path / "z", "--field", "content")
    assert "x.parquet: not a readable Parquet file" in capsys.readouterr().err


NOT_TEXT = {
    "struct": (lambda pyarrow: pyarrow.array([{"x": "a"}, {"x": "b"}]), "struct<x: string>"),
    "list": (lambda pyarrow: pyarrow.array([["a"], ["b"]]), "list<"),  # its items have other names in other versions
    "integers": (lambda pyarrow: pyarrow.array([1, 2]), "int64"),
    "numbers": (lambda pyarrow: pyarrow.array([1.5, None]), "double"),
    "truth values": (lambda pyarrow: pyarrow.array([True, False]), "bool"),
    "times": (lambda pyarrow: pyarrow.array([0, 1], pyarrow.timestamp("ms")), "timestamp[ms]"),
    "dates": (lambda pyarrow: pyarrow.array([0, 1], pyarrow.date32()), "date32[day]"),
}


@pytest.mark.parametrize(("column", "name"), NOT_TEXT.values(), ids=NOT_TEXT)
def test_a_parquet_column_that_is_no_text_is_named_with_its_type(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], column: Callable, name: str
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file, texts = tmp_path / "x.parquet", ["one", "two"]
    parquet.write_table(pyarrow.table({"text": column(pyarrow), "content": texts}), file)
    for main in (
        lambda: make(file, tokenizer, tmp_path / "out"),
        lambda: train_tokenizer.main([str(file), "--out", str(tmp_path / "new"), "--vocab_size", "300"]),
    ):
        with pytest.raises(SystemExit) as exited:
            main()
        assert exited.value.code == 2
        message = capsys.readouterr().err
        assert f"{file}: the column 'text' has the type {name}" in message
        assert "--field; it has ['content']" in message
        assert "Traceback" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.parquet"]
    make(file, tokenizer, tmp_path / "out", "--field", "content")
    assert sorted(documents(tmp_path / "out", tokenizer)) == texts


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "large_binary", "dictionary", "fixed"])
def test_every_kind_of_text_column_is_read(tmp_path: Path, tokenizer: str, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = ["one", "two"]
    types = {"dictionary": pyarrow.string(), "fixed": pyarrow.binary(3)}
    values = texts if kind.endswith(("string", "dictionary")) else [text.encode() for text in texts]
    column = pyarrow.array([*values, None], types.get(kind) or getattr(pyarrow, kind)())
    if kind == "dictionary":
        column = column.dictionary_encode()
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    make(tmp_path / "x.parquet", tokenizer, tmp_path / "out")
    assert sorted(documents(tmp_path / "out", tokenizer)) == texts


def test_a_folder_is_named_as_one_with_its_kind_of_files(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "corpus.jsonl"  # an ending doesn't make it a file
    folder.mkdir()
    for command in (make_data.main, train_tokenizer.main):
        arguments = [str(folder), "1", "1"] if command is make_data.main else [str(folder), "--out", "new"]
        with pytest.raises(SystemExit):
            command(arguments)
        assert f"{folder}: is a folder; name files that end in .jsonl" in capsys.readouterr().err
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl", "d.JSONL", "e.csv", "f.csv", "g.csv", "h.csv"):
        (folder / name).write_bytes(b"")
    with pytest.raises(SystemExit):
        make_data.main([str(folder), "1", "1"])
    assert f"{folder}: is a folder; name its files, for example {folder}/*.jsonl\n" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


INVALID = {
    b"not json": "invalid JSON",
    b"[" * 5000: "invalid JSON",
    b"3": "a JSON value that is not an object",
    b'{"txt": "a"}': "no field 'text'",
    b'{"text": 3}': "a text that is not a string",
    b'{"text": null}': "a text that is not a string",
    b'{"text": ""}': "an empty text",
    b'{"text": "\xff"}': "invalid UTF-8",
    b'{"text": "\\ud800"}': "a lone surrogate",
    b"": "an empty line",
}


@pytest.mark.parametrize(("line", "reason"), INVALID.items(), ids=range(len(INVALID)))
def test_invalid_lines_are_shown_counted_or_errors(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], line: bytes, reason: str
) -> None:
    source = tmp_path / "x.jsonl"
    source.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "fine"}\n')
    make(source, tokenizer, tmp_path / "x")
    output = capsys.readouterr()
    assert f"x.jsonl:2: {reason}" in output.err
    assert f"1 line left out: 1 with {reason}" in output.out
    assert sorted(documents(tmp_path / "x", tokenizer)) == ["fine", "good"]
    with pytest.raises(SystemExit):
        make(source, tokenizer, tmp_path / "stopped", "--on_error", "stop")
    assert f"x.jsonl:2: {reason}" in capsys.readouterr().err
    assert not list(tmp_path.glob("stopped*"))


@PROPERTY
@given(data=st.data())
def test_damaged_files_give_exactly_the_valid_lines(tmp_path: Path, tokenizer: str, data: st.DataObject) -> None:
    """Random bytes are replaced; the result has the documents that plain JSON decoding of each line finds."""
    source = write_jsonl(tmp_path / "x.jsonl", ["one 世界", 'two "quoted"', "three\nlines", "four"])
    content = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    source.write_bytes(content)
    expected = []
    for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        try:
            text = json.loads(str(line, "utf-8"))["text"]
            if text.encode():
                expected.append(text)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    for path in tmp_path.glob("out.*"):
        path.unlink()
    if expected:
        make(source, tokenizer, tmp_path / "out")
        assert sorted(documents(tmp_path / "out", tokenizer)) == sorted(expected)
    else:
        with pytest.raises(SystemExit):
            make(source, tokenizer, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))


def test_a_damaged_gz_is_an_error(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    compressed = gzip.compress(write_jsonl(tmp_path / "x.jsonl", [f"text {i}" for i in range(3000)]).read_bytes())
    for damaged in (compressed[:-5], compressed[:3000], compressed[:2000] + b"12345678" + compressed[2008:], b"no gz"):
        (tmp_path / "y.jsonl.gz").write_bytes(damaged)
        with pytest.raises(SystemExit):
            make(tmp_path / "y.jsonl.gz", tokenizer, tmp_path / "y")
        assert "y.jsonl.gz: damaged or truncated" in capsys.readouterr().err
        assert not list(tmp_path.glob("y.bin"))


def test_output_ends_with_previews_and_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyrwkv_tokenizer")
    source = write_jsonl(tmp_path / "my.data.jsonl", ["The first document.", "Ein zweites.", "第三"])
    make_data.main([str(source), "2", "4", "--workers", "1"])
    out = capsys.readouterr().out
    data = MMapIndexedDataset(tmp_path / "my.data")
    assert out.splitlines()[-1] == f"--my_exit_tokens {data.n_tokens} --magic_prime 5 --ctx_len 4"
    assert "document 0, " in out
    assert "document 5, " in out
    assert data.dtype == "uint16"
    assert len(data) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.csv", "1", "512"], "x.csv: unknown kind of file; expected a name that ends in .jsonl"),
        (["missing.jsonl", "1", "512"], "missing.jsonl: no such file"),
        (["x.jsonl", "0", "512"], "N_EPOCH 0: expected at least 1"),
        (["x.jsonl", "1", "0"], "CTX_LEN 0: expected at least 1"),
        (["x.jsonl", "1", "512", "--holdout", "1"], "--holdout 1.0: expected"),
        (["x.jsonl", "1", "512", "--workers", "0"], "--workers 0: expected 1 to"),
        (["x.jsonl", "1", "512", "--workers", "100000"], "--workers 100000: expected 1 to"),
        (["-", "1", "512"], "--out: expected a name"),
        ([".", "1", "512"], ".: is a folder; name "),
        (["-", "1", "512", "--out", "."], "--out .: is a folder; expected the name of a file"),
        (["x.jsonl", "1", "512", "--tokenizer", "gpt2"], "--tokenizer gpt2: no tokenizer.json"),
    ],
)
def test_wrong_arguments_exit_with_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        make_data.main(arguments)
    assert exited.value.code == 2
    assert message in capsys.readouterr().err


def test_a_second_process_with_the_same_output_exits(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", ["a", "b", "c"])
    with file_lock(tmp_path / "x.making.lock", wait=False), pytest.raises(SystemExit):
        make(source, tokenizer, tmp_path / "x")
    assert "x.bin: another make_data is writing this file" in capsys.readouterr().err


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_run_leaves_no_output_and_can_be_repeated(tmp_path: Path, tokenizer: str) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", [f"a text of some length, number {i}" for i in range(30_000)])
    expected = make(source, tokenizer, tmp_path / "expected")
    command = [sys.executable, SCRIPT, source, "1", "8", "--tokenizer", tokenizer, "--workers", "2"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (workers := children.read_text().split()):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "x.bin").exists()
    deadline = time.monotonic() + 60
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "the workers are still running"
        time.sleep(0.01)
    make_data.main([*map(str, command[2:])])
    assert (tmp_path / "x.bin").read_bytes() + (tmp_path / "x.idx").read_bytes() == expected
    assert not list(tmp_path.glob("*making*"))

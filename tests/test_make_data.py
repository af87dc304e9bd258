"""make_data: every document comes out, in an order that depends on the seed alone, and nothing goes by unsaid."""

import gzip
import io
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from chat_models import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import make_data
from src.dataset import MMapIndexedDataset, external_shuffle, text_input
from src.dataset.tokenizer import load_tokenizer
from src.files import file_lock

SCRIPT = Path(make_data.__file__)
PROPERTY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make(source: object, tokenizer: str, out: Path, *flags: object, n_epoch: int = 1, ctx_len: int = 1) -> bytes:
    """Runs it in this process; the bytes of both files."""
    given = [source, n_epoch, ctx_len, "--tokenizer", tokenizer, "--out", out, "--workers", 1, *flags]
    make_data.main([str(argument) for argument in given])
    return out.with_suffix(".bin").read_bytes() + out.with_suffix(".idx").read_bytes()


def documents(prefix: Path, tokenizer: str) -> list[str]:
    data, decoder = MMapIndexedDataset(prefix), load_tokenizer(tokenizer)
    assert all(data[i][-1] == 0 for i in range(len(data)))
    return [decoder.decode(data[i][:-1].tolist()) for i in range(len(data))]


@PROPERTY
@given(texts=st.lists(TEXTS, min_size=3, max_size=30), n_epoch=st.integers(1, 3), small=st.integers(1, 200))
def test_every_document_once_an_epoch_whatever_the_portions(
    tmp_path: Path, tokenizer: str, texts: list[str], n_epoch: int, small: int
) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    whole = make(source, tokenizer, tmp_path / "whole", n_epoch=n_epoch)
    out = documents(tmp_path / "whole", tokenizer)
    for epoch in range(n_epoch):
        assert Counter(out[epoch * len(texts) : (epoch + 1) * len(texts)]) == Counter(texts)
    with pytest.MonkeyPatch.context() as patch:  # many runs, many ranges, many pieces
        patch.setattr(external_shuffle, "RUN_BYTES", small)
        patch.setattr(external_shuffle, "_JOINED_AT_ONCE", 2)
        patch.setattr(text_input, "PIECE_BYTES", small)
        assert make(source, tokenizer, tmp_path / "parts", n_epoch=n_epoch) == whole
    assert sorted(path.name for path in tmp_path.iterdir() if "making" in path.name or "part" in path.suffix) == []


@pytest.mark.parametrize("flags", [("--workers", 2), ("--workers", 3, "--holdout", 0.3), ("--holdout", 0.3)])
def test_the_number_of_workers_changes_nothing(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch, flags: tuple
) -> None:
    monkeypatch.setattr(text_input, "PIECE_BYTES", 1000)
    source = write_jsonl(tmp_path / "x.jsonl", [f"text number {i} " * (i % 7 + 1) for i in range(500)])
    alone = make(source, tokenizer, tmp_path / "a", *flags, "--workers", 1, n_epoch=2)
    assert make(source, tokenizer, tmp_path / "b", *flags, n_epoch=2) == alone


def test_epochs_and_seeds_differ_and_shuffle_well(tmp_path: Path, tokenizer: str) -> None:
    texts = [f"{i:04}" for i in range(1000)]
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    make(source, tokenizer, tmp_path / "a", n_epoch=2)
    make(source, tokenizer, tmp_path / "b", "--seed", 1)
    out = documents(tmp_path / "a", tokenizer)
    orders = [texts, out[:1000], out[1000:], documents(tmp_path / "b", tokenizer)]
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            unmoved = sum(a == b for a, b in zip(one, other, strict=True))
            assert unmoved < 10, "about one document of a random order stays where it was"


def test_held_out_documents_are_nowhere_else(tmp_path: Path, tokenizer: str) -> None:
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
    """Left alone and named where this call keeps nothing aside; gone where a call that does is stopped before its own is written."""
    source = write_jsonl(tmp_path / "x.jsonl", [f"text {i}" for i in range(400)])
    make(source, tokenizer, tmp_path / "a", "--holdout", 0.1)
    held = (tmp_path / "a-heldout.bin").read_bytes()
    assert "was there before" not in capfd.readouterr().out
    make(source, tokenizer, tmp_path / "a")
    assert "a-heldout.bin was there before" in capfd.readouterr().out
    assert (tmp_path / "a-heldout.bin").read_bytes() == held

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(make_data, "write", stopped)
    with pytest.raises(SystemExit, match="Stopped"):
        make(source, tokenizer, tmp_path / "a", "--holdout", 0.1, "--seed", 5)
    assert not (tmp_path / "a-heldout.idx").exists()


def test_all_kinds_of_input_give_the_same(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_zst_and_its_damage(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    zstandard = pytest.importorskip("zstandard")
    source = write_jsonl(tmp_path / "x.jsonl", [f"text {i}" for i in range(3000)])
    content = source.read_bytes()
    packed = zstandard.compress(content[:10000]) + zstandard.compress(content[10000:])
    (tmp_path / "y.jsonl.zst").write_bytes(packed)
    assert make(tmp_path / "y.jsonl.zst", tokenizer, tmp_path / "y") == make(source, tokenizer, tmp_path / "x")
    (tmp_path / "y.jsonl.zst").write_bytes(packed[:-20])
    with pytest.raises(SystemExit):
        make(tmp_path / "y.jsonl.zst", tokenizer, tmp_path / "cut")
    assert "damaged or cut" in capsys.readouterr().err


def test_parquet(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"text {i}" for i in range(2000)]
    expected = make(write_jsonl(tmp_path / "x.jsonl", texts), tokenizer, tmp_path / "x")
    file = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"content": texts, "other": range(2000)}), file, row_group_size=300)
    assert make(file, tokenizer, tmp_path / "y", "--field", "content") == expected
    with pytest.raises(SystemExit):
        make(file, tokenizer, tmp_path / "z")
    assert "has no column 'text', it has ['content', 'other']" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SystemExit):
        make(file, tokenizer, tmp_path / "z", "--field", "content")
    assert "can't be read as Parquet" in capsys.readouterr().err


BROKEN = {
    b"not json": "no JSON",
    b"[" * 5000: "no JSON",
    b"3": "no JSON object",
    b'{"txt": "a"}': "no field 'text'",
    b'{"text": 3}': "a text that is no string",
    b'{"text": null}': "a text that is no string",
    b'{"text": ""}': "an empty text",
    b'{"text": "\xff"}': "bytes that are no UTF-8",
    b'{"text": "\\ud800"}': "half of a surrogate pair",
    b"": "an empty line",
}


@pytest.mark.parametrize(("line", "reason"), BROKEN.items(), ids=range(len(BROKEN)))
def test_broken_lines_are_told_counted_or_fatal(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], line: bytes, reason: str
) -> None:
    source = tmp_path / "x.jsonl"
    source.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "fine"}\n')
    make(source, tokenizer, tmp_path / "x")
    told = capsys.readouterr()
    assert f"x.jsonl:2: {reason}" in told.err
    assert f"1 lines left out: 1 with {reason}" in told.out
    assert sorted(documents(tmp_path / "x", tokenizer)) == ["fine", "good"]
    with pytest.raises(SystemExit):
        make(source, tokenizer, tmp_path / "stopped", "--on_error", "stop")
    assert f"x.jsonl:2: {reason}" in capsys.readouterr().err
    assert not list(tmp_path.glob("stopped*"))


@PROPERTY
@given(data=st.data())
def test_damaged_lines_never_give_other_text(tmp_path: Path, tokenizer: str, data: st.DataObject) -> None:
    """Bytes are struck at random; what comes out is what a plain reading of each line finds, no more and no less."""
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
    for left in tmp_path.glob("out.*"):
        left.unlink()
    if expected:
        make(source, tokenizer, tmp_path / "out")
        assert sorted(documents(tmp_path / "out", tokenizer)) == sorted(expected)
    else:
        with pytest.raises(SystemExit):
            make(source, tokenizer, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))


def test_a_cut_gz_is_an_error(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    packed = gzip.compress(write_jsonl(tmp_path / "x.jsonl", [f"text {i}" for i in range(3000)]).read_bytes())
    for damaged in (packed[:-5], packed[:3000], packed[:2000] + b"12345678" + packed[2008:], b"no gz"):
        (tmp_path / "y.jsonl.gz").write_bytes(damaged)
        with pytest.raises(SystemExit):
            make(tmp_path / "y.jsonl.gz", tokenizer, tmp_path / "y")
        assert "y.jsonl.gz is damaged or cut" in capsys.readouterr().err
        assert not list(tmp_path.glob("y.bin"))


def test_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    ("arguments", "words"),
    [
        (["x.csv", "1", "512"], "x.csv: the name must end in .jsonl"),
        (["nowhere.jsonl", "1", "512"], "nowhere.jsonl does not exist"),
        (["x.jsonl", "0", "512"], "N_EPOCH, CTX_LEN and --workers must be 1 or more"),
        (["x.jsonl", "1", "512", "--holdout", "1"], "--holdout 1.0: must be"),
        (["x.jsonl", "1", "512", "--workers", "100000"], "--workers 100000: expected at most"),
        (["-", "1", "512"], "--out NAME is needed"),
        ([".", "1", "512"], ".: a folder; expected a file name"),
        (["x.jsonl", "1", "512", "--tokenizer", "gpt2"], r"--tokenizer gpt2: there is no tokenizer.json"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        make_data.main(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_two_at_once_do_not_mix(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", ["a", "b", "c"])
    with file_lock(tmp_path / "x.making.lock", wait=False), pytest.raises(SystemExit):
        make(source, tokenizer, tmp_path / "x")
    assert "Another make_data is writing" in capsys.readouterr().err


def is_running(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_killed_and_run_again(tmp_path: Path, tokenizer: str) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", [f"a text of some length, number {i}" for i in range(30_000)])
    undisturbed = make(source, tokenizer, tmp_path / "undisturbed")
    call = [sys.executable, SCRIPT, source, "1", "8", "--tokenizer", tokenizer, "--workers", "2"]
    started = subprocess.Popen(list(map(str, call)), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    while not (workers := children.read_text().split()):
        assert started.poll() is None, "over before it could be killed"
        time.sleep(0.005)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert not (tmp_path / "x.bin").exists()
    deadline = time.monotonic() + 10
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "the workers stay behind"
        time.sleep(0.01)
    make_data.main([*map(str, call[2:])])
    assert (tmp_path / "x.bin").read_bytes() + (tmp_path / "x.idx").read_bytes() == undisturbed
    assert not list(tmp_path.glob("*making*"))

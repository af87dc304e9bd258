"""The demo data: documents of the standard library, an ordinary tokenizer folder, and complete files are kept."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chat_models import chat_ids

from src.dataset import MMapIndexedDataset
from src.dataset.corpus.standard_library import library_sources
from src.dataset.tokenizer import load_tokenizer
from src.errors import UserError
from src.files import file_lock

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "demo_corpus.py"


def build(out: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, SCRIPT, "--out", out], capture_output=True, text=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Built once for all processes of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "demo_corpus"
    with file_lock(folder / "lock", wait=True):
        done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_documents_are_sources_and_end_with_token_0(demo: Path) -> None:
    tokenizer = load_tokenizer(demo / "demo_tokenizer")
    texts = {}
    for name in ("demo", "demo-heldout"):
        data = MMapIndexedDataset(demo / name)
        assert all(data[i][-1] == 0 and 0 not in data[i][:-1] for i in range(len(data)))
        texts[name] = {tokenizer.decode(data[i][:-1].tolist()) for i in range(len(data))}
    assert texts["demo"].isdisjoint(texts["demo-heldout"])
    all_text = "".join(texts["demo"] | texts["demo-heldout"])
    assert "def dedent(text)" in all_text
    assert len(texts["demo-heldout"]) / sum(map(len, texts.values())) == pytest.approx(0.1, abs=0.03)
    assert MMapIndexedDataset(demo / "demo").n_tokens > 1_000_000


def test_transformers_reads_the_tokenizer_folder(demo: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(demo / "demo_tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(demo / "demo_tokenizer")
    assert ours.vocab_size == len(theirs) == 6400
    assert theirs.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    encoded = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert chat_ids(ours, messages) == encoded["input_ids"]
    answer = [i for i, counts in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if counts]
    assert ours.decode(answer) == "That.<|im_end|>"


def test_a_second_run_keeps_complete_files_and_replaces_truncated_ones(demo: Path, tmp_path: Path) -> None:
    demo = shutil.copytree(demo, tmp_path / "copy")

    def state() -> dict[str, int]:
        return {str(file): file.stat().st_mtime_ns for file in demo.rglob("*") if file.is_file()}

    before, content = state(), (demo / "demo-heldout.bin").read_bytes()
    second = build(demo)
    assert second.returncode == 0
    assert "exists already" in second.stdout
    assert state() == before
    (demo / "demo-heldout.bin").write_bytes(content[:-10])
    tokenizer = (demo / "demo_tokenizer" / "tokenizer.json").stat().st_mtime_ns
    assert build(demo).returncode == 0
    assert (demo / "demo-heldout.bin").read_bytes() == content
    assert (demo / "demo_tokenizer" / "tokenizer.json").stat().st_mtime_ns == tokenizer


def test_an_incomplete_library_raises(tmp_path: Path) -> None:
    (tmp_path / "os.py").write_text("x = 1\n")
    for library in (tmp_path, tmp_path / "python311.zip"):
        with pytest.raises(UserError, match="incomplete") as caught:
            library_sources(library)
        assert caught.value.given == library


def test_the_library_has_each_text_once_and_no_tests(tmp_path: Path) -> None:
    sources = library_sources()
    assert len(set(sources.values())) == len(sources)
    assert "textwrap.py" in sources
    assert not [name for name in sources if "/test/" in name or "site-packages" in name]

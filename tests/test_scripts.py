"""The shell scripts, and the fetch of minipile. pip is replaced by a stand-in that notes its arguments and installs empty packages."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from src.config import ModelConfig
from src.dataset import BinIdxWriter
from src.dataset.corpus.bpe import train_bpe
from src.model import RWKV7

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted(ROOT.glob("*.sh")), ROOT / "tests" / "run.sh"]
sys.path.insert(0, str(ROOT / "data"))

PIP = """
import os, re, sys, sysconfig
from pathlib import Path
words = sys.argv[1:]
with open(os.environ["PIP_CALLS"], "a") as calls:
    print(*words, file=calls)
if "--index-url" in words and os.environ.get("NO_TORCH_INDEX"):
    sys.exit(1)
wanted = [word for word in words[1:] if re.match(r"torch==", word)]
for flag, value in zip(words, words[1:]):
    if flag == "-r":
        wanted += [line for line in Path(value).read_text().splitlines() if line[:1].isalpha()]
for requirement in wanted:
    name, version = re.match(r"([\\w-]+)(?:[>=]=([\\d.]+))?", requirement).groups()
    from importlib import metadata
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        folder = Path(sysconfig.get_path("purelib")) / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
"""


class House:
    """A copy of the scripts in a folder of its own, with the stand-in for pip and a PATH under control."""

    def __init__(self, folder):
        self.folder, self.calls = folder, folder / "calls"
        for name in ("demo-training-prepare.sh", "requirements.txt"):
            shutil.copy(ROOT / name, folder)
        (folder / "lib" / "pip").mkdir(parents=True)
        (folder / "lib" / "pip" / "__init__.py").write_text("")
        (folder / "lib" / "pip" / "__main__.py").write_text(PIP)
        (folder / "bin").mkdir()
        for tool in ("dirname", "uname", "tr", "grep"):
            (folder / "bin" / tool).symlink_to(shutil.which(tool))
        base = getattr(sys, "_base_executable", sys.executable)
        (folder / "bin" / "python3").write_text(f'#!/bin/sh\nexec "{base}" "$@"\n')
        (folder / "bin" / "python3").chmod(0o755)
        subprocess.run([base, "-m", "venv", "--without-pip", folder / ".venv"], check=True)

    def add_package(self, name, version, python=".venv"):
        site = next((self.folder / python / "lib").glob("python3.*")) / "site-packages"
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def prepare(self, *words, **environment):
        return subprocess.run(
            ["/bin/sh", "demo-training-prepare.sh", *words],
            cwd=self.folder, text=True, capture_output=True, timeout=120,
            env={"PATH": str(self.folder / "bin"), "HOME": str(self.folder), "PYTHONPATH": str(self.folder / "lib"),
                 "PIP_CALLS": str(self.calls), **environment},
        )  # fmt: skip

    def pip_calls(self):
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_posix(script):
    subprocess.run(["/bin/sh", "-n", script], check=True)
    assert script.read_text(encoding="utf-8").startswith("#!/bin/sh\n")


def test_an_environment_that_has_everything_is_used_as_it_is(tmp_path):
    shutil.copy(ROOT / "demo-training-prepare.sh", tmp_path)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    done = subprocess.run(
        ["/bin/sh", "demo-training-prepare.sh", "environment"], cwd=tmp_path, text=True, capture_output=True,
        env={**os.environ, "VIRTUAL_ENV": sys.prefix, "PYTHON": ""}, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == f"{sys.prefix}/bin/python", done.stderr
    assert not (tmp_path / ".venv").exists()


def test_cpu_build_from_its_own_index_then_nothing_twice(house):
    done = house.prepare("environment")
    assert done.stdout == ".venv/bin/python\n", done.stderr
    torch, rest = house.pip_calls()
    assert "--index-url https://download.pytorch.org/whl/cpu" in torch
    assert "--timeout 10 --retries 1" in torch
    assert torch.endswith("torch==2.13.0")
    assert rest.startswith("install --constraint .venv/constraints.txt -r requirements.txt")
    assert (house.folder / ".venv" / "constraints.txt").read_text() == "torch==2.13.0\n"

    again = house.prepare("environment")
    assert again.stdout == ".venv/bin/python\n"
    assert again.stderr == ""
    assert len(house.pip_calls()) == 2


def test_default_index_where_the_cpu_index_is_out_of_reach(house):
    done = house.prepare("environment", NO_TORCH_INDEX="1")
    assert done.returncode == 0
    assert "can't be reached" in done.stderr
    assert house.pip_calls()[1] == "install torch==2.13.0"


def test_default_build_where_an_nvidia_gpu_is_seen(house):
    fake = house.folder / "bin" / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200'\n")
    fake.chmod(0o755)
    house.prepare("environment")
    assert house.pip_calls()[0] == "install torch==2.13.0"


@pytest.mark.parametrize(("there", "kept"), [("2.10.0", True), ("2.14.0a0+rocm7", True), ("2.9.1", False)])
def test_a_torch_that_is_there_is_kept(house, there, kept):
    house.add_package("torch", there)
    house.prepare("environment")
    assert ("torch==2.13.0" not in " ".join(house.pip_calls())) == kept
    if kept:
        assert (house.folder / ".venv" / "constraints.txt").read_text() == f"torch=={there}\n"


def test_venv_uses_the_torch_of_an_active_environment(house):
    """Made for a ROCm user: the active environment has torch and nothing else; .venv doesn't bring another one."""
    os.rename(house.folder / ".venv", house.folder / "active")
    house.add_package("torch", "2.11.0+rocm6.4", python="active")
    done = house.prepare("environment", VIRTUAL_ENV=str(house.folder / "active"))
    assert done.stdout == ".venv/bin/python\n", done.stderr
    assert len(house.pip_calls()) == 1
    assert (house.folder / ".venv" / "constraints.txt").read_text() == "torch==2.11.0+rocm6.4\n"


def test_more_requirements(house):
    (house.folder / "more.txt").write_text("# of the tests\nsome-linter>=1.2,<2\n")
    house.prepare("environment")
    house.prepare("environment", "more.txt")
    assert house.pip_calls()[2] == "install --constraint .venv/constraints.txt -r requirements.txt -r more.txt"


def test_a_version_that_is_too_old_or_too_new_is_replaced(house):
    for version, calls in (("2.7.0", 2), ("2.5.9", 2)):
        house.add_package("pytorch-lightning", version)
        house.prepare("environment")
        assert len(house.pip_calls()) == calls
        shutil.rmtree(house.folder / ".venv")
        house.calls.unlink()
        subprocess.run(
            [house.folder / "bin" / "python3", "-m", "venv", "--without-pip", house.folder / ".venv"], check=True
        )


def test_no_python_that_is_new_enough(house):
    shutil.rmtree(house.folder / ".venv")
    (house.folder / "bin" / "python3").write_text("#!/bin/sh\n[ $1 = --version ] && echo Python 3.8.10\nexit 1\n")
    done = house.prepare("environment")
    assert done.returncode == 1
    assert "Python 3.10 or later is needed, and python3 is Python 3.8.10" in done.stderr
    assert "PYTHON=" in done.stderr


def test_unknown_setting_is_refused_at_once(house):
    done = house.prepare("minipil")
    assert done.returncode == 1
    assert "minipil: no such setting; expected demo, minipile or mini" in done.stderr
    assert house.pip_calls() == []


@pytest.fixture
def tree(tmp_path):
    """The sources as they are now, elsewhere."""
    names = subprocess.run(["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run_script(tree, *words, script="demo-training-run.sh", **environment):
    return subprocess.run(
        ["/bin/sh", script, *words], cwd=tree, text=True, timeout=570, capture_output=True,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )  # fmt: skip


def test_run_from_data_to_sample_and_again(tree):
    """Initial weights, training, held-out loss, sample; the second run says that it is complete and leaves the weights alone."""
    with BinIdxWriter(tree / "data" / "toy", np.uint16) as out:
        for _ in range(40):
            out.add_document([*range(300, 330), 0])
    settings = {
        "DATA_FILE": "data/toy", "VAL_DATA_FILE": "data/toy", "TOKENIZER": "world", "VOCAB_SIZE": "65536", "N_LAYER": "1",
        "N_EMBD": "64", "CTX_LEN": "16", "M_BSZ": "4", "EPOCH_STEPS": "4", "MY_EXIT_TOKENS": "512",
    }  # fmt: skip
    done = run_script(tree, "demo", "--random_seed", "3", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tree / "out" / "L1-D64-x070"
    names = {path.name for path in folder.iterdir()}
    assert {"rwkv-init.pth", "rwkv-0.pth", "rwkv-1.pth", "rwkv-final.pth", "train_log.txt", "loss.png"} <= names
    heldout, sample = done.stdout.index("Loss on text"), done.stdout.index('What it writes after "def "')
    assert "perplexity" in done.stdout[heldout:sample]
    assert done.stdout[sample:].split("\n")[1].startswith("def ")
    final = (folder / "rwkv-final.pth").stat()

    again = run_script(tree, "demo", "--random_seed", "3", **settings)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "complete" in again.stdout
    assert "Loss on text" not in again.stdout
    assert (folder / "rwkv-final.pth").stat().st_mtime_ns == final.st_mtime_ns


def test_a_data_file_that_is_missing(tree):
    done = run_script(tree, "mini")
    assert done.returncode == 1
    assert "data/pretrain_hq.bin and .idx are missing" in done.stderr
    assert "data/make_data.py" in done.stderr
    assert not (tree / "out").exists()


def test_a_stage_without_the_one_before_it(tree):
    (tree / "data" / "sft_1024.jsonl").write_text("")
    (tree / "data" / "minimind_tokenizer").mkdir()
    (tree / "data" / "minimind_tokenizer" / "tokenizer.json").write_text("{}")
    done = run_script(tree, "mini", "1024", script="demo-training-run-sft.sh")
    assert done.returncode == 1
    assert "out/L8-D512-x070-sft512 is not there" in done.stderr
    assert not (tree / "out").exists()
    done = run_script(tree, "mini", "100", script="demo-training-run-sft.sh")
    assert "expected 512, 1024 or 2048" in done.stderr


def conversations_file(path, count=6):
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a test."}]
    path.write_text("".join(json.dumps({"conversations": turns}) + "\n" for _ in range(count)), encoding="utf-8")


@pytest.fixture
def pretrained(tree):
    """A tree with what the demo's pretraining leaves: the tokenizer, and final weights of the demo's size, drawn at random."""
    train_bpe(["What is it? It is a test.\n"], tree / "data" / "demo_tokenizer", 6400)
    folder = tree / "out" / "L4-D256-x070"
    folder.mkdir(parents=True)
    torch.save(RWKV7(ModelConfig(n_layer=4, n_embd=256, vocab_size=6400)).state_dict(), folder / "rwkv-final.pth")
    return tree


LOOK = ("--dry_run", "--kernel", "reference", "--accelerator", "cpu")


def test_conversations_of_ones_own_take_the_demos_model(pretrained):
    """DATA_FILE alone: the demo's model and settings. What BASE names afterwards isn't read where rwkv-init.pth is there."""
    conversations_file(pretrained / "mine.jsonl")
    fine_tune = partial(run_script, pretrained, *LOOK, script="demo-training-run-sft.sh", DATA_FILE="mine.jsonl")
    done = fine_tune(CTX_LEN="32")
    assert done.returncode == 0, done.stdout + done.stderr
    stage = "out/L4-D256-x070-sft-mine/rwkv-init.pth"
    assert f"{stage} is a copy of out/L4-D256-x070/rwkv-final.pth" in done.stdout
    assert "lr 1e-05," in done.stdout  # a hundredth of the demo's 1e-3: the first step of the warm-up
    assert "OK: 1 of 1 steps taken" in done.stdout

    torch.save(RWKV7(ModelConfig(n_layer=4, n_embd=256, vocab_size=6400)).state_dict(), pretrained / "other.pth")
    done = fine_tune(CTX_LEN="32", BASE="other.pth")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{stage} is there already, so BASE=other.pth is not read" in done.stdout
    done = fine_tune(CTX_LEN="32", BASE="out/L4-D256-x070")
    assert "is not read" not in done.stdout
    done = run_script(
        pretrained,
        *LOOK,
        "--proj_dir",
        "out/x",
        script="demo-training-run-sft.sh",
        DATA_FILE="mine.jsonl",
        CTX_LEN="32",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "out/x/rwkv-init.pth is a copy of" in done.stdout


def test_conversations_of_ones_own_with_another_model(pretrained):
    """One word about the model is enough for the settings of mini; world is a tokenizer without a folder."""
    conversations_file(pretrained / "mine.jsonl")
    fine_tune = partial(run_script, pretrained, script="demo-training-run-sft.sh", DATA_FILE="mine.jsonl")
    done = fine_tune(TOKENIZER="world", N_LAYER="12", N_EMBD="768", VOCAB_SIZE="65536")
    assert done.returncode == 1
    assert "out/L12-D768-x070 is not there: it has the weights to start from" in done.stderr
    done = fine_tune(TOKENIZER="data/demo_tokenizer")
    assert "out/L8-D512-x070 is not there" in done.stderr
    shutil.rmtree(pretrained / "data" / "demo_tokenizer")
    done = fine_tune()
    assert "data/demo_tokenizer is missing: without another model" in done.stderr
    assert [path.name for path in (pretrained / "out").iterdir()] == ["L4-D256-x070"]


def test_the_fine_tuning_demo_asks_nothing_of_a_model_that_was_only_looked_at(pretrained):
    for name in ("demo-sft.jsonl", "demo-sft-heldout.jsonl"):
        conversations_file(pretrained / "data" / name)
    done = run_script(pretrained, *LOOK, script="demo-training-run-sft.sh")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was kept" in done.stdout
    assert "What does" not in done.stdout


@pytest.mark.slow
def test_both_demos_on_the_real_corpus(tree):
    sizes = {"N_LAYER": "2", "N_EMBD": "64", "EPOCH_STEPS": "10"}
    done = run_script(tree, MY_EXIT_TOKENS="60000", **sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "What it writes after" in done.stdout
    final = (tree / "out" / "L2-D64-x070" / "rwkv-final.pth").read_bytes()

    done = run_script(tree, script="demo-training-run-sft.sh", MY_EXIT_TOKENS="60000", **sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"held-out loss \d+\.\d+ before the run", done.stdout), done.stdout
    assert "What does `textwrap.dedent` do?" in done.stdout
    stage = tree / "out" / "L2-D64-x070-sft"
    assert (
        (stage / "rwkv-init.pth").read_bytes()
        == final
        == (tree / "out" / "L2-D64-x070" / "rwkv-final.pth").read_bytes()
    )
    assert (stage / "rwkv-final.pth").read_bytes() != final
    again = run_script(tree, script="demo-training-run-sft.sh", MY_EXIT_TOKENS="60000", **sizes)
    assert "complete" in again.stdout


# ---- minipile ---------------------------------------------------------------------------------------------------------------


class Server:
    """A file server that knows ranges and can break off: `cuts` bytes per answer, one entry an answer, then everything."""

    def __init__(self, files):
        self.files, self.cuts, self.ranges, self.says_length = files, [], [], True
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                content = server.files.get(self.path)
                if content is None:
                    self.send_error(404)
                    return
                begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
                server.ranges.append(begin)
                if begin >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206 if begin else 200)
                if server.says_length:
                    self.send_header("Content-Length", str(len(content) - begin))
                self.end_headers()
                cut = server.cuts.pop(0) if server.cuts else len(content)
                self.wfile.write(content[begin : begin + cut])

            def log_message(self, *words):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server():
    server = Server({"/x.bin": bytes(range(256)) * 40})
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_a_fetch_that_breaks_off_goes_on(server, tmp_path):
    import fetch_minipile

    server.cuts = [1000, 2000]
    fetch_minipile.fetch(f"{server.url}/x.bin", tmp_path / "x.bin", 10240, pause=0)
    assert (tmp_path / "x.bin").read_bytes() == server.files["/x.bin"]
    assert server.ranges == [0, 1000, 3000]
    assert not (tmp_path / "x.bin.part").exists()


def test_a_fetch_continues_an_earlier_one(server, tmp_path):
    import fetch_minipile

    (tmp_path / "x.bin.part").write_bytes(server.files["/x.bin"][:5000])
    fetch_minipile.fetch(f"{server.url}/x.bin", tmp_path / "x.bin", 10240, pause=0)
    assert (tmp_path / "x.bin").read_bytes() == server.files["/x.bin"]
    assert server.ranges == [5000]


def test_a_whole_file_that_was_not_renamed_is_fetched_anew(server, tmp_path):
    import fetch_minipile

    (tmp_path / "x.bin.part").write_bytes(bytes(10240))
    fetch_minipile.fetch(f"{server.url}/x.bin", tmp_path / "x.bin", pause=0)
    assert (tmp_path / "x.bin").read_bytes() == server.files["/x.bin"]
    assert server.ranges == [10240, 0]


def test_a_server_that_does_not_say_the_length_is_refused(server, tmp_path):
    import fetch_minipile

    server.says_length = False
    with pytest.raises(ValueError, match=r"/x\.bin: the server doesn't say how long the file is"):
        fetch_minipile.fetch(f"{server.url}/x.bin", tmp_path / "x.bin")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_size_is_refused(server, tmp_path):
    import fetch_minipile

    with pytest.raises(ValueError, match=r"10,240 bytes, expected 7"):
        fetch_minipile.fetch(f"{server.url}/x.bin", tmp_path / "x.bin", 7)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_it_says_what_to_fetch_and_where_to_put_it(server, tmp_path, capsys):
    import fetch_minipile

    with pytest.raises(SystemExit) as end:
        fetch_minipile.main(["--out", str(tmp_path), "--url", server.url])
    assert end.value.code == 1
    words = capsys.readouterr().err
    assert f"{server.url}/minipile.idx" in words
    assert f"{server.url}/minipile.bin" in words
    assert f"put the two files into {tmp_path}" in words

"""Wrong input to train.py: one message that names it, exit code 2, no traceback, and no file is changed."""

import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import warm_process
from chat_models import make_tokenizer
from test_build import fake_compiler
from training_runs import CTX, ROOT, VOCAB, as_from_a_terminal, flags, train

from src.dataset.binidx import BinIdxWriter
from src.dataset.tokenizer import load_tokenizer
from src.errors import UserError
from src.inference.load import find_tokenizer
from src.model import RWKV7, ModelConfig
from src.training.model_setup import check_tokenizer


def rewrite(path, change):
    path.write_bytes(bytes(change(bytearray(path.read_bytes()))))


def with_bytes(at, value):
    def change(content):
        content[at : at + len(value)] = value
        return content

    return change


def cut_bin(bin_path, idx_path):
    rewrite(bin_path, lambda content: content[:-64])


def cut_idx(bin_path, idx_path):
    rewrite(idx_path, lambda content: content[:-8])


def of_another(bin_path, idx_path):
    with BinIdxWriter(bin_path.with_name("another"), np.uint16) as writer:
        writer.add_document([*range(1, 400), 0])
    shutil.copy(bin_path.with_name("another.idx"), idx_path)


def another_version(bin_path, idx_path):
    rewrite(idx_path, with_bytes(9, struct.pack("<Q", 2)))


def floats(bin_path, idx_path):
    rewrite(idx_path, with_bytes(17, b"\x07"))


def not_an_index(bin_path, idx_path):
    rewrite(idx_path, with_bytes(0, b"RIFFWAVE"))


def index_missing(bin_path, idx_path):
    idx_path.unlink()


# What the message names, in this order: the file, and the values that tell what is wrong with it.
DATA = {
    cut_bin: r"count\.bin.*\d+.*\d+",  # bytes it has, bytes it should have
    cut_idx: r"count\.idx.*\d+.*\d+",
    of_another: r"count\.(bin|idx)",
    another_version: r"count\.idx.*\b2\b.*\b1\b",
    floats: r"count\.idx.*float32",
    not_an_index: r"count\.idx.*MMIDIDX",
    index_missing: r"count\.idx",
}


@pytest.mark.parametrize("damage", DATA, ids=lambda damage: damage.__name__)
def test_data(tmp_path, data, capfd, damage):
    copies = [tmp_path / f"count{end}" for end in (".bin", ".idx")]
    for copy in copies:
        shutil.copy(data.with_name(copy.name), copy)
    damage(*copies)
    refused(tmp_path / "run", tmp_path / "count", capfd, DATA[damage])


def test_ids_beyond_the_vocabulary_that_the_first_check_misses_are_found_in_their_batch(tmp_path, capfd):
    """A single one in 200,000 tokens: no sampled window has it, the batch that reads it does."""
    tokens = np.ones(200_000, np.int64)
    tokens[100_003] = VOCAB + 1
    with BinIdxWriter(tmp_path / "long", np.uint16) as writer:
        writer.add_document(tokens)
    settings = {"my_exit_tokens": CTX * 64 * 196, "micro_bsz": 64, "n_layer": 1}
    assert train(tmp_path / "run", tmp_path / "long", **settings) == 2
    message = capfd.readouterr().err
    assert re.search(rf"--vocab_size {VOCAB}: .*token id {VOCAB + 1} at position 100003", message), message
    assert "Traceback" not in message


def as_merged(bin_path, idx_path):
    """Only the first document bound is left, as in files that older versions of Megatron merged."""
    content = bytearray(idx_path.read_bytes())
    (items,) = struct.unpack_from("<Q", content, 18)
    content[26:34] = struct.pack("<Q", 1)
    idx_path.write_bytes(content[: 34 + 12 * items + 8])


def padded(bin_path, idx_path):
    bin_path.write_bytes(bin_path.read_bytes() + bytes(100))


@pytest.mark.parametrize("damage", [as_merged, padded], ids=lambda damage: damage.__name__)
def test_data_with_damage_that_leaves_its_tokens_certain_is_used_with_a_warning(tmp_path, data, capfd, damage):
    copies = [tmp_path / f"count{end}" for end in (".bin", ".idx")]
    for copy in copies:
        shutil.copy(data.with_name(copy.name), copy)
    damage(*copies)
    settings = {"my_exit_tokens": CTX * 4 * 2, "n_layer": 1, "val_data_file": tmp_path / "count"}
    assert train(tmp_path / "run", tmp_path / "count", **settings) == 0
    output = capfd.readouterr().out
    assert len(re.findall(r"WARNING: \S*/count\.(?:bin|idx): ", output)) == 2, "once per flag"
    assert train(tmp_path / "run", tmp_path / "count", check=1, my_exit_tokens=CTX * 4 * 2) == 0
    assert re.search(r"WARNING: \S*/count\.(bin|idx): ", capfd.readouterr().out)


@pytest.mark.parametrize("flag", ["data_file", "val_data_file"])
def test_ids_below_0(tmp_path, data, capfd, flag):
    """Signed types can hold them; sampled windows cover a file of this length."""
    tokens = np.ones(3000, np.int64)
    tokens[2000] = -7
    with BinIdxWriter(tmp_path / "negative", np.int32) as writer:
        writer.add_document(tokens)
    changed = {"val_data_file": tmp_path / "negative"} if flag == "val_data_file" else {}
    prefix = data if changed else tmp_path / "negative"
    refused(tmp_path / "run", prefix, capfd, rf"--{flag} \S*negative: token id -7\b", val_windows=1000, **changed)


def test_a_tokenizer_with_an_id_that_the_vocabulary_lacks(tmp_path, data, capfd):
    folder = make_tokenizer(tmp_path / "tokenizer")
    pattern = r"--tokenizer \S*tokenizer: its largest id is 313\b[^\n]*--vocab_size 313\b"
    refused(tmp_path / "run", data, capfd, pattern, tokenizer=folder, vocab_size=313)
    assert train(tmp_path / "run", data, tokenizer=folder, vocab_size=313, check=1) == 1
    assert re.search(pattern, capfd.readouterr().out)
    settings = {"my_exit_tokens": CTX * 4 * 2, "n_layer": 1, "tokenizer": folder}
    assert train(tmp_path / "run", data, vocab_size=314, **settings) == 0


def test_a_tokenizer_for_conversations_is_checked_before_they_are_tokenized(tmp_path, capfd):
    folder = make_tokenizer(tmp_path / "tokenizer")
    turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "that"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"conversations": turns}))
    settings = {"data_type": "sft", "tokenizer": folder, "vocab_size": 313, "my_exit_tokens": 0, "epochs": 1}
    refused(tmp_path / "run", tmp_path / "x.jsonl", capfd, r"--tokenizer \S*: its largest id is 313\b", **settings)
    assert not list(tmp_path.glob("x.jsonl.*"))


@pytest.mark.parametrize(("vocab_size", "fits"), [(65529, False), (65530, True), (65536, True)])
def test_the_vocabularies_that_hold_all_ids_of_world(tmp_path, vocab_size, fits):
    pytest.importorskip("pyrwkv_tokenizer")
    (tmp_path / "run.json").write_text(json.dumps({"tokenizer": "world"}))
    checks = (
        lambda: check_tokenizer(load_tokenizer("world"), vocab_size),
        lambda: find_tokenizer(tmp_path / "rwkv-final.pth", vocab_size),
    )
    for check in checks:
        if fits:
            check()
        else:
            with pytest.raises(UserError, match="65529") as caught:
                check()
            assert (caught.value.flag, caught.value.given) == ("tokenizer", "world")


def refused(out, prefix, capfd, pattern, **changed):
    assert train(out, prefix, **changed) == 2
    captured = capfd.readouterr()
    assert re.search(pattern, captured.err, re.DOTALL), captured.err
    assert "Traceback" not in captured.err
    assert "step 1/" not in captured.out
    assert not list(out.glob("rwkv-*"))


@pytest.mark.parametrize("prime", [371, 367, 1009, 5], ids=["composite", "not 2 mod 3", "too large", "too small"])
def test_magic_prime(tmp_path, data, capfd, prime):
    """The message names the right prime: the largest below 374 (6,000 tokens are 375 windows of 16) that is 2 mod 3."""
    from src.dataset.sample_order import magic_prime

    right = magic_prime(6000, CTX)
    refused(tmp_path / "run", data, capfd, rf"--magic_prime {prime}[^\n]*{right}", magic_prime=prime)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def weights():
    return RWKV7(ModelConfig(2, 32, VOCAB, head_size=16)).state_dict()


def hostile(path):
    torch.save({"emb.weight": Malicious(path.with_name("executed"))}, path)


def hostile_pickle(path):
    path.write_bytes(pickle.dumps(Malicious(path.with_name("executed"))))


def truncated(path):
    torch.save(weights(), path)
    rewrite(path, lambda content: content[: len(content) // 2])


def text(path):
    path.write_text("not found\n")


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    torch.save({"transformer.wte.weight": torch.zeros(4, 4), "lm_head.weight": torch.zeros(4, 4)}, path)


def another_width(path):
    torch.save(RWKV7(ModelConfig(2, 64, VOCAB, head_size=16)).state_dict(), path)


CHECKPOINTS = {
    hostile: r"weights\.pth.*\.system\b",  # the function it would call
    hostile_pickle: r"weights\.pth",
    truncated: r"weights\.pth",
    text: r"weights\.pth",
    empty: r"weights\.pth",
    foreign: r"weights\.pth.*transformer\.wte\.weight",  # what the file has instead
    another_width: r"weights\.pth.*emb\.weight.*--n_embd 64",  # the flag that fits the file
}


@pytest.mark.parametrize("make", CHECKPOINTS, ids=lambda make: make.__name__)
def test_checkpoint(tmp_path, data, capfd, make):
    path = tmp_path / "weights.pth"
    make(path)
    before = path.read_bytes()
    refused(tmp_path / "run", data, capfd, CHECKPOINTS[make], load_model=path)
    assert path.read_bytes() == before
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("make", [truncated, hostile], ids=lambda make: make.__name__)
def test_initial_weights_of_stage_3(tmp_path, data, capfd, make):
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / "rwkv-init.pth")
    assert train(tmp_path / "run", data, train_stage=3) == 2
    assert "rwkv-init.pth" in capfd.readouterr().err
    assert not (tmp_path / "executed").exists()


# The program in place of the compiler, and what the message repeats of its output.
COMPILERS = {
    "none": (None, r"C\+\+ compiler"),
    "does not run": ("echo 'wrong architecture' >&2; exit 3", "wrong architecture"),
    "refuses": ('[ "$1" = --version ] && exit; echo "unknown option" >&2; exit 1', "unknown option"),
    "killed": ('[ "$1" = --version ] && exit; echo "Killed signal" >&2; exit 1', "memory"),
}


@pytest.mark.parametrize("name", COMPILERS)
def test_compiler(tmp_path, data, name):
    """Without the native kernel a run takes the portable one and says why; a kernel asked for by name is an error."""
    script, pattern = COMPILERS[name]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": ""}
    if script is None:
        environment["PATH"] = str(tmp_path)
    else:
        environment["CXX"] = fake_compiler(tmp_path, script)

    def call(**changed):
        argv = flags(tmp_path / "run", data, my_exit_tokens=CTX * 4 * 2, **changed)
        return warm_process.run(
            [sys.executable, "train.py", *argv], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=200
        )

    done = call(kernel="recurrent")
    assert done.returncode == 2, done.stderr
    assert re.search(f"^train.py: .*{pattern}", done.stderr, re.DOTALL), done.stderr
    assert "--kernel portable" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("rwkv-*"))
    if name == "none":
        done = call()
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in (done.stdout + done.stderr).splitlines() if "portable kernel" in line]
        assert re.search(pattern, line)
        assert (tmp_path / "run" / "rwkv-final.pth").exists()
        done = call(kernel="recurrent")
        assert done.returncode == 0, done.stderr  # a complete run needs no compiler
        assert "is complete" in done.stdout


def test_all_faults_of_a_command_line_are_shown_at_once(tmp_path, data):
    wrong = {"n_embd": 40, "dim_att": 64, "lr_final": 1, "micro_bsz": 0, "train_stage": 7, "precision": "fp8"}
    argv = flags(tmp_path / "run", data, **wrong)
    done = warm_process.run(
        [sys.executable, "train.py", *argv, "--n_layers", "3"], cwd=ROOT, text=True, capture_output=True, timeout=100
    )
    assert done.returncode == 2
    for name in wrong:
        assert f"--{name}" in done.stderr, name
    assert re.search("--n_layers: .*--n_layer[^s]", done.stderr)
    assert not (tmp_path / "run").exists()


def wait_until_python_handles_sigint(process):
    """Before that a signal ends a new interpreter, and is lost on a forked one; a busy machine starts both late."""
    status = Path(f"/proc/{process.pid}/status")
    handled = re.compile(r"^SigCgt:\s+(\w+)", re.MULTILINE)
    while status.exists() and not int(handled.search(status.read_text())[1], 16) >> (signal.SIGINT - 1) & 1:
        assert process.poll() is None
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("start", "seconds"),
    [(subprocess.Popen, 0.3), (subprocess.Popen, 1.2), *((warm_process.Popen, s) for s in (0.05, 0.2, 0.6, 1.8))],
    ids=lambda value: value if isinstance(value, float) else value.__module__,
)
def test_ctrl_c_at_any_moment_ends_cleanly(tmp_path, data, start, seconds):
    """While it imports, builds the model, trains: no traceback, exit code 130, and the same command continues."""
    argv = flags(tmp_path / "run", data, my_exit_tokens=CTX * 4 * 3000, epoch_steps=100)
    warm_process.warm_process()
    process = start(
        [sys.executable, "train.py", *argv], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=as_from_a_terminal,
    )  # fmt: skip
    wait_until_python_handles_sigint(process)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "Traceback" not in err
    assert "the same command" in out + err

"""train.py --check, --dry_run, --profile and lack of memory: what is said, what it costs, and that nothing is written."""

import gzip
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from src.cli import parse
from src.config import ModelConfig, RunConfig
from src.dataset.binidx import BinIdxWriter
from src.ops import build
from src.ops.toolchain import BuildError
from src.training.hardware.selection import Hardware
from src.training.module import TrainingModule
from src.training.preflight import check, kernel, machine, out_of_memory, plan, speed
from src.training.preflight.out_of_memory import SAFE, advice, estimate, is_out_of_memory, suggest_settings
from src.training.run import run

ROOT = Path(__file__).parents[1]
MINIMIND = ROOT.parent / "shared" / "data" / "minimind_tokenizer"
CTX, VOCAB = 16, 64
CPU = Hardware("cpu", 1, 1, "fp32", "plain")
GPU = Hardware("gpu", 1, 1, "bf16", "plain")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "count", end=0)


def write_data(prefix, end):
    numbers = np.random.default_rng(0)
    with BinIdxWriter(prefix, np.uint16) as writer:
        for _ in range(200):
            first = int(numbers.integers(1, 30))
            writer.add_document([first + i for i in range(29)] + [end])
    return prefix


def call(proj_dir, data, **changed):
    settings = {
        "proj_dir": proj_dir, "data_file": data, "vocab_size": VOCAB, "ctx_len": CTX, "micro_bsz": 4, "n_layer": 2,
        "n_embd": 32, "head_size": 16, "lr_init": 3e-3, "lr_final": 3e-4, "my_exit_tokens": CTX * 4 * 20, "epoch_steps": 10,
        "epoch_save": 1, "random_seed": 7, "accelerator": "cpu", **changed,
    }  # fmt: skip
    return run(*parse([word for name, value in settings.items() for word in (f"--{name}", str(value))]))


def everything(folder):
    return sorted(str(path) for path in folder.rglob("*"))


# ---- --check ---------------------------------------------------------------------------------------------------------


def test_check_of_a_run_that_is_well(tmp_path, data, capfd, monkeypatch):
    monkeypatch.setattr(speed, "TRIAL_SECONDS", 0.2)
    before = everything(data.parent)
    assert call(tmp_path / "run", data, check=1) == 0
    words = capfd.readouterr().out
    assert words.rstrip().endswith("OK: nothing stands in the way of this run")
    for piece in (
        "Python 3.",
        "torch 2.",
        "within",
        "float64",
        "200 documents, token 0 ends them",
        "ids 0 to 5",
        "vocabulary 64",
    ):
        assert piece in words, piece
    for piece in (
        "weights 0.",
        "gradients 0.",
        "optimizer 0.",
        "activations 0.",
        "logits 0.",
        "GiB are free",
        "20 steps of 64",
    ):
        assert piece in words, piece
    assert "measured now" in words
    assert everything(tmp_path) == []
    assert everything(data.parent) == before


def test_check_lists_everything_that_is_wrong(tmp_path, data, capfd, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda *_: 1e5)
    monkeypatch.setattr(machine, "free_disk", lambda folder: (tmp_path, 1e4))
    monkeypatch.setattr(kernel, "kernel_error", lambda *_: 0.5)
    unfinished = write_data(tmp_path / "data" / "unfinished", end=5)
    assert call(tmp_path / "run", unfinished, check=1) == 1
    words = capfd.readouterr().out
    assert "not OK; what to do:" in words
    for piece in ("don't end with token 0", "0.0 are free", "disk:", "--kernel reference", "--micro_bsz 1"):
        assert piece in words.split("what to do:")[1], piece
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data_file": "nowhere/x"}, "nowhere/x"),
        ({"vocab_size": 20}, "--vocab_size 20"),
        ({"kernel": "chunked"}, "a CPU has no tensor cores"),
        ({"train_stage": 3}, "--train_stage 3"),
        ({"magic_prime": 374}, "magic_prime"),
        ({"load_model": "no.pth"}, "no.pth"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_check_says_what_the_start_would_refuse(tmp_path, data, capfd, monkeypatch, changed, words):
    monkeypatch.setattr(speed, "TRIAL_SECONDS", 0.0)
    assert call(tmp_path / "run", data, **{"check": 1, **changed}) == 1
    assert words in capfd.readouterr().out.split("what to do:")[1]
    assert not (tmp_path / "run").exists()


CONVERSATION = {
    "conversations": [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]
}


@pytest.mark.skipif(not MINIMIND.is_dir(), reason="MiniMind's tokenizer is not here")
def test_check_of_conversations_leaves_no_tokens_behind(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(speed, "TRIAL_SECONDS", 0.0)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "talk.jsonl").write_text((json.dumps(CONVERSATION) + "\n") * 60)
    flags = {"data_type": "sft", "tokenizer": MINIMIND, "vocab_size": 6400, "ctx_len": 64, "my_exit_tokens": 0}
    for kind in ("check", "dry_run"):
        assert call(tmp_path / "run", folder / "talk.jsonl", **flags, **{kind: 1}) == 0
    words = capfd.readouterr().out
    assert "60 conversations" in words
    assert "two and two?" in words
    assert "are answers" in words
    assert everything(tmp_path) == [str(folder), str(folder / "talk.jsonl")]


def test_what_a_start_says_when_all_is_well_and_what_it_costs(tmp_path, data, capfd, monkeypatch):
    seconds = []
    quick = check.warn_at_start

    def timed(*given):
        begin = time.perf_counter()
        quick(*given)
        seconds.append(time.perf_counter() - begin)

    monkeypatch.setattr("src.training.run.warn_at_start", timed)
    assert call(tmp_path / "run", data) == 0
    assert "WARNING" not in capfd.readouterr().out
    assert seconds[0] < 2.0
    with monkeypatch.context() as full_disk:
        full_disk.setattr(machine, "free_disk", lambda folder: (tmp_path, 1e4))
        assert call(tmp_path / "other", data) == 0
    words = capfd.readouterr().out
    assert words.count("WARNING") == 1
    assert "disk:" in words
    assert call(tmp_path / "run", data, check=1) == 0  # the speed is known from the run
    assert "steps in metrics.csv" in capfd.readouterr().out


def test_kernel_that_computes_something_else_is_seen(monkeypatch):
    assert kernel.kernel_error("cpu", torch.float32, 64, "auto") < 1e-5
    assert kernel.kernel_error("cpu", torch.bfloat16, 32, "auto") < kernel.TOLERANCE[torch.bfloat16]
    exact = kernel.wkv7
    monkeypatch.setattr(kernel, "wkv7", lambda *given, **which: [x * 1.001 for x in exact(*given, **which)])
    assert kernel.kernel_error("cpu", torch.float32, 64, "auto") > kernel.TOLERANCE[torch.float32]
    monkeypatch.setattr(kernel, "wkv7", lambda *given, **which: [x * float("nan") for x in exact(*given, **which)])
    assert not kernel.kernel_error("cpu", torch.float32, 64, "auto") <= 1.0


# ---- the machine -----------------------------------------------------------------------------------------------------


def test_memory_of_a_container(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:    2048 kB\n")
    assert machine._available(tmp_path / "meminfo") == 2048 * 1024
    assert machine._available(tmp_path / "none") is None
    group = tmp_path / "cgroup" / "job" / "step"
    group.mkdir(parents=True)
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("5\n")
    assert machine._within_cgroup(tmp_path / "cgroup", own) is None
    (group.parent / "memory.max").write_text("1000\n")
    (group.parent / "memory.current").write_text("700\n")
    (group.parent / "memory.stat").write_text("anon 5\ninactive_file 200\n")
    assert machine._within_cgroup(tmp_path / "cgroup", own) == 500


def test_packages_are_compared_with_requirements(tmp_path, monkeypatch):
    assert machine.software().to_do == ""
    (tmp_path / "requirements.txt").write_text("# needed\ntorch>=99\nno-such-package-at-all>=1\n")
    monkeypatch.setattr(machine, "REQUIREMENTS", tmp_path / "requirements.txt")
    assert "torch>=99" in machine.software().to_do
    assert "no-such-package-at-all is missing" in machine.software().to_do


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_missing_compiler_is_on_the_list_where_it_is_needed(monkeypatch, tmp_path, data, capfd, kernel):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setattr(build, "_loaded", None)
    monkeypatch.setattr(build, "_failure", None)
    monkeypatch.setattr(speed, "TRIAL_SECONDS", 0.2)
    assert call(tmp_path / "run", data, check=1, kernel=kernel) == (1 if kernel == "auto" else 0)
    found, _, to_do = capfd.readouterr().out.partition("what to do:")
    assert "CXX is set to" in found
    assert ("CXX is set to" in to_do) == (kernel == "auto")
    assert ("--kernel reference" in to_do) == (kernel == "auto")


def no_nvcc():
    raise BuildError("there is a GPU but no nvcc: install the CUDA toolkit")


@pytest.mark.parametrize(
    ("capability", "built_for", "nvcc", "expected"),
    [
        ((9, 0), "13.0", "release 13.0, V13.0.48", ""),
        ((9, 0), "13.0", "release 12.4, V12.4.131", "CUDA toolkit 13.0"),
        ((9, 0), "13.0", None, "no nvcc"),
        ((6, 1), "13.0", "release 13.0, V13.0.48", "older PyTorch"),
        ((15, 0), "13.0", "release 13.0, V13.0.48", "newer PyTorch"),
    ],
    ids=["well", "nvcc too old", "no nvcc", "old GPU", "new GPU"],
)
def test_what_is_wrong_with_cuda(monkeypatch, capability, built_for, nvcc, expected):
    for name, value in {
        "is_available": True, "device_count": 2, "get_device_capability": capability, "get_device_name": "NVIDIA X",
        "get_arch_list": ["sm_75", "sm_90", "sm_120", "compute_120"],
    }.items():  # fmt: skip
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, value=value: value)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(machine, "find_nvcc", lambda: "nvcc" if nvcc else no_nvcc())
    monkeypatch.setattr(machine, "_output", lambda command: f"Cuda compilation tools, {nvcc}")
    finding = machine.cuda()
    assert "2 x NVIDIA X" in finding.words
    assert expected in finding.to_do
    assert bool(expected) == bool(finding.to_do)


def test_a_gpu_that_this_torch_cannot_use(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(machine, "_driver", lambda: "550.54")
    assert "PyTorch with CUDA" in machine.cuda().to_do
    assert machine.cuda(wanted=False).to_do == ""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "update the NVIDIA driver" in machine.cuda().to_do


# ---- memory ----------------------------------------------------------------------------------------------------------

LARGE = ModelConfig(24, 2048, 65536)


def large(**changed):
    return RunConfig(data_file="x", n_layer=24, n_embd=2048, ctx_len=4096, micro_bsz=16, **changed)


@pytest.mark.parametrize("gib", [400, 150, 80, 45, 30])
def test_what_is_offered_fits_and_keeps_the_samples_of_a_step(gib):
    offers = suggest_settings(large(), LARGE, GPU, gib * plan.GIB)
    assert offers
    for offer in offers:
        flags = dict(zip(*[iter(offer.split("    ")[0].replace("--", "").split())] * 2, strict=True))
        changed = replace(large(), **{name: int(value) for name, value in flags.items()})
        assert estimate(changed, LARGE, GPU).total <= gib * plan.GIB
        assert changed.micro_bsz * changed.accumulate_grad_batches == 16
        assert f"{estimate(changed, LARGE, GPU).total / plan.GIB:.1f} GiB" in offer


def test_larger_change_only_where_the_smaller_does_not_do():
    need = estimate(large(), LARGE, GPU).total
    assert any(offer.startswith("--head_chunk") for offer in suggest_settings(large(), LARGE, GPU, 0.985 * need))
    assert any("blocks are computed twice" in offer for offer in suggest_settings(large(), LARGE, GPU, 80 * plan.GIB))
    tight = suggest_settings(large(), LARGE, GPU, 30 * plan.GIB)
    assert len(tight) == 1
    assert "--grad_cp 1" in tight[0]
    assert "--micro_bsz" in tight[0]


def test_what_cannot_fit_is_said():
    offload = suggest_settings(large(), LARGE, GPU, 12 * plan.GIB)
    assert "offload" in offload[0]
    assert "a smaller model" in suggest_settings(large(), LARGE, CPU, 1 * plan.GIB)[0]
    assert "even --head_chunk 1024 --grad_cp 1 --micro_bsz 1" in suggest_settings(large(), LARGE, CPU, 1 * plan.GIB)[0]


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="no such system")
def test_a_limit_on_the_address_space_counts():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 29), hard))
        assert 0 < machine.free_memory("cpu", 1) <= 1 << 29
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_an_estimate_that_was_too_low_still_gives_advice():
    need = estimate(large(), LARGE, GPU).total
    words = advice(large(), LARGE, GPU, 10 * need, "CUDA out of memory. Tried to allocate 2 GiB\nlong story")
    assert "Tried to allocate 2 GiB" in words
    assert "long story" not in words
    assert "--grad_cp 1" in words
    assert max(SAFE.values()) < 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("shapes don't match"), False),
        (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) == expected


def test_out_of_memory_on_a_cpu_is_a_message_not_a_traceback(tmp_path, data):
    """A real failure: the address space is limited to 6 GiB, and 16,384 rows of 200,000 logits take 12."""
    flags = f"--proj_dir {tmp_path / 'run'} --data_file {data} --vocab_size 200000 --ctx_len 4096 --micro_bsz 4 --n_layer 1 --n_embd 32 " \
        "--head_size 16 --lr_init 1e-3 --my_exit_tokens 100000 --accelerator cpu --magic_prime 0"  # fmt: skip
    big = tmp_path / "big"
    with BinIdxWriter(big, np.uint16) as writer:
        writer.add_document(np.append(np.arange(120_000) % 60, 0))
    done = subprocess.run(
        [sys.executable, "train.py", *flags.replace(str(data), str(big)).split()],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)),
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "memory of the machine doesn't suffice" in done.stderr
    assert "--head_chunk 1024" in done.stderr
    assert re.search("--micro_bsz [12] --accumulate_grad_batches [24]", done.stderr)


def test_out_of_memory_while_building_is_a_message(tmp_path, data, capfd, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")

    monkeypatch.setattr("src.training.run.build_model", fails)
    assert call(tmp_path / "run", data) == 1
    assert "--check says what would fit" in capfd.readouterr().err
    assert out_of_memory.SMALL_HEAD_CHUNK > 0


# ---- --dry_run, --profile --------------------------------------------------------------------------------------------


def test_dry_run_takes_the_runs_first_two_steps_and_keeps_nothing(tmp_path, data, capfd):
    assert call(tmp_path / "run", data, dry_run=1) == 0
    words = capfd.readouterr().out
    assert everything(tmp_path) == []
    assert "OK: 2 of 20 steps taken" in words
    assert call(tmp_path / "run", data) == 0
    losses = [line.split(",")[2] for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:3]]
    for number, loss in enumerate(losses, start=1):
        assert f"step {number}: loss {float(loss):.4f}" in words


def test_ctrl_c_ends_a_dry_run_with_a_word(tmp_path, data, monkeypatch, capfd):
    def step(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGINT)
        return training_step(self, batch, batch_idx)

    training_step = TrainingModule.training_step
    monkeypatch.setattr(TrainingModule, "training_step", step)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        assert call(tmp_path / "run", data, dry_run=1) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "train.py: stopped at once" in capfd.readouterr().err


def test_dry_run_looks_at_the_held_out_data_too(tmp_path, data, capfd):
    assert call(tmp_path / "run", data, dry_run=1, val_data_file=tmp_path / "nope") == 2
    assert "nope.bin does not exist" in capfd.readouterr().err


def test_dry_run_from_where_the_run_would_go_on(tmp_path, data, capfd):
    assert call(tmp_path / "run", data) == 0
    for name in ("rwkv-final.pth", "rwkv-1.pth"):
        (tmp_path / "run" / name).unlink()
    newest = sorted((tmp_path / "run" / "resume").glob("step-*"))[-1]
    (newest / "state.json").write_text("{}")  # damaged: the one before is taken, and nothing is moved
    before = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    capfd.readouterr()
    assert call(tmp_path / "run", data, dry_run=1) == 0
    words = capfd.readouterr().out
    assert "step 11: loss" in words
    assert "OK: 2 of 20 steps taken" in words
    assert {path: os.stat(path).st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_profile_writes_a_trace_and_names_the_slowest(tmp_path, data, capfd):
    assert call(tmp_path / "run", data, profile=3) == 0
    words = capfd.readouterr().out
    assert "ui.perfetto.dev" in words
    slowest = words.split("slowest operations")[1].splitlines()[1:11]
    assert len(slowest) == 10
    shares = [float(line.split()[1].rstrip("%")) for line in slowest]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 100.1
    assert any("wkv7_backward" in line or "aten::" in line for line in slowest)
    with gzip.open(tmp_path / "run" / "profile.json.gz", "rt") as file:
        trace = json.load(file)
    spans = [
        event for event in trace["traceEvents"] if event.get("ph") == "X" and event["name"] == "rwkv7::wkv7_forward"
    ]
    assert len(spans) == 3 * 2  # three steps, two layers
    assert call(tmp_path / "short", data, profile=3, my_exit_tokens=CTX * 4 * 2) == 0
    assert "no trace" in capfd.readouterr().out
    assert not (tmp_path / "short" / "profile.json.gz").exists()


@pytest.mark.parametrize("failure", ["raises", "writes a part"])
def test_a_trace_that_cannot_be_written_is_no_reason_to_stop(tmp_path, data, capfd, monkeypatch, failure):
    def export(self, path):
        Path(path).write_text('{"traceEvents": [{"ph": "X", "na')
        if failure == "raises":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", export)
    assert call(tmp_path / "run", data, profile=3) == 0
    words = capfd.readouterr().out
    assert f"WARNING: --profile 3: {tmp_path}/run/profile.json.gz could not be written" in words
    assert "slowest operations" in words
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 21
    assert not [path for path in everything(tmp_path) if "profile" in path]


def test_stops_exclude_each_other(capsys):
    for argv in (
        ["--check", "--dry_run"],
        ["--check", "--plan"],
        ["--dry_run", "--profile", "2"],
        ["--dry_run", "--train_stage", "1"],
    ):
        with pytest.raises(SystemExit):
            parse(["--data_file", "x", *argv])
        assert all(word in capsys.readouterr().err for word in argv[:1])

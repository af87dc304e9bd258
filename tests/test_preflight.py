"""train.py --check, --dry_run, --profile and out-of-memory errors: their output and cost, and that nothing is
written."""

import gzip
import json
import os
import re
import resource
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import warm_process

from src.cli import parse
from src.config import ModelConfig, RunConfig
from src.dataset.binidx import BinIdxWriter
from src.errors import UserError
from src.ops import build
from src.ops.toolchain import BuildError
from src.training.distributed.process_group import ProcessGroup
from src.training.hardware import memory_limits
from src.training.hardware.selection import Hardware
from src.training.module import TrainingModule
from src.training.preflight import check, kernel, machine, plan, speed, timed_length
from src.training.preflight.checklist import Checklist
from src.training.preflight.out_of_memory import (
    SAFE_SHARE,
    OutOfMemory,
    estimate,
    is_out_of_memory,
    oom_message,
    suggest_settings,
    with_oom_advice,
)
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
        "n_embd": 32, "head_size": 16, "lr_init": 3e-3, "lr_final": 3e-4, "my_exit_tokens": CTX * 4 * 20,
        "epoch_steps": 10, "epoch_save": 1, "random_seed": 7, "accelerator": "cpu", **changed,
    }  # fmt: skip
    return run(*parse([text for name, value in settings.items() for text in (f"--{name}", str(value))]))


def all_paths(folder):
    return sorted(str(path) for path in folder.rglob("*"))


# ---- --check ---------------------------------------------------------------------------------------------------------


def test_check_of_a_run_without_problems(tmp_path, data, capfd, monkeypatch):
    monkeypatch.setattr(speed, "TRIAL_SECONDS", 0.2)
    before = all_paths(data.parent)
    assert call(tmp_path / "run", data, check=1) == 0
    output = capfd.readouterr().out
    assert output.rstrip().endswith("OK: no problems found")
    software = ("Python 3.", "torch 2.", "within", "float64")
    contents = ("200 documents, all 200 sampled ones end with token 0", "ids 0 to 5", "vocabulary 64")
    memory = ("weights 0.", "gradients 0.", "optimizer 0.", "activations 0.", "logits 0.", "GiB at peak")
    run_length = ("GiB are free", "20 steps of 64", "measured on")
    for text in (*software, *contents, *memory, *run_length):
        assert text in output, text
    assert all_paths(tmp_path) == []
    assert all_paths(data.parent) == before


def test_check_lists_all_problems(tmp_path, data, capfd, monkeypatch):
    monkeypatch.setattr(memory_limits, "free_memory", lambda *_: 1e5)
    monkeypatch.setattr(machine, "free_disk", lambda folder: (tmp_path, 1e4))
    monkeypatch.setattr(kernel, "kernel_error", lambda *_: 0.5)
    without_end = write_data(tmp_path / "data" / "without_end", end=5)
    assert call(tmp_path / "run", without_end, check=1) == 1
    items, _, problems = capfd.readouterr().out.partition("4 problems found:")
    assert items
    for text in ("don't end with token 0", "0.0 are free", "disk:", "--kernel portable", "--micro_bsz 1"):
        assert text in problems, text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"data_file": "nowhere/x"}, "nowhere/x"),
        ({"vocab_size": 20}, "--vocab_size 20"),
        ({"kernel": "chunked"}, "no tensor cores"),
        ({"train_stage": 3}, "--train_stage 3"),
        ({"magic_prime": 374}, "--magic_prime 374"),
        ({"load_model": "no.pth"}, "--load_model no.pth"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_check_lists_what_a_start_would_refuse(tmp_path, data, capfd, monkeypatch, changed, text):
    monkeypatch.setattr(speed, "TRIAL_SECONDS", 0.0)
    assert call(tmp_path / "run", data, **{"check": 1, **changed}) == 1
    items, _, problems = capfd.readouterr().out.partition(" found:")
    assert "see below" in items
    assert text in problems
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [UserError("no such file", flag="data_file", given="x"), OSError(5, "I/O error"), BuildError("no compiler")],
)
def test_checklist_lists_errors_of_users_and_machines(capsys, error):
    def fails():
        raise error

    checks = Checklist()
    assert checks.attempt("data", fails) is None
    assert checks.attempt("model", fails) is None  # the same error again
    assert checks.problems == [str(error)]
    assert checks.conclude() == 1
    assert str(error) in capsys.readouterr().out.split("1 problem found:")[1]


@pytest.mark.parametrize("error", [ValueError("shapes differ"), RuntimeError("illegal memory access"), KeyError("x")])
def test_checklist_passes_on_programming_errors(error):
    """Negative control: a defect of the program is no problem of the user's, and keeps its traceback."""

    def fails():
        raise error

    checks = Checklist()
    with pytest.raises(type(error)):
        checks.attempt("data", fails)
    assert checks.problems == []


CONVERSATION = {
    "conversations": [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]
}


@pytest.mark.skipif(not MINIMIND.is_dir(), reason="MiniMind's tokenizer is not installed")
def test_check_of_conversations_writes_no_cache(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(speed, "TRIAL_SECONDS", 0.0)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "talk.jsonl").write_text((json.dumps(CONVERSATION) + "\n") * 60)
    flags = {"data_type": "sft", "tokenizer": MINIMIND, "vocab_size": 6400, "ctx_len": 64, "my_exit_tokens": 0}
    for kind in ("check", "dry_run"):
        assert call(tmp_path / "run", folder / "talk.jsonl", **flags, **{kind: 1}) == 0
    output = capfd.readouterr().out
    assert "60 conversations" in output
    assert "two and two?" in output
    assert "are answers" in output
    assert all_paths(tmp_path) == [str(folder), str(folder / "talk.jsonl")]


def test_a_start_without_problems_warns_of_nothing_and_loses_no_time(tmp_path, data, capfd, monkeypatch):
    seconds = []
    warn_at_start = check.warn_at_start

    def timed(*args):
        began = time.thread_time()  # its own work: the machine may be busy with something else
        warn_at_start(*args)
        seconds.append(time.thread_time() - began)

    monkeypatch.setattr("src.training.training_run.warn_at_start", timed)
    assert call(tmp_path / "run", data) == 0
    assert "WARNING" not in capfd.readouterr().out
    assert seconds[0] < 2.0
    with monkeypatch.context() as full_disk:
        full_disk.setattr(machine, "free_disk", lambda folder: (tmp_path, 1e4))
        assert call(tmp_path / "other", data) == 0
    output = capfd.readouterr().out
    assert output.count("WARNING") == 1
    assert "disk:" in output
    assert call(tmp_path / "run", data, check=1) == 0  # with the recorded speed of the run
    assert "steps in metrics.csv" in capfd.readouterr().out


def test_a_kernel_with_wrong_results_is_detected(monkeypatch):
    assert kernel.kernel_error("cpu", torch.float32, 64, "auto") < 1e-5
    assert kernel.kernel_error("cpu", torch.bfloat16, 32, "auto") < kernel.TOLERANCE[torch.bfloat16]
    exact = kernel.wkv7
    monkeypatch.setattr(kernel, "wkv7", lambda *args, **kwargs: [x * 1.001 for x in exact(*args, **kwargs)])
    assert kernel.kernel_error("cpu", torch.float32, 64, "auto") > kernel.TOLERANCE[torch.float32]
    monkeypatch.setattr(kernel, "wkv7", lambda *args, **kwargs: [x * float("nan") for x in exact(*args, **kwargs)])
    assert not kernel.kernel_error("cpu", torch.float32, 64, "auto") <= 1.0


# ---- the machine -----------------------------------------------------------------------------------------------------


def test_free_memory_of_a_container(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:    2048 kB\n")
    assert memory_limits._available(tmp_path / "meminfo") == 2048 * 1024
    assert memory_limits._available(tmp_path / "none") is None
    group = tmp_path / "cgroup" / "job" / "step"
    group.mkdir(parents=True)
    membership = tmp_path / "own"
    membership.write_text("0::/job/step\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("5\n")
    assert memory_limits._cgroup_available(tmp_path / "cgroup", membership) is None
    (group.parent / "memory.max").write_text("1000\n")
    (group.parent / "memory.current").write_text("700\n")
    (group.parent / "memory.stat").write_text("anon 5\ninactive_file 200\n")
    assert memory_limits._cgroup_available(tmp_path / "cgroup", membership) == 500


def test_installed_packages_are_compared_with_the_requirements(tmp_path, monkeypatch):
    assert machine.software().problem == ""
    (tmp_path / "requirements.txt").write_text("# needed\ntorch>=99\nno-such-package-at-all>=1\n")
    monkeypatch.setattr(machine, "REQUIREMENTS", tmp_path / "requirements.txt")
    assert "torch>=99" in machine.software().problem
    assert "no-such-package-at-all is missing" in machine.software().problem


@pytest.mark.parametrize("kernel", ["recurrent", "auto", "portable"])
def test_a_missing_compiler_is_a_problem_only_where_it_is_needed(monkeypatch, tmp_path, data, capfd, kernel):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setattr(build, "_loaded", None)
    monkeypatch.setattr(build, "_failure", None)
    monkeypatch.setattr(speed, "TRIAL_SECONDS", 0.2)
    assert call(tmp_path / "run", data, check=1, kernel=kernel) == (1 if kernel == "recurrent" else 0)
    items, _, problems = capfd.readouterr().out.partition("problem found:")
    assert "CXX is set to" in items
    assert ("portable kernel" in items) == (kernel != "recurrent")
    assert ("CXX is set to" in problems) == (kernel == "recurrent")
    assert ("--kernel portable" in problems) == (kernel == "recurrent")


def no_nvcc():
    raise BuildError("no nvcc: install the CUDA toolkit")


@pytest.mark.parametrize(
    ("capability", "built_for", "nvcc", "expected"),
    [
        ((9, 0), "13.0", "release 13.0, V13.0.48", ""),
        ((9, 0), "13.0", "release 12.4, V12.4.131", "CUDA toolkit 13.0"),
        ((9, 0), "13.0", None, "no nvcc"),
        ((6, 1), "13.0", "release 13.0, V13.0.48", "older PyTorch"),
        ((15, 0), "13.0", "release 13.0, V13.0.48", "newer PyTorch"),
    ],
    ids=["no problem", "nvcc too old", "no nvcc", "old GPU", "new GPU"],
)
def test_problems_of_cuda(monkeypatch, capability, built_for, nvcc, expected):
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
    assert "2 x NVIDIA X" in finding.detail
    assert expected in finding.problem
    assert bool(expected) == bool(finding.problem)


def test_a_gpu_that_this_pytorch_cannot_use(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(machine, "_driver", lambda: "550.54")
    assert "PyTorch with CUDA" in machine.cuda().problem
    assert machine.cuda(is_used=False).problem == ""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "update the NVIDIA driver" in machine.cuda().problem


# ---- memory ----------------------------------------------------------------------------------------------------------

LARGE = ModelConfig(24, 2048, 65536)


def large(**changed):
    return RunConfig(data_file="x", n_layer=24, n_embd=2048, ctx_len=4096, micro_bsz=16, **changed)


@pytest.mark.parametrize("gib", [400, 150, 80, 45, 30])
def test_suggested_settings_fit_and_keep_the_samples_per_step(gib):
    suggestions = suggest_settings(large(), LARGE, GPU, gib * plan.GIB)
    assert suggestions
    for suggestion in suggestions:
        flags = dict(zip(*[iter(suggestion.split("    ")[0].replace("--", "").split())] * 2, strict=True))
        changed = replace(large(), **{name: int(value) for name, value in flags.items()})
        assert estimate(changed, LARGE, GPU).total <= gib * plan.GIB
        assert changed.micro_bsz * changed.accumulate_grad_batches == 16
        assert f"{estimate(changed, LARGE, GPU).total / plan.GIB:.1f} GiB" in suggestion


def test_changes_are_combined_only_where_one_is_not_enough():
    needed = estimate(large(), LARGE, GPU).total
    assert any(text.startswith("--head_chunk") for text in suggest_settings(large(), LARGE, GPU, 0.985 * needed))
    assert any("blocks are computed twice" in text for text in suggest_settings(large(), LARGE, GPU, 80 * plan.GIB))
    tight = suggest_settings(large(), LARGE, GPU, 30 * plan.GIB)
    assert len(tight) == 1
    assert "--grad_cp 1" in tight[0]
    assert "--micro_bsz" in tight[0]


def test_a_model_that_does_not_fit_needs_offloading_or_smaller_sizes():
    (offload,) = suggest_settings(large(), LARGE, GPU, 12 * plan.GIB)
    assert "--strategy deepspeed_stage_2_offload" in offload
    (smaller,) = suggest_settings(large(), LARGE, CPU, 1 * plan.GIB)
    assert "a smaller model" in smaller
    assert "even --head_chunk 1024 --grad_cp 1 --micro_bsz 1" in smaller


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
def test_a_limit_of_the_address_space_reduces_the_free_memory():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), hard))
        assert 0 < memory_limits.free_memory("cpu", 1) <= 1 << 29
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_an_error_despite_a_fitting_estimate_gives_advice():
    needed = estimate(large(), LARGE, GPU).total
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\ndetails of the allocator")
    message = oom_message(large(), LARGE, GPU, 10 * needed, error)
    assert message.startswith("out of memory on the GPU (CUDA out of memory. Tried to allocate 2 GiB)\n")
    assert "details of the allocator" not in message
    assert "--grad_cp 1" in message
    assert max(SAFE_SHARE.values()) < 1
    without_text = oom_message(large(), LARGE, CPU, None, MemoryError())
    assert without_text.startswith("out of memory on the CPU\n")
    assert "--grad_cp 1" in without_text


def test_only_out_of_memory_errors_get_advice():
    config, process_group = large(), ProcessGroup()
    with pytest.raises(OutOfMemory, match="--grad_cp 1"), with_oom_advice(config, LARGE, CPU, process_group):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), with_oom_advice(config, LARGE, CPU, process_group):
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("shapes don't match"), False),
        (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_out_of_memory_errors_are_recognised(error, expected):
    assert is_out_of_memory(error) == expected


def test_out_of_memory_on_a_cpu_gives_advice_instead_of_a_traceback(tmp_path):
    """A real failure: the address space is limited to 6 GiB, and 16,384 rows of 200,000 logits take 12."""
    with BinIdxWriter(tmp_path / "long", np.uint16) as writer:
        writer.add_document(np.append(np.arange(120_000) % 60, 0))
    flags = (
        f"--proj_dir {tmp_path / 'run'} --data_file {tmp_path / 'long'} --vocab_size 200000 --ctx_len 4096 "
        "--micro_bsz 4 --n_layer 1 --n_embd 32 --head_size 16 --lr_init 1e-3 --my_exit_tokens 100000 --accelerator cpu"
    )
    done = warm_process.run(
        [sys.executable, "train.py", *flags.split()],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_AS, (6 << 30, 6 << 30)),
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "train.py: out of memory on the CPU (" in done.stderr
    assert "--head_chunk 1024" in done.stderr
    assert re.search("--micro_bsz [12] --accumulate_grad_batches [24]", done.stderr)


@pytest.mark.parametrize("step", ["build_model", "find_resume_point"], ids=["in the fit", "before the fit"])
def test_out_of_memory_before_the_first_step_is_a_message(tmp_path, data, capfd, monkeypatch, step):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")

    monkeypatch.setattr(f"src.training.{'trainer' if step == 'build_model' else 'training_run'}.{step}", fails)
    assert call(tmp_path / "run", data) == 1
    error = capfd.readouterr().err
    assert error.startswith("train.py: out of memory")
    assert "Tried to allocate 8 GiB" in error
    assert ("--micro_bsz" if step == "build_model" else "--check") in error
    assert "Traceback" not in error


# ---- --dry_run, --profile --------------------------------------------------------------------------------------------


def test_dry_run_takes_the_first_two_steps_of_the_run_and_writes_nothing(tmp_path, data, capfd):
    assert call(tmp_path / "run", data, dry_run=1) == 0
    output = capfd.readouterr().out
    assert all_paths(tmp_path) == []
    assert "OK: 2 of 20 steps taken" in output
    assert call(tmp_path / "run", data) == 0
    losses = [line.split(",")[2] for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:3]]
    for number, loss in enumerate(losses, start=1):
        assert f"step {number}: loss {float(loss):.4f}" in output


def test_ctrl_c_ends_a_dry_run_with_a_message(tmp_path, data, monkeypatch, capfd):
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
    assert capfd.readouterr().err.startswith("train.py: interrupted")


def test_dry_run_checks_the_held_out_data(tmp_path, data, capfd):
    assert call(tmp_path / "run", data, dry_run=1, val_data_file=tmp_path / "missing") == 2
    assert "missing.bin" in capfd.readouterr().err


def test_dry_run_starts_where_the_run_would_resume(tmp_path, data, capfd):
    assert call(tmp_path / "run", data) == 0
    for name in ("rwkv-final.pth", "rwkv-1.pth"):
        (tmp_path / "run" / name).unlink()
    newest = sorted((tmp_path / "run" / "resume").glob("step-*"))[-1]
    (newest / "state.json").write_text("{}")  # damaged: the state before it is loaded, and nothing is moved
    before = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    capfd.readouterr()
    assert call(tmp_path / "run", data, dry_run=1) == 0
    output = capfd.readouterr().out
    assert "step 11: loss" in output
    assert "OK: 2 of 20 steps taken" in output
    assert {path: os.stat(path).st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_profile_writes_a_trace_and_prints_the_slowest_operations(tmp_path, data, capfd):
    assert call(tmp_path / "run", data, profile=3) == 0
    output = capfd.readouterr().out
    assert "ui.perfetto.dev" in output
    slowest = output.split("slowest operations")[1].splitlines()[1:11]
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
def test_a_trace_that_cannot_be_written_does_not_stop_the_run(tmp_path, data, capfd, monkeypatch, failure):
    def export(self, path):
        Path(path).write_text('{"traceEvents": [{"ph": "X", "na')
        if failure == "raises":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", export)
    assert call(tmp_path / "run", data, profile=3) == 0
    output = capfd.readouterr().out
    assert f"WARNING: --profile 3: {tmp_path}/run/profile.json.gz could not be written" in output
    assert "slowest operations" in output
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 21
    assert not [path for path in all_paths(tmp_path) if "profile" in path]


def test_modes_exclude_each_other(capsys):
    for argv in (
        ["--check", "--dry_run"],
        ["--check", "--plan"],
        ["--dry_run", "--profile", "2"],
        ["--dry_run", "--train_stage", "1"],
    ):
        with pytest.raises(SystemExit):
            parse(["--data_file", "x", *argv])
        assert argv[0] in capsys.readouterr().err


# ---- --train_minutes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens_per_second", "tokens"),
    [(100.0, 20_000), (1000.0, 54_000), (1e6, 90_000)],
    ids=["the fewest", "what fits", "all of the data"],
)
def test_tokens_that_fit_into_minutes(tokens_per_second, tokens):
    assert timed_length.timed_length(tokens_per_second, minutes=1, fewest=20_000, most=90_000) == tokens


def test_a_run_by_minutes_is_the_run_of_as_many_tokens_and_keeps_its_length(tmp_path, data, capfd, monkeypatch):
    def measured(*_):
        return speed.Speed(CTX * 4 * 15 / 60 / timed_length.STEPS_SHARE, "measured on nothing")

    monkeypatch.setattr(timed_length, "timed_steps", measured)
    by_time = {"my_exit_tokens": CTX * 4 * 5, "train_minutes": 1}
    monkeypatch.setattr(speed, "TRIAL_SECONDS", 0.0)
    assert call(tmp_path / "time", data, **by_time, check=1) == 0
    assert "960 tokens in 15 steps" in capfd.readouterr().out
    assert call(tmp_path / "time", data, **by_time, time_limit=1e-9) == 124  # stopped after the first step
    assert "15 steps of 4 x 16 tokens" in capfd.readouterr().out
    monkeypatch.setattr(timed_length, "timed_steps", lambda *_: pytest.fail("measured again"))
    assert call(tmp_path / "time", data, **by_time) == 0
    assert call(tmp_path / "tokens", data, my_exit_tokens=CTX * 4 * 15) == 0
    by_time_file, by_tokens_file = (tmp_path / name / "rwkv-final.pth" for name in ("time", "tokens"))
    weights, expected = torch.load(by_time_file), torch.load(by_tokens_file)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert call(tmp_path / "time", data, **by_time) == 0  # complete, and says so
    assert "is complete" in capfd.readouterr().out

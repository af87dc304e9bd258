"""tools/gpu_check.sh and the benchmarks that it runs, with commands that imitate a machine with a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from src.ops import wkv7

TESTS = Path(__file__).parent
SCRIPT = TESTS.parent / "tools" / "gpu_check.sh"
FIRST_PARTS = ["machine", "build", "errors", "times", "errors-wgmma", "times-wgmma", "op-errors", "op-times", "step"]
FIRST_PARTS += ["step-compiled", "step-graph"]
LATER_PARTS = ["tests", "tests-wgmma", "memcheck", "racecheck"]
LATER_PARTS += ["profile-kernels", "profile-ops", "profile-step", "low-rank"]
TOOLS = ("nvidia-smi", "nvcc", "python", "compute-sanitizer", "ncu", "nsys")


class Machine:
    """A folder of commands that print their arguments and exit with 0, and a folder for results."""

    def __init__(self, folder: Path) -> None:
        self.tools, self.out = folder / "tools", folder / "results"
        self.tools.mkdir()
        for name in TOOLS:
            self.imitate(name)

    def imitate(self, name: str, script: str = "") -> None:
        """`script` runs after the arguments were printed; it may use $* and exit."""
        path = self.tools / name
        path.write_text(f'#!/bin/sh\necho "{name} $*"\n{script}\nexit 0\n')
        path.chmod(0o755)

    def check(self, *parts: str, script: Path = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{self.tools}:/usr/bin:/bin", "PYTHON": "python", "OUT": str(self.out), **environment}
        command = ["sh", str(script), *parts]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, cwd=self.out.parent
        )

    def statuses(self) -> dict[str, str]:
        """By part in the order in which they ran: passed, failed, stopped or skipped."""
        lines = (self.out / "summary.txt").read_text().splitlines()
        return {name: status.split()[0].rstrip(",") for name, status in (line.split(": ", 1) for line in lines)}

    def output(self, part: str) -> str:
        return (self.out / f"{part}.txt").read_text()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_all_parts_run_with_the_quick_ones_first(machine):
    done = machine.check()
    assert done.returncode == 0, done.stdout + done.stderr
    names = list(machine.statuses())
    assert names[: len(FIRST_PARTS)] == FIRST_PARTS
    assert names[-len(LATER_PARTS) :] == LATER_PARTS
    assert set(machine.statuses().values()) == {"passed"}
    assert "tests/bench/wkv7_gpu.py errors" in machine.output("errors")
    assert "--config 0.1b" in machine.output("step")
    assert "--tool racecheck" in machine.output("racecheck")
    assert "-m pytest -q -m gpu tests" in machine.output("tests")
    assert all(machine.output(name) in done.stdout for name in names)


def test_a_failed_build_ends_it(machine):
    machine.imitate("python", 'case "$*" in *"wkv7_gpu.py build") exit 3;; esac')
    done = machine.check()
    assert done.returncode == 1
    assert machine.statuses() == {"machine": "passed", "build": "failed"}
    assert done.stdout.splitlines()[-1].startswith("failed: build;")
    assert machine.check("times").returncode == 0  # asked for by name


def test_errors_over_their_bound_do_not_keep_the_times_from_running(machine):
    machine.imitate("python", 'case "$*" in *"wkv7_gpu.py errors") echo OVER; exit 1;; esac')
    done = machine.check()
    assert done.returncode == 1
    assert {name for name, status in machine.statuses().items() if status != "passed"} == {"errors", "errors-wgmma"}
    assert "OVER" in machine.output("errors")
    assert machine.statuses()["times"] == "passed"


def test_the_same_command_continues_where_it_was_interrupted(machine):
    machine.imitate("python", 'case "$*" in *"wkv7_gpu.py times") exit 1;; esac')
    assert machine.check().returncode == 1
    machine.imitate("python", f'echo "$*" >> {machine.out}/calls')
    done = machine.check()
    assert done.returncode == 0
    calls = [line for line in (machine.out / "calls").read_text().splitlines() if "import pytest" not in line]
    assert calls == 2 * ["tests/bench/wkv7_gpu.py times"]  # of times and times-wgmma
    assert "step: passed in" in done.stdout


def test_only_the_parts_named_run(machine):
    assert machine.check("step", "memcheck").returncode == 0
    assert list(machine.statuses()) == ["step", "memcheck"]
    done = machine.check("steps")
    assert done.returncode == 1
    assert "no part is called steps" in done.stdout


def test_a_part_stops_at_its_time_limit(machine):
    machine.imitate("python", 'case "$*" in *"wkv7_gpu.py errors") sleep 60;; esac')
    assert machine.check("errors", "times", LIMIT="1").returncode == 1
    assert machine.statuses() == {"errors": "stopped", "times": "passed"}
    assert "tests/bench/wkv7_gpu.py errors" in machine.output("errors")  # what it printed until then


def test_missing_tools_skip_their_parts(machine):
    for name in ("compute-sanitizer", "ncu", "nsys"):
        (machine.tools / name).unlink()
    machine.imitate("python", 'case "$*" in *"import pytest") exit 1;; esac')
    done = machine.check()
    assert done.returncode == 0
    skipped = {name for name, status in machine.statuses().items() if status == "skipped"}
    assert skipped == {"tests", "memcheck", "racecheck", "profile-kernels", "profile-ops", "profile-step"}
    assert "pytest is not installed" in done.stdout


def test_results_go_to_the_ignored_output_folder_by_default(machine):
    folder = machine.tools.parent / "project" / "tools"
    folder.mkdir(parents=True)
    copy = folder / "gpu_check.sh"
    copy.write_bytes(SCRIPT.read_bytes())
    assert machine.check("build", script=copy, OUT="").returncode == 0
    assert (folder.parent / "out" / "gpu_check" / "build.txt").is_file()


def test_the_former_place_forwards(machine):
    assert machine.check("build", script=TESTS / "gpu_check.sh").returncode == 0
    assert list(machine.statuses()) == ["build"]


# ---- The benchmarks ----------------------------------------------------------------------------------------

# Packages that a machine with a GPU may lack, but for those that Lightning itself imports where it finds them.
MAY_BE_MISSING = "deepspeed wandb pyrwkv_tokenizer pytest hypothesis prompt_toolkit pyarrow rwkv"


def test_benchmarks_need_no_further_packages():
    # None in sys.modules makes an import fail, as if nothing were installed under that name.
    missing = f"sys.modules.update(dict.fromkeys({MAY_BE_MISSING.split()!r}))"
    script = f"import sys\n{missing}\nimport wkv7_gpu, step_ops_gpu, train_step, low_rank"
    environment = {**os.environ, "PYTHONPATH": str(TESTS / "bench")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def wkv7_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(TESTS / "bench"))
    import wkv7_gpu

    return wkv7_gpu


def test_kernel_benchmark_prints_its_table(wkv7_gpu, capsys):
    wkv7_gpu.report_times("cpu", [(1, 40, 2)], ("recurrent",), repetitions=2)
    table = capsys.readouterr().out.splitlines()
    assert table[-3].count("|") == table[-2].count("|") == table[-1].count("|") == 12
    assert table[-1].startswith("| 1, 40, 2 | recurrent | ")
    measured = wkv7_gpu.Measured(forward_ms=1.0, backward_ms=1.0, peak_bytes=2**30, kept_bytes=181.0, error=3.1e-3)
    # 2 097 152 token-heads of 2560 bytes in 2 ms are 2.68 TB/s, 67 % of a copy at 4 TB/s
    row = wkv7_gpu.line((8, 4096, 64), "chunked", measured, 4e12)
    assert row == "| 8, 4096, 64 | chunked | 1.000 | 1.000 | 2.000 | 1879 | 3490 | 67% | 1024 | 181 | 3.1e-03 |"
    assert wkv7_gpu.sets_beyond(cache_bytes=50 << 20, set_bytes=10 << 20) == 12


def test_kernel_benchmark_reports_an_error_over_its_bound_and_goes_on(wkv7_gpu, monkeypatch, capsys):
    monkeypatch.setattr(wkv7_gpu, "LENGTHS", (1, 5))
    assert wkv7_gpu.report_errors("cpu", ("recurrent",))
    assert "OVER" not in capsys.readouterr().out
    wrong = {"recurrent": lambda x: 2 * x, "auto": lambda x: x / 0}
    monkeypatch.setattr(wkv7_gpu, "wkv7", lambda *x, kernel: [wrong[kernel](y) for y in wkv7(*x, kernel="recurrent")])
    assert not wkv7_gpu.report_errors("cpu", ("recurrent", "auto"))
    output = capsys.readouterr().out
    assert "OVER ITS BOUND: y at T = 1, usual: 1.0e+00" in output
    assert "auto: largest error nan" in output


def test_kernel_benchmark_compares_with_the_exact_kernel(wkv7_gpu, monkeypatch):
    inputs = wkv7_gpu.problem(1, 8, 1, 64, torch.float32)
    x = [inputs[name] for name in wkv7_gpu.INPUTS]
    assert wkv7_gpu.error_against_exact(x, torch.ones(1, 8, 1, 64), "recurrent") == 0
    scale = {"auto": 1.5, "recurrent": 1}
    monkeypatch.setattr(wkv7_gpu, "wkv7", lambda *x, kernel: [y * scale[kernel] for y in wkv7(*x)])
    assert wkv7_gpu.error_against_exact(x, torch.ones(1, 8, 1, 64), "auto") == pytest.approx(0.5)


def test_kernel_benchmark_computes_its_reference_on_the_cpu_once(wkv7_gpu, monkeypatch):
    calls = []
    monkeypatch.setattr(wkv7_gpu, "LENGTHS", (1,))
    monkeypatch.setattr(wkv7_gpu, "answer", lambda x, *rest: (calls.append(x["r"].device.type), answer(x, *rest))[1])
    answer = sys.modules["host_cuda.problems"].answer
    wkv7_gpu.expected.cache_clear()
    wkv7_gpu.report_errors("cpu", ("recurrent", "auto"))
    assert calls == ["cpu"] * len(wkv7_gpu.KINDS)


def test_benchmark_of_the_other_ops(monkeypatch, capsys):
    """On a CPU, whose ops have the same schemas; an error over its bound is printed, and the others follow."""
    monkeypatch.syspath_prepend(str(TESTS / "bench"))
    import step_ops_gpu

    monkeypatch.setattr(step_ops_gpu, "DTYPES", (torch.bfloat16,))
    assert step_ops_gpu.report_errors("cpu", 9, 64)
    names = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [*(op.name for op in step_ops_gpu.OPS), "adamw"]
    relu = step_ops_gpu.relu_squared
    monkeypatch.setattr(
        step_ops_gpu, "relu_squared", lambda x, kernel: relu(x, kernel=kernel) * (1 + (kernel == "auto"))
    )
    assert not step_ops_gpu.report_errors("cpu", 9, 64)
    over = [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if "OVER ITS BOUND" in line]
    assert over == ["relu_squared"]
    step_ops_gpu.report_times("cpu", [(40, 64)], repetitions=2)
    table = capsys.readouterr().out.splitlines()[2:]
    assert [line.count("|") for line in table] == [8] * (2 + 2 * len(step_ops_gpu.OPS) + 1)


def test_step_benchmark_draws_its_weights_without_decompositions(monkeypatch):
    monkeypatch.syspath_prepend(str(TESTS / "bench"))
    import train_step

    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda *args, **kwargs: pytest.fail("an orthogonal matrix"))
    monkeypatch.setattr(torch.linalg, "qr", lambda *args, **kwargs: pytest.fail("a QR decomposition"))
    parser_args = [
        "train_step.py",
        "--config",
        "demo",
        "--n_layer",
        "1",
        "--n_embd",
        "64",
        "--ctx_len",
        "16",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", parser_args)
    config, vocab = train_step.settings(train_step.parse_arguments())
    step = train_step.Step(config, vocab)
    model = step.module.model
    assert all(parameter.isfinite().all() and parameter.std() >= 0 for parameter in model.parameters())
    assert 0.8 < model.head.weight.std() * 64**0.5 < 1.2
    step.run()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_step_benchmark_gives_each_kernel_to_a_part(monkeypatch):
    """A GPU's profile: annotations of the host on the GPU's line, kernels of ops, and kernels of a compiled graph."""
    monkeypatch.syspath_prepend(str(TESTS / "bench"))
    from train_step import gpu_split

    events = []

    def event(name, start, end, kernel="", parent=None, mark=False):
        """An op (or mark) on the host, what it started on the GPU, and for a mark its shadow there."""
        events.append(FunctionEvent(len(events), name, 0, start, end, is_user_annotation=mark))
        if parent is not None:
            events[-1].set_cpu_parent(parent)
        op = events[-1]
        if kernel or mark:
            op.append_kernel(kernel or name, 0, end - start)
            gpu(kernel or name, start, end, mark)
        return op

    def gpu(name, start, end, mark=False):
        events.append(
            FunctionEvent(len(events), name, 7, start, end, device_type=DeviceType.CUDA, is_user_annotation=mark)
        )

    event("aten::mm", 0, 4000, "nvjet_hsh_128x256")
    event("rwkv7::wkv7_forward", 4000, 5000, "wkv7_chunked_forward(Forward)")
    gpu("triton_poi_fused_add_mul_0", 5000, 7000)
    loss = event("part:loss", 7000, 9000, mark=True)
    event("aten::mm", 7000, 8000, "nvjet_hsh_128x256", loss)
    event("rwkv7::cross_entropy_l2wrap_forward", 8000, 9000, "forward_kernel", loss)
    optimizer = event("part:optimizer", 9000, 12000, mark=True)
    event("aten::_fused_adamw_", 9000, 12000, "multi_tensor_apply_kernel", optimizer)
    assert gpu_split(events) == {"GEMM": 5.0, "wkv7": 1.0, "elementwise": 2.0, "loss": 1.0, "optimizer": 3.0}

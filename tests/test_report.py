"""What a run reports: progress line, log files, values measured at some steps, figures; nothing waits for a device."""

import csv
import math
import os
import re
import struct
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chat_models import make_tokenizer
from training_runs import train

from src import run_log
from src.config import ModelConfig
from src.errors import UserError
from src.model import RWKV7
from src.run_log import read_columns, read_curves
from src.training.console import log
from src.training.control import RunControl
from src.training.distributed.process_group import ProcessGroup
from src.training.figures import background
from src.training.hardware import peak_flops
from src.training.hardware.selection import Hardware
from src.training.objectives.head_loss import HeadLoss
from src.training.objectives.next_token import NextToken
from src.training.optim import MasterAdamW, parameter_groups
from src.training.reporting import progress
from src.training.reporting.log_files import MetricsFile, TrainLog, ValidationFile
from src.training.reporting.progress import ProgressLine, duration
from src.training.reporting.reporter import MEASURE_EVERY_STEPS, Reporter, peak_memory_gib
from src.training.reporting.sink import UPDATE_GROUPS, MiniEpochReport, Sink, StepReport, ValidationReport
from src.training.reporting.update_ratio import update_ratios
from src.training.schedule import RunLength

LENGTH = RunLength.of(exit_tokens=64_000, ctx_len=16, global_batch=4, epoch_steps=10)  # 1000 steps


def report(step, loss=3.0, **changed):
    values = {
        "step": step,
        "tokens": 64 * (step + 1),
        "loss": loss,
        "lr": 6e-4,
        "grad_norm": 0.5,
        "tokens_per_second": 6400.0,
    }
    return StepReport(**{**values, "seconds": (step + 1) / 100, "memory_gib": 1.25, **changed})


# ---- progress line ---------------------------------------------------------------------------------------------------


def test_the_progress_line_shows_all_known_values():
    line = ProgressLine(LENGTH, 0, live=False)
    line.smoothed_loss = 3.21987
    assert line.describe(report(499, mfu=0.412)) == (
        "step 500/1000, mini-epoch 49, loss 3.2199, grad 0.50, lr 6.00e-04, 6,400 tokens/s, MFU 41%, 1.2 GiB, left 0:05"
    )
    assert "MFU" not in line.describe(report(499))  # on a CPU


@pytest.mark.parametrize("width", [140, 100, 80, 60, 40, 20])
def test_a_narrow_terminal_shows_the_most_important_values(width):
    line = ProgressLine(LENGTH, 0, live=False)
    line.smoothed_loss = 3.2
    text = line.describe(report(499, mfu=0.4), width)
    assert len(text) <= width
    assert "loss" in text or "step" in text
    assert ("GiB" in text) <= ("left" in text) <= ("tokens/s" in text)


def test_the_loss_is_smoothed_over_finite_values():
    line = ProgressLine(LENGTH, 0, live=False)
    for step in range(200):
        line.step(report(step, loss=4.0 if step < 100 else 2.0))
    assert 2.0 < line.smoothed_loss < 2.05
    before = line.smoothed_loss
    line.step(report(200, loss=math.nan))
    assert line.smoothed_loss == before


def test_without_a_terminal_a_line_is_printed_every_20_seconds(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now))
    line = ProgressLine(LENGTH, 0, live=False)
    for step in range(1000):
        now = step * 0.1
        line.step(report(step))
    steps = [int(number) for number in re.findall(r"^step (\d+)/1000", capsys.readouterr().out, re.M)]
    assert len(steps) == 5
    assert steps[-1] == 1000
    assert all(200 <= b - a <= 202 for a, b in zip([0, *steps], steps[:-1], strict=False))  # 20 s each


def test_messages_are_printed_above_the_progress_bar(capsys):
    line = ProgressLine(LENGTH, 0, live=True)
    line.step(report(9))
    line.mini_epoch(MiniEpochReport(0, 3.5, report(9)))
    line.validation(ValidationReport(10, 640, 3.4, 100, 0.5, is_best=True))
    log("WARNING: something")
    line.validation(ValidationReport(0, 0, 9.0, 100, 0.5, is_best=False))
    line.close()
    captured = capsys.readouterr()
    assert captured.err == ""  # which may be a file
    assert "| step 10/1000" in captured.out
    lines = [line.split("\r")[-1] for line in captured.out.splitlines()]
    assert [line for line in lines if line.strip() and "|" not in line] == [
        "mini-epoch 0: mean loss 3.5000, lr 0.00060000",
        "held-out loss 3.4000 after step 10, the lowest so far (0.5 s)",
        "WARNING: something",
        "held-out loss 9.0000 before the run (0.5 s)",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize(("rows", "columns", "live"), [(24, 80, True), (0, 0, False), (0, 80, False)])
def test_a_terminal_of_unknown_size_gets_plain_lines(monkeypatch, rows, columns, live):
    """As under `docker run -t` or `script`."""
    import fcntl
    import pty
    import termios

    master, slave = pty.openpty()
    try:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        with open(slave, "w", closefd=False) as terminal:
            monkeypatch.setattr(sys, "stdout", terminal)
            assert progress.has_live_line() == live
    finally:
        os.close(master)
        os.close(slave)


def test_durations_are_formatted_as_minutes_or_hours():
    assert [duration(s) for s in (0, 59.6, 3599, 3600, 90061)] == ["0:00", "1:00", "59:59", "1:00:00", "25:01:01"]


# ---- log files -------------------------------------------------------------------------------------------------------


def test_metrics_continue_from_the_saved_state(tmp_path):
    path = tmp_path / "metrics.csv"
    first = MetricsFile(path, 0, 64)
    for step in range(10):
        first.step(report(step, update_ratios={"w0": 1e-3, "matrices": 2e-3, "others": 3e-3} if step == 0 else {}))
    first.close()
    with open(path, "a") as file:
        file.write("10,704,3.0,0.0006")  # cut by a crash
    second = MetricsFile(path, 6, 64)
    assert second.lost_seconds == pytest.approx(4 * 64 / 6400)
    for step in range(6, 12):
        second.step(report(step, seconds=(step - 5) / 100))
    second.close()
    columns = read_columns(path)
    assert columns["step"] == list(range(12))
    assert columns["seconds"] == pytest.approx([(step + 1) / 100 for step in range(12)])  # one clock over both starts
    assert columns["update_matrices"][0] == 2e-3
    assert math.isnan(columns["update_matrices"][1])
    assert math.isnan(columns["mfu"][0])


@pytest.mark.parametrize("chunk_bytes", [1, 37, 1 << 16])
def test_columns_do_not_depend_on_the_chunks_they_are_read_in(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(run_log, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path, 0, 64)
    for step in range(60):
        ratios = {"w0": 1e-3, "matrices": 2e-3, "others": 3e-3}
        metrics.step(
            report(step, loss=math.nan if step == 7 else 3 + step / 7, update_ratios=ratios if step % 50 == 0 else {})
        )
    metrics.close()
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    with open(path, "a") as file:
        file.write("60,3904,3.0,0.0")  # a row that is being written
    columns = read_columns(path)
    assert list(columns) == list(MetricsFile.COLUMNS)
    for name, values in columns.items():
        assert values == pytest.approx([float(row[name] or "nan") for row in rows], nan_ok=True, rel=1e-12), name
    path.write_text("step,loss\n")
    assert read_columns(path) == {}
    for malformed in ("1,2\n3\n", "1,2,3\n1,2\n", "1,word\n1,2\n"):
        path.write_text(f"step,loss\n{malformed}")
        warnings = []
        assert {name: values.tolist() for name, values in run_log.read_arrays(path, warnings).items()} == {
            "step": [1],
            "loss": [2],
        }
        assert warnings == [f"{path}: 1 lines are damaged and left out"]


@pytest.mark.parametrize("record", ["[]", '{"settings"', '{"version": 99}'], ids=["no object", "cut", "later version"])
def test_curves_are_read_without_a_readable_run_json(tmp_path, record):
    metrics = MetricsFile(tmp_path / "metrics.csv", 0, 64)
    metrics.step(report(0))
    metrics.close()
    TrainLog(tmp_path / "train_log.txt", 0, 0, {"ctx_len": 16, "epoch_steps": 10, "global_batch": 4})
    (tmp_path / "run.json").write_text(record)
    curves = read_curves(tmp_path)
    assert curves.tokens.tolist() == [64]
    assert curves.mini_epoch_tokens == 10 * 64  # by the header of the log
    assert curves.settings["ctx_len"] == 16


def test_missing_columns_and_empty_folders_are_reported(tmp_path):
    with pytest.raises(UserError) as error:
        read_curves(tmp_path)
    assert error.value.given == tmp_path
    (tmp_path / "train_log.txt").write_text("NEW RUN\n")
    with pytest.raises(UserError) as error:
        read_curves(tmp_path)
    assert error.value.given == tmp_path
    (tmp_path / "metrics.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(UserError) as error:
        read_curves(tmp_path)
    assert error.value.given == tmp_path / "metrics.csv"
    assert "tokens, lr" in error.value.problem


def test_curves_are_read_without_torch():
    """A server or a script that only shows curves starts fast."""
    script = "import sys, src.run_log; print(*{'torch', 'pytorch_lightning', 'lightning_fabric'} & sys.modules.keys())"
    root = Path(__file__).parents[1]
    assert subprocess.check_output([sys.executable, "-c", script], cwd=root, text=True).strip() == ""


def test_metrics_of_an_earlier_version_are_continued(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(
        "step,tokens,loss,lr,grad_norm,tokens_per_second\n0,64,3.5,0.0006,0.5,6400\n1,128,3.4,0.0006,0.5,6400\n"
    )
    metrics = MetricsFile(path, 1, 64)
    metrics.step(report(1))
    metrics.close()
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1"]
    assert [row["loss"] for row in rows] == ["3.5", "3"]
    assert rows[0]["memory_gib"] == ""
    assert rows[1]["memory_gib"] == "1.25"


def test_validations_after_the_saved_state_are_dropped(tmp_path):
    path, log = tmp_path / "val.csv", tmp_path / "train_log.txt"
    sinks = [ValidationFile(path, -1), TrainLog(log, 0, -1, {})]
    for steps in (10, 20, 30):
        for sink in sinks:
            sink.validation(ValidationReport(steps, 64 * steps, 3.0, 100, 0.1, is_best=False))
    ValidationFile(path, 20)
    TrainLog(log, 2, 20, {})
    assert read_columns(path)["steps"] == [10, 20]
    assert re.findall(r"validation after step (\d+)", log.read_text()) == ["10", "20"]


def test_numbers_of_logs_are_whole(tmp_path):
    """fp32 values are read back as they were; a diverged run has a loss and no perplexity that could be written."""
    loss = float(torch.tensor(2.0).nextafter(torch.tensor(3.0)))
    metrics = MetricsFile(tmp_path / "metrics.csv", 0, 64)
    metrics.step(report(0, loss=loss, tokens=123_456_789_012))
    metrics.close()
    columns = read_columns(tmp_path / "metrics.csv")
    assert torch.tensor(columns["loss"]).item() == loss != 2
    assert columns["tokens"] == [123_456_789_012]
    log = TrainLog(tmp_path / "train_log.txt", 0, -1, {})
    for number, value in enumerate((math.log(2), 1e5, math.nan)):
        log.mini_epoch(MiniEpochReport(number, value, report(0)))
    lines = [line.split() for line in (tmp_path / "train_log.txt").read_text().splitlines()[-3:]]
    assert [(line[1], line[2]) for line in lines[::2]] == [("0.693147", "2.0000"), ("nan", "nan")]
    assert lines[1][1] == "100000.000000"
    assert [line[-1] for line in lines] == ["0", "1", "2"]


# ---- values measured at some steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_ratios_equal_those_of_the_weights_before_and_after_a_step(dtype):
    """Compared with weights copied before the step, group by group, with weight decay."""
    torch.manual_seed(0)
    model = RWKV7(ModelConfig(2, 32, 64, head_size=16, kernel="reference")).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    groups = parameter_groups(model, weight_decay=0.3)
    assert [group["lr_scale"] for group in groups] == [2.0, 1.0, 1.0]
    optimizer = MasterAdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-18, grad_clip=1.0)
    for _ in range(3):
        for parameter in optimizer.parameters:
            parameter.grad = torch.randn_like(parameter)
        before = [master.detach().clone() for master in optimizer.masters]
        optimizer.step()
    expected = []
    for group in optimizer.param_groups:
        pairs = [
            (optimizer.master_of(p), b)
            for p, b in zip(optimizer.parameters, before, strict=True)
            if any(p is q for q in group["params"])
        ]
        moved = math.sqrt(sum(float((now - then).detach().double().square().sum()) for now, then in pairs))
        expected.append(moved / math.sqrt(sum(float(now.detach().double().square().sum()) for now, _ in pairs)))
    assert update_ratios(optimizer).tolist() == pytest.approx(expected, rel=1e-4)

    for parameter in optimizer.parameters:
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.step()
    assert update_ratios(optimizer).tolist() == [0.0, 0.0, 0.0]  # the step was skipped


@pytest.mark.parametrize("chunk", [0, 3])
def test_the_largest_logit_is_that_of_the_head(chunk):
    head = torch.nn.Linear(8, 50, bias=False)
    module = HeadLoss(head, chunk)
    hidden, targets = torch.randn(2, 5, 8, requires_grad=True), torch.zeros(2, 5, dtype=torch.long)
    module(hidden, targets)
    assert math.isnan(module.largest_logit)
    module.measures_largest_logit = True
    module(hidden, targets)
    assert module.largest_logit.item() == pytest.approx(head(hidden).max().item())
    assert not module.largest_logit.requires_grad


def test_peak_flops_by_the_name_of_a_gpu():
    peak = {
        name: peak_flops.peak_flops(name)
        for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA L40S", "NVIDIA L4")
    }
    assert list(peak.values()) == [989.4e12, 989.4e12, 756e12, 362e12, 121e12]
    assert peak_flops.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops.peak_flops("NVIDIA GeForce RTX 4090") == 165.2e12
    assert peak_flops.peak_flops("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert peak_flops.peak_flops("Tesla T4") is None
    model = ModelConfig(12, 768, 65536)
    assert math.isnan(peak_flops.peak_tokens_per_second(model, Hardware("cpu", 1, 1, "bf16", "plain")))


def test_peak_memory_of_this_process_is_measured():
    assert 0.05 < peak_memory_gib(torch.device("cpu")) < 1000


# ---- values read one step late ---------------------------------------------------------------------------------------


class Recorder(Sink):
    def __init__(self):
        self.steps, self.mini_epochs = [], []

    def step(self, report):
        self.steps.append(report)

    def mini_epoch(self, report):
        self.mini_epochs.append(report)


def drive(device, steps, each=lambda step: None, peak=math.nan, lost=()):
    """The reports of a Reporter in `steps` steps whose loss is their number, or NaN where they are `lost`. `each` is
    called within every step."""
    torch.manual_seed(0)
    model = RWKV7(ModelConfig(1, 32, 64, head_size=16, kernel="reference")).to(device)
    optimizer = MasterAdamW(parameter_groups(model, 0.0), lr=1e-3, betas=(0.9, 0.99), eps=1e-18, grad_clip=1.0)
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    from src.training.module import TrainingModule

    module = TrainingModule.__new__(TrainingModule)
    torch.nn.Module.__init__(module)
    module.model, module.config, module.optimizer = model, SimpleNamespace(accumulate_grad_batches=1), optimizer
    module.objective = NextToken(model.head, 0)
    module._device = torch.device(device)
    trainer = SimpleNamespace(world_size=1, optimizers=[optimizer], strategy=None, global_step=0, should_stop=False)
    control = RunControl(ProcessGroup(), 0)
    recorder = Recorder()
    length = RunLength.of(exit_tokens=64 * steps, ctx_len=16, global_batch=4, epoch_steps=max(1, steps - 1))
    reporter = Reporter(control, length, [recorder], [], peak)
    reporter.on_train_start(trainer, module)
    hidden, targets = torch.randn(1, 4, 32, device=device), torch.zeros(1, 4, dtype=torch.long, device=device)
    losses = [torch.full((), math.nan if step in lost else float(step), device=device) for step in range(steps)]
    for step in range(steps):
        reporter.on_train_batch_start(trainer, module, None, step)
        module.objective.head_loss(hidden, targets)
        each(step)
        trainer.global_step += 1
        control.on_train_batch_end(trainer, module, None, None, step)
        reporter.on_train_batch_end(trainer, module, {"metrics": {"loss": losses[step]}}, None, step)
        if step < steps - 2:
            assert [report.step for report in recorder.steps] == list(range(step))  # this step is read later
    reporter.on_train_end(trainer, module)
    return recorder


def test_a_step_is_read_while_the_next_one_is_computed():
    recorder = drive("cpu", MEASURE_EVERY_STEPS + 5, peak=1e9)
    assert [report.loss for report in recorder.steps] == list(range(MEASURE_EVERY_STEPS + 5))
    assert [len(report.update_ratios) for report in recorder.steps if report.update_ratios] == [3, 3]
    measured = recorder.steps[MEASURE_EVERY_STEPS]
    assert tuple(measured.update_ratios) == UPDATE_GROUPS
    assert math.isfinite(measured.largest_logit)
    assert math.isnan(recorder.steps[1].largest_logit)
    assert 0 < measured.mfu < 1
    assert [report.mini_epoch for report in recorder.mini_epochs] == [0, 1]


def test_a_skipped_step_does_not_count_in_the_mean_of_its_mini_epoch():
    first, last = drive("cpu", 6, lost=[4]).mini_epochs
    assert (first.loss, last.loss) == (1.5, 5)


def test_validation_is_no_training_time(tmp_path, data, monkeypatch):
    """A step takes a second, a measurement of the held-out loss 1000."""
    from src.training import control, validation
    from src.training.module import TrainingModule
    from src.training.reporting import reporter

    now, original = [0.0], TrainingModule.training_step
    clock = SimpleNamespace(monotonic=lambda: now[0])

    def step(self, batch, batch_idx):
        now[0] += 1
        return original(self, batch, batch_idx)

    def measure(*_):
        now[0] += 1000
        return 3.0, 1

    monkeypatch.setattr(TrainingModule, "training_step", step)
    monkeypatch.setattr(validation, "mean_loss", measure)
    for module in (control, reporter, validation):
        monkeypatch.setattr(module, "time", clock)
    assert train(tmp_path / "run", data, val_data_file=data, val_every="5steps", my_exit_tokens=16 * 4 * 12) == 0
    columns = read_columns(tmp_path / "run" / "metrics.csv")
    assert columns["seconds"][-1] == max(columns["seconds"]) == 12
    assert columns["tokens_per_second"][0] == min(columns["tokens_per_second"]) == 32  # it is read a step late


def test_the_largest_logit_is_that_of_any_rank(monkeypatch):
    """Two ranks, the other of which has a larger one, then a smaller one."""
    from src.training.reporting import reporter

    of_other_rank = []

    def all_reduce(tensor, op):
        assert op == torch.distributed.ReduceOp.MAX
        tensor.copy_(tensor.clamp(min=of_other_rank.pop()))

    monkeypatch.setattr(reporter.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(reporter, "update_ratios", lambda optimizer: torch.zeros(3))
    head_loss = SimpleNamespace()
    module = SimpleNamespace(objective=SimpleNamespace(head_loss=head_loss), optimizer=None)
    measured = Reporter(RunControl(ProcessGroup(), 0), LENGTH, [], [])
    for other, largest in ((7.0, 7.0), (2.0, 5.0)):
        of_other_rank.append(other)
        head_loss.largest_logit = torch.tensor(5.0)
        assert measured._measure(SimpleNamespace(world_size=2), module)[0].item() == largest


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_nothing_waits_for_the_gpu():
    """Synchronising calls of PyTorch raise; reading waits only for an event of the step before."""
    drive("cuda", 3)  # the first calls allocate and may synchronise
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()

    def forbid(step):
        torch.cuda.set_sync_debug_mode("error" if step < MEASURE_EVERY_STEPS else before)

    try:
        drive("cuda", MEASURE_EVERY_STEPS + 2, forbid)
    finally:
        torch.cuda.set_sync_debug_mode(before)


# ---- figures and samples ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_broken", [False, True])
def test_figures_are_drawn_in_a_thread(tmp_path, data, monkeypatch, capfd, figures, is_broken):
    """At the ends of mini-epochs; an error is logged as a warning, and the run continues."""
    calls = []

    def draw(run, picture):
        calls.append((threading.current_thread().name, len(read_columns(run / "metrics.csv")["step"])))
        if is_broken:
            raise OSError("no ink")

    monkeypatch.setattr(background, "write_loss_figure", draw)
    monkeypatch.setattr(background, "DRAW_SECONDS", 0.0)
    assert train(tmp_path / "run", data) == 0  # 40 steps, 10 in a mini-epoch
    assert 1 <= len(calls) <= 3  # not while one is being drawn
    assert {name for name, _ in calls} == {"loss-figure"}
    assert all(steps >= 10 for _, steps in calls)
    assert ("WARNING: loss.png not written: OSError: no ink" in capfd.readouterr().out) == is_broken
    assert (tmp_path / "run" / "loss.png").stat().st_size > 10_000  # drawn again at the end of the run
    assert (tmp_path / "run" / "report.html").exists()


def test_a_run_completes_when_figures_and_samples_fail(tmp_path, data, monkeypatch, capfd, figures):
    def fail(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr("src.training.training_run.write_loss_figure", fail)
    monkeypatch.setattr("src.training.reporting.generations.generate_samples", fail)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    assert train(tmp_path / "run", data, vocab_size=400, tokenizer=tokenizer) == 0
    output = capfd.readouterr().out
    assert "WARNING: loss.png not written: RuntimeError: no ink" in output
    assert "WARNING: samples.json not written: RuntimeError: no ink" in output
    assert not (tmp_path / "run" / "samples.json").exists()
    assert (tmp_path / "run" / "rwkv-final.pth").exists()
    assert (tmp_path / "run" / "report.html").exists()


def test_drawing_takes_a_small_share_of_the_time(tmp_path, data, monkeypatch):
    """After a slow figure the next one is drawn much later; by a clock that goes on by a second in each mini-epoch."""
    calls, now, drawn = [], [0.0], [0.0]

    def draw(run, picture):
        calls.append(now[0])
        drawn[0] += 8 * background.TIME_SHARE  # of the drawing thread: 8 seconds of the run by TIME_SHARE

    def monotonic():
        now[0] += 0.5  # asked twice where it draws, once where it doesn't
        return now[0]

    monkeypatch.setattr(background, "time", SimpleNamespace(monotonic=monotonic, thread_time=lambda: drawn[0]))
    monkeypatch.setattr(background, "write_loss_figure", draw)
    monkeypatch.setattr(background, "DRAW_SECONDS", 0.0)
    assert train(tmp_path / "run", data, epoch_steps=1) == 0  # 40 mini-epochs, some 20 seconds by that clock
    assert 2 <= len(calls) <= 3
    assert all(later - earlier > 8 for earlier, later in pairwise(calls))


def test_the_figure_of_a_short_run_is_drawn_at_its_end_only(tmp_path, data, monkeypatch):
    monkeypatch.setattr(background, "write_loss_figure", lambda run, picture: pytest.fail("drawn during the run"))
    assert train(tmp_path / "run", data) == 0

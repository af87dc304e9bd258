"""What a run tells on its way: the live line, the files, values that are measured now and then, and that nothing waits for a device."""

import csv
import math
import os
import re
import struct
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from chat_models import make_tokenizer
from training_runs import train

from src.config import ModelConfig
from src.model import RWKV7
from src.run_log import read_columns
from src.training.console import log
from src.training.control import RunControl
from src.training.distributed.process_group import ProcessGroup
from src.training.figures import background
from src.training.hardware import peak_flops
from src.training.hardware.selection import Hardware
from src.training.objectives.next_token import HeadLoss, NextToken
from src.training.optim import MasterAdamW, parameter_groups
from src.training.reporting import log_files, progress
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


# ---- the live line ----------------------------------------------------------------------------------------------------------


def test_the_line_names_everything_that_is_known():
    line = ProgressLine(LENGTH, 0, live=False)
    line.smooth = 3.21987
    words = line.words(report(499, mfu=0.412))
    assert words == (
        "step 500/1000, mini-epoch 49, loss 3.2199, grad 0.50, lr 6.00e-04, 6,400 tokens/s, MFU 41%, 1.2 GiB, left 0:05"
    )
    assert "MFU" not in line.words(report(499))  # on a CPU


@pytest.mark.parametrize("width", [140, 100, 80, 60, 40, 20])
def test_a_narrow_terminal_gets_what_matters_most(width):
    line = ProgressLine(LENGTH, 0, live=False)
    line.smooth = 3.2
    words = line.words(report(499, mfu=0.4), width)
    assert len(words) <= width
    assert "loss" in words or "step" in words
    assert ("GiB" in words) <= ("left" in words) <= ("tokens/s" in words)


def test_the_loss_is_smoothed_and_bad_steps_leave_no_mark():
    line = ProgressLine(LENGTH, 0, live=False)
    for step in range(200):
        line.step(report(step, loss=4.0 if step < 100 else 2.0))
    assert 2.0 < line.smooth < 2.05
    before = line.smooth
    line.step(report(200, loss=math.nan))
    assert line.smooth == before


def test_without_a_terminal_there_is_a_line_every_so_many_seconds(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now))
    line = ProgressLine(LENGTH, 0, live=False)
    for step in range(1000):
        now = step * 0.1
        line.step(report(step))
    shown = re.findall(r"^step (\d+)/1000", capsys.readouterr().out, re.M)
    assert len(shown) == 5
    assert shown[-1] == "1000"
    assert all(200 <= int(b) - int(a) <= 202 for a, b in zip(["0", *shown], shown[:-1], strict=False))  # 20 s each


def test_the_live_line_and_what_is_said_above_it(capsys):
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
    said = [words.split("\r")[-1] for words in captured.out.splitlines()]  # each on a line of its own
    assert [words for words in said if words.strip() and "|" not in words] == [
        "mini-epoch 0: mean loss 3.5000, lr 0.00060000",
        "held-out loss 3.4000 after step 10, the lowest so far (0.5 s)",
        "WARNING: something",
        "held-out loss 9.0000 before the run (0.5 s)",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize(("rows", "columns", "live"), [(24, 80, True), (0, 0, False), (0, 80, False)])
def test_a_terminal_without_a_size_gets_plain_lines(monkeypatch, rows, columns, live):
    """As under `docker run -t` or `script`, where nobody has told it."""
    import fcntl
    import pty
    import termios

    ends = pty.openpty()
    try:
        fcntl.ioctl(ends[1], termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        with open(ends[1], "w", closefd=False) as terminal:
            monkeypatch.setattr(sys, "stdout", terminal)
            assert progress.has_live_line() == live
    finally:
        for end in ends:
            os.close(end)


def test_duration():
    assert [duration(s) for s in (0, 59.6, 3599, 3600, 90061)] == ["0:00", "1:00", "59:59", "1:00:00", "25:01:01"]


# ---- the files --------------------------------------------------------------------------------------------------------------


def test_metrics_go_on_where_the_saved_state_is(tmp_path):
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


@pytest.mark.parametrize("piece", [1, 37, 1 << 16])
def test_a_table_is_read_in_pieces_as_it_stands(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(log_files, "PIECE_BYTES", piece)
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
        file.write("60,3904,3.0,0.0")  # as it stands while a row is being written
    columns = read_columns(path)
    assert list(columns) == list(MetricsFile.COLUMNS)
    for name, values in columns.items():
        assert values == pytest.approx([float(row[name] or "nan") for row in rows], nan_ok=True, rel=1e-12), name
    path.write_text("step,loss\n")
    assert read_columns(path) == {}
    path.write_text("step,loss\n1,2\n3\n")
    with pytest.raises(ValueError, match=r"metrics.csv: a line is not like the others"):
        read_columns(path)


def test_metrics_of_an_earlier_version_are_read_and_continued(tmp_path):
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
    sinks = [ValidationFile(path, 0), TrainLog(log, 0, 0, {})]
    for steps in (10, 20, 30):
        for sink in sinks:
            sink.validation(ValidationReport(steps, 64 * steps, 3.0, 100, 0.1, is_best=False))
    ValidationFile(path, 20)
    TrainLog(log, 2, 20, {})
    assert read_columns(path)["steps"] == [10, 20]
    assert re.findall(r"validation after step (\d+)", log.read_text()) == ["10", "20"]


# ---- what is measured now and then ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_ratios_are_those_of_the_real_step(dtype):
    """Against weights copied before the step, group by group, with weight decay."""
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
    assert update_ratios(optimizer).tolist() == [0.0, 0.0, 0.0]  # the step was left out


@pytest.mark.parametrize("chunk", [0, 3])
def test_largest_logit(chunk):
    head = torch.nn.Linear(8, 50, bias=False)
    module, hidden, targets = (
        HeadLoss(head, chunk),
        torch.randn(2, 5, 8, requires_grad=True),
        torch.zeros(2, 5, dtype=torch.long),
    )
    module(hidden, targets)
    assert math.isnan(module.largest_logit)
    module.measures = True
    module(hidden, targets)
    assert module.largest_logit.item() == pytest.approx(head(hidden).max().item())
    assert not module.largest_logit.requires_grad


def test_peaks_of_gpus():
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


def test_memory_of_this_process_is_known():
    assert 0.05 < peak_memory_gib(torch.device("cpu")) < 1000


# ---- reading late -----------------------------------------------------------------------------------------------------------


class Recorder(Sink):
    def __init__(self):
        self.steps, self.mini_epochs = [], []

    def step(self, report):
        self.steps.append(report)

    def mini_epoch(self, report):
        self.mini_epochs.append(report)


def drive(device, steps, each=lambda step: None, peak=math.nan):
    """A Reporter beside steps of a model that does nothing but count."""
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
    losses = [torch.full((), float(step), device=device) for step in range(steps)]
    for step in range(steps):
        reporter.on_train_batch_start(trainer, module, None, step)
        module.objective.head_loss(hidden, targets)
        each(step)
        trainer.global_step += 1
        control.on_train_batch_end(trainer, module, None, None, step)
        reporter.on_train_batch_end(trainer, module, {"metrics": {"loss": losses[step]}}, None, step)
        if step < steps - 2:
            assert [report.step for report in recorder.steps] == list(range(step))  # this one is still on its way
    reporter.on_train_end(trainer, module)
    return recorder


def test_a_step_is_read_when_the_next_one_is_under_way():
    recorder = drive("cpu", MEASURE_EVERY_STEPS + 5, peak=1e9)
    assert [report.loss for report in recorder.steps] == list(range(MEASURE_EVERY_STEPS + 5))
    assert [len(report.update_ratios) for report in recorder.steps if report.update_ratios] == [3, 3]
    measured = recorder.steps[MEASURE_EVERY_STEPS]
    assert tuple(measured.update_ratios) == UPDATE_GROUPS
    assert math.isfinite(measured.largest_logit)
    assert math.isnan(recorder.steps[1].largest_logit)
    assert 0 < measured.mfu < 1
    assert [report.mini_epoch for report in recorder.mini_epochs] == [0, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_nothing_waits_for_the_gpu():
    """Synchronising calls of PyTorch raise; reading waits for an event of the step before only."""
    drive("cuda", 3)  # first calls may do more
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()

    def forbid(step):
        torch.cuda.set_sync_debug_mode("error" if step < MEASURE_EVERY_STEPS else before)

    try:
        drive("cuda", MEASURE_EVERY_STEPS + 2, forbid)
    finally:
        torch.cuda.set_sync_debug_mode(before)


# ---- pictures beside the run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [False, True])
def test_pictures_are_drawn_beside_the_run(tmp_path, data, monkeypatch, capfd, broken):
    """In a thread of their own, at each mini-epoch's end; one that fails is told, and the run goes on."""
    drawn = []

    def draw(run, picture):
        drawn.append((threading.current_thread().name, len(read_columns(run / "metrics.csv")["step"])))
        if broken:
            raise OSError("no ink")

    monkeypatch.setattr(background, "write_loss_figure", draw)
    monkeypatch.setattr(background, "DRAW_SECONDS", 0.0)
    assert train(tmp_path / "run", data) == 0  # 40 steps, 10 in a mini-epoch
    assert 1 <= len(drawn) <= 3  # not while one is under way
    assert {name for name, _ in drawn} == {"loss-figure"}
    assert all(steps >= 10 for _, steps in drawn)
    assert ("WARNING: no loss.png: OSError: no ink" in capfd.readouterr().out) == broken
    assert (tmp_path / "run" / "loss.png").stat().st_size > 10_000  # the last one, drawn when all was done
    assert (tmp_path / "run" / "report.html").exists()


def test_a_complete_run_is_none_the_worse_for_pictures_and_samples_that_fail(tmp_path, data, monkeypatch, capfd):
    def fail(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr("src.training.run.write_loss_figure", fail)
    monkeypatch.setattr("src.training.reporting.generations.write_samples", fail)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    assert train(tmp_path / "run", data, vocab_size=400, tokenizer=tokenizer) == 0
    words = capfd.readouterr().out
    assert "WARNING: no loss.png: RuntimeError: no ink" in words
    assert "WARNING: no samples.json: RuntimeError: no ink" in words
    assert (tmp_path / "run" / "rwkv-final.pth").exists()
    assert (tmp_path / "run" / "report.html").exists()


def test_pictures_take_a_small_share_of_the_time(tmp_path, data, monkeypatch):
    """One that takes long is not drawn again soon."""
    drawn = []

    def draw(run, picture):
        drawn.append(run)
        begin = time.thread_time()
        while time.thread_time() - begin < 0.05:  # 12 seconds of a run by TIME_SHARE
            pass

    monkeypatch.setattr(background, "write_loss_figure", draw)
    monkeypatch.setattr(background, "DRAW_SECONDS", 0.0)
    assert train(tmp_path / "run", data, epoch_steps=2) == 0
    assert len(drawn) == 1


def test_a_short_run_is_drawn_at_its_end_only(tmp_path, data, monkeypatch):
    monkeypatch.setattr(background, "write_loss_figure", lambda run, picture: pytest.fail("drawn too often"))
    assert train(tmp_path / "run", data) == 0

"""Figures, the report page and tools/verify_minipile.py, from logs: of whole runs, partial ones and other programs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from src.errors import UserError
from src.run_log import read_curves, read_log
from src.training import html_report, plot
from src.training.figures import published
from src.training.figures.loss_figure import draw_comparison, draw_run, write_loss_figure
from src.training.figures.report_page import write_report
from src.training.figures.reproduction import command_of, origin_of
from src.training.reporting.log_files import MetricsFile, TrainLog, ValidationFile
from src.training.reporting.sink import MiniEpochReport, StepReport, ValidationReport
from tools import verify_minipile

ROOT = Path(__file__).parents[1]
STEPS, MINI_EPOCH_STEPS = 3000, 100
PNG = b"\x89PNG\r\n\x1a\n"

# As other RWKV training programs write it: a printed dict, and no metrics.csv next to it. Mini-epoch 2 is there
# twice, as it was repeated after a stop of a day.
FOREIGN_LOG = """NEW RUN 2025-04-24-02-19-08
{'load_model': 'out/rwkv-init.pth', 'wandb': '', 'ctx_len': 512, 'epoch_steps': 2520, 'n_layer': 12, \
'lr_init': 0.0006, 'real_bsz': 16, 'magic_prime': 2926181}
0 4.880000 131.6307 0.00059975 2025-04-24 02:23:42.481256 0
1 4.030000 56.2609 0.00059899 2025-04-24 02:28:16.674463 1
2 3.800000 44.7012 0.00059773 2025-04-25 08:32:51.059568 2
NEW RUN 2025-04-25-08-40-00
2 3.801000 44.7459 0.00059773 2025-04-25 08:45:00.000000 0
3 3.660000 38.8613 0.00059597 2025-04-25 08:49:34.000000 1
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with all of its logs, written by the sinks themselves, without the training."""
    out = tmp_path_factory.mktemp("run") / "L12-D768-x070"
    out.mkdir()
    settings = {
        **published.SETTINGS, "epoch_steps": MINI_EPOCH_STEPS, "data_file": "data/<mini>pile", "tokenizer": "world",
        "head_size": 64, "random_seed": 7, "dim_ffn": 3072, "d_decay_lora": 64, "d_aaa_lora": 64, "d_mv_lora": 32,
        "d_gate_lora": 128, "load_model": "", "precision": "bf16",
    }  # fmt: skip
    sinks = [
        MetricsFile(out / "metrics.csv", 0, 8192),
        ValidationFile(out / "val.csv", 0),
        TrainLog(out / "train_log.txt", 0, 0, settings),
    ]
    noise = np.random.default_rng(0).normal(0, 0.2, STEPS)
    for step in range(STEPS):
        loss = float(3 + 6 * np.exp(-step / 300) + noise[step])
        report = StepReport(
            step, 8192 * (step + 1), loss, 6e-4 * (1 - step / STEPS), 0.4, 1e5, (step + 1) * 0.08, 11.5, 0.41
        )
        for sink in sinks:
            sink.step(report)
        if (step + 1) % MINI_EPOCH_STEPS == 0:
            for sink in sinks:
                sink.mini_epoch(MiniEpochReport(step // MINI_EPOCH_STEPS, loss, report))
        if (step + 1) % 500 == 0:
            for sink in sinks:
                sink.validation(ValidationReport(step + 1, 8192 * (step + 1), loss + 0.1, 1000, 1.0, is_best=True))
    for sink in sinks:
        sink.close()
    run_json = {
        "settings": settings,
        "tokenizer": "data/tok",
        "environment": {"git commit": "abc123", "GPU": "NVIDIA H200"},
        "origin": {"sha256": "", "path": ""},
    }
    (out / "run.json").write_text(json.dumps(run_json))
    samples = [{"prompt": "def <f>", "answer": "(x): return x", "in_data": "(y)"}]
    (out / "samples.json").write_text(json.dumps(samples))
    return out


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_logs_of_a_run_are_read_back(run):
    curves = read_curves(run)
    assert len(curves.tokens) == STEPS
    assert curves.seconds[-1] == pytest.approx(240)
    assert curves.mini_epoch_tokens == MINI_EPOCH_STEPS * 8192
    assert curves.val_tokens.tolist() == [8192.0 * 500 * n for n in range(1, 7)]
    assert curves.seconds_at(curves.val_tokens)[0] == pytest.approx(40)
    assert [line.number for line in curves.mini_epochs] == list(range(STEPS // MINI_EPOCH_STEPS))


def test_mini_epochs_have_the_size_that_the_run_started_with(run, tmp_path):
    """Its batch size may have been changed since then: the recorded number of samples counts."""
    run_json = json.loads((run / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**run_json, "mini_epoch_samples": 4000}))
    shutil.copy(run / "metrics.csv", tmp_path)
    assert read_curves(tmp_path).mini_epoch_tokens == 4000 * 512


def test_the_running_mean_is_over_the_last_finite_losses(run):
    curves = read_curves(run)
    curves.loss[100] = np.nan
    smoothed, width = curves.smoothed()
    assert width == 60
    assert smoothed[0] == curves.loss[0]
    assert smoothed[120] == pytest.approx(np.nanmean(curves.loss[61:121]))
    assert smoothed[-1] == pytest.approx(curves.loss[-60:].mean())


def test_log_of_another_program_is_read(tmp_path):
    (tmp_path / "train_log.txt").write_text(FOREIGN_LOG)
    for path in (tmp_path, tmp_path / "train_log.txt"):
        curves = read_curves(path)
        assert [line.loss for line in curves.mini_epochs] == [4.88, 4.03, 3.801, 3.66]  # the repeated one once
        assert curves.tokens.tolist() == [40320 * 512 * n for n in (1, 2, 3, 4)]
        # The day between the two starts is not training time.
        assert curves.seconds[-1] == pytest.approx(4 * 274, rel=0.01)
        assert curves.settings["n_layer"] == 12
    assert read_log("nothing\n") == []


@pytest.mark.parametrize("command", [plot.main, html_report.main], ids=["plot", "html_report"])
def test_folder_without_logs_is_an_error_of_the_user(tmp_path, capsys, command):
    with pytest.raises(UserError):
        read_curves(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        command([str(tmp_path / "nowhere")])
    assert exit_.value.code == 2
    assert str(tmp_path / "nowhere") in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- figures ---------------------------------------------------------------------------------------------------------


def labels_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_figure_of_a_run_has_its_curves_and_the_published_ones(run, tmp_path):
    by_tokens, _, lr_by_tokens, lr_by_time = draw_run(read_curves(run)).axes
    labels = labels_of(by_tokens)
    assert labels[0] == "each step, lowest to highest"
    assert {"mean of 60 steps", "held-out", "published, mean of a mini-epoch"} <= set(labels)
    assert lr_by_tokens.get_xlabel() == "million tokens"
    assert lr_by_time.get_xlabel() == "training time (minutes)"
    low, high = by_tokens.get_ylim()
    assert 2 < low < 3 < 8 < high < 10
    assert write_loss_figure(run, tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_published_losses_are_drawn_for_equal_settings_only(run):
    curves = read_curves(run)
    assert any("published" in label for label in labels_of(draw_run(curves).axes[0]))
    curves.settings["lr_init"] = 1e-3
    assert not any("published" in label for label in labels_of(draw_run(curves).axes[0]))


def test_outliers_of_single_steps_stay_in_the_band(run):
    """A long run is drawn with fewer points than it has steps; its highest loss is still there."""
    curves = read_curves(run)
    curves.loss[1234] = 50.0
    (band,) = draw_run(curves).axes[0].collections
    assert band.get_datalim(band.axes.transData).ymax == 50.0


@pytest.mark.parametrize("rows", [1, 2, 30])
def test_figure_of_a_run_that_has_just_started(run, tmp_path, rows):
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.csv").write_text("".join(lines[: rows + 1]) + "77,12")  # a last line that is being written
    assert write_loss_figure(tmp_path, tmp_path / "loss.png").stat().st_size > 5000
    assert len(read_curves(tmp_path).loss) == rows


def test_constant_learning_rate_lies_within_its_panel(run):
    curves = read_curves(run)
    curves.lr[:] = 3e-4
    low, high = draw_run(curves).axes[2].get_ylim()
    assert low == 0
    assert 3.1e-4 < high < 4e-4


def test_runs_are_compared_in_a_figure_and_a_table(run, tmp_path, capsys):
    foreign = tmp_path / "other"
    foreign.mkdir()
    (foreign / "train_log.txt").write_text(FOREIGN_LOG)
    assert plot.main([str(run), str(foreign), "--out", str(tmp_path / "both.png")]) == 0
    assert (tmp_path / "both.png").read_bytes().startswith(PNG)
    head, first, second, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "tokens", "loss", "held-out", "lowest", "tokens/s", "time"]
    assert first.startswith("L12-D768-x070")
    assert "24,576,000" in first
    assert "3.6600" in second
    figure = draw_comparison([read_curves(run), read_curves(foreign)])
    assert labels_of(figure.axes[0]) == ["L12-D768-x070", "L12-D768-x070, held-out", "other"]


@pytest.mark.parametrize(("name", "first_bytes"), [("loss.png", PNG), ("run.svg", b"<?xml")])
def test_figure_of_one_run_goes_into_its_folder_or_where_out_says(run, tmp_path, name, first_bytes):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert plot.main([str(copy), *(["--out", str(copy / name)] if name != "loss.png" else [])]) == 0
    assert (copy / name).read_bytes().startswith(first_bytes)


# ---- the report page -------------------------------------------------------------------------------------------------


def test_report_is_complete_and_needs_no_other_file(run, tmp_path, capsys):
    copy = tmp_path / run.name
    shutil.copytree(run, copy)
    page = write_report(copy).read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "Curves",
        "Speed",
        "Mini-epochs",
        "Samples",
        "How to reproduce it",
        "Environment",
        "Settings",
    ]
    assert "<svg" in page
    assert not re.findall(r"""(?:src|href)=["'](?!#)[^"']*["']""", page)  # no links, scripts or images
    assert "def &lt;f&gt;" in page
    assert "data/&lt;mini&gt;pile" in page
    assert "NVIDIA H200" in page
    assert "4.875856" in page  # the first loss of the published run
    command = re.search(r"<pre>(python train.py.*?)</pre>", page, re.S)[1]
    assert "--n_layer 12" in command
    assert "--random_seed 7" in command
    assert "--tokenizer data/tok" in command
    assert "d_decay_lora" not in command  # has the size that follows from the width
    assert html_report.main([str(copy)]) == 0
    assert capsys.readouterr().out == f"wrote {copy / 'report.html'}\n"
    assert (copy / "report.html").read_text() == page  # the same run, the same page


SFT = {"random_seed": 7, "data_type": "sft"}
FROM_FILE, FROM_SEED_7 = {"sha256": "f", "path": "x.pth", "seed": 7}, {"sha256": "", "seed": 7}
WRITTEN_FROM_SEED_7 = {"sha256": "f", "path": "", "seed": 7}  # as rwkv-init.pth


@pytest.mark.parametrize(
    ("settings", "origin", "seed", "weights"),
    [
        ({"random_seed": 9}, FROM_SEED_7, "7", "drawn from the seed"),  # 9 is the seed of a later start
        ({"random_seed": 9}, WRITTEN_FROM_SEED_7, "7", "drawn from the seed"),
        ({**SFT, "data": "12 conversations ab order 0"}, FROM_FILE, "0", "x.pth, "),
        ({**SFT, "data": "12 conversations ab order 7"}, FROM_FILE, "7", "x.pth, "),
        ({**SFT, "data": "12 conversations ab order 0"}, FROM_SEED_7, "0", "--train_stage 1 --random_seed 7"),
        ({**SFT, "data": "12 conversations ab", "order_seed": 0}, FROM_FILE, "0", "x.pth, "),
        ({**SFT, "data": "12 conversations ab", "order_seed": 7}, FROM_SEED_7, "7", "drawn from the seed"),
    ],
    ids=[
        "continued",
        "written",
        "sft",
        "sft with a seed",
        "sft of new weights",
        "recorded order",
        "recorded order and seed",
    ],
)
def test_command_has_the_seed_that_repeats_the_run(settings, origin, seed, weights):
    run_json = {"origin": origin}
    assert re.search(r"--random_seed (\d+)", command_of(settings, run_json))[1] == seed
    assert weights in origin_of(settings, run_json)


def test_command_is_read_by_a_shell_as_it_was_given():
    settings = {
        "data_file": "my data/it's",
        "proj_dir": "out/a",
        "n_layer": 12,
        "lr_init": 1e-3,
        "val_every": "500steps",
    }
    command = command_of(settings, {"tokenizer": "$HOME/tokenizer"})
    shell = subprocess.run(
        ["sh", "-c", f"python() {{ printf '%s\\n' \"$@\"; }}\n{command}"], capture_output=True, text=True
    )
    arguments = shell.stdout.splitlines()
    values = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert values == {
        "--data_file": "my data/it's",
        "--proj_dir": "out/a",
        "--n_layer": "12",
        "--lr_init": "0.001",
        "--tokenizer": "$HOME/tokenizer",
        "--val_every": "500steps",
    }


def test_report_of_a_log_of_another_program(tmp_path):
    (tmp_path / "train_log.txt").write_text(FOREIGN_LOG)
    page = write_report(tmp_path).read_text()
    assert "3.660000" in page
    assert "Samples" not in page
    assert "drawn from the seed" not in page  # nothing is known about its weights


# ---- the published run -----------------------------------------------------------------------------------------------


def published_log(change=None, lines=12):
    rows = [[n, loss, lr] for n, (loss, lr) in enumerate(published.MINI_EPOCHS[:lines])]
    for n, column, value in change or ():
        rows[n][column] = value
    text = "".join(f"{n} {loss + 0.004 * (-1) ** n:.6f} 9.9 {lr} 2026-01-01 00:00:00 {n}\n" for n, loss, lr in rows)
    return "NEW RUN\n" + json.dumps({**published.SETTINGS, "epoch_steps": 0}) + "\n" + text


@pytest.mark.parametrize(
    ("change", "lines", "code", "deviations"),
    [
        ((), 12, 0, []),
        ((), 3, 0, []),
        ([(5, 1, 3.530906)], 12, 1, [5]),
        ([(2, 1, float("nan"))], 12, 1, [2]),
        ([(7, 2, "0.00058398")], 12, 1, [7]),
        ([(4, 0, 5)], 12, 1, [4]),  # of the two lines for 5 the later counts, which is right
    ],
    ids=["complete", "in progress", "loss", "not a number", "learning rate", "gap"],
)
def test_run_is_compared_with_the_published_one(tmp_path, capsys, change, lines, code, deviations):
    (tmp_path / "train_log.txt").write_text(published_log(change, lines))
    sentences = verify_minipile.deviations(read_curves(tmp_path).mini_epochs)
    assert [int(re.match(r"mini-epoch (\d+)", sentence)[1]) for sentence in sentences] == deviations
    assert verify_minipile.main([str(tmp_path)]) == code
    output = capsys.readouterr().out
    assert f"PASS: {lines} of 12" in output or (code and "FAIL" in output)


def test_settings_other_than_the_published_are_noted(tmp_path, capsys):
    (tmp_path / "train_log.txt").write_text(published_log().replace('"global_batch": 16', '"global_batch": 32'))
    assert verify_minipile.main([str(tmp_path)]) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert {"global_batch", "32", "16"} <= set(re.findall(r"\w+", note))


def test_folder_without_logs_has_nothing_to_compare(tmp_path, capsys):
    assert verify_minipile.main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize("script", ["tools/verify_minipile.py", "tests/verify_minipile.py"])
def test_verify_minipile_runs_from_its_old_path_too(tmp_path, script):
    (tmp_path / "train_log.txt").write_text(published_log([(11, 1, 9.0)]))
    completed = subprocess.run(
        [sys.executable, ROOT / script, tmp_path], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert completed.returncode == 1, completed.stderr
    assert "mini-epoch 11: loss 9.004" in completed.stdout or "mini-epoch 11: loss 8.996" in completed.stdout

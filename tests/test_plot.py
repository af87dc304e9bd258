"""Pictures and the report: made from what a run leaves behind, whole or in part, ours or other programs'."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from src.run_log import read_curves, read_log
from src.training import html_report, plot
from src.training.figures import published
from src.training.reporting.log_files import MetricsFile, TrainLog, ValidationFile
from src.training.reporting.sink import MiniEpochReport, StepReport, ValidationReport

sys.path.insert(0, str(Path(__file__).parent))
import verify_minipile

STEPS, UNIT = 3000, 100  # steps, steps in a mini-epoch
PNG = b"\x89PNG\r\n\x1a\n"

# as other RWKV training programs write it: a printed dict, no metrics beside
FOREIGN = """NEW RUN 2025-04-24-02-19-08
{'load_model': 'out/rwkv-init.pth', 'wandb': '', 'ctx_len': 512, 'epoch_steps': 2520, 'n_layer': 12, 'lr_init': 0.0006, 'real_bsz': 16, 'magic_prime': 2926181}
0 4.880000 131.6307 0.00059975 2025-04-24 02:23:42.481256 0
1 4.030000 56.2609 0.00059899 2025-04-24 02:28:16.674463 1
2 3.800000 44.7012 0.00059773 2025-04-25 08:32:51.059568 2
NEW RUN 2025-04-25-08-40-00
2 3.801000 44.7459 0.00059773 2025-04-25 08:45:00.000000 0
3 3.660000 38.8613 0.00059597 2025-04-25 08:49:34.000000 1
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The files of a run, without the training."""
    out = tmp_path_factory.mktemp("run") / "L12-D768-x070"
    out.mkdir()
    settings = {
        **published.SETTINGS, "epoch_steps": UNIT, "data_file": "data/<mini>pile", "tokenizer": "world", "head_size": 64, "random_seed": 7,
        "dim_ffn": 3072, "d_decay_lora": 64, "d_aaa_lora": 64, "d_mv_lora": 32, "d_gate_lora": 128, "load_model": "", "precision": "bf16",
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
        if (step + 1) % UNIT == 0:
            for sink in sinks:
                sink.mini_epoch(MiniEpochReport(step // UNIT, loss, report))
        if (step + 1) % 500 == 0:
            for sink in sinks:
                sink.validation(ValidationReport(step + 1, 8192 * (step + 1), loss + 0.1, 1000, 1.0, is_best=True))
    for sink in sinks:
        sink.close()
    known = {
        "settings": settings,
        "tokenizer": "data/tok",
        "environment": {"git commit": "abc123", "GPU": "NVIDIA H200"},
        "origin": {"sha256": "", "path": ""},
    }
    (out / "run.json").write_text(json.dumps(known))
    samples = [{"prompt": "def <f>", "answer": "(x): return x", "in_data": "(y)"}]
    (out / "samples.json").write_text(json.dumps(samples))
    return out


# ---- reading ----------------------------------------------------------------------------------------------------------------


def test_a_run_is_read_back(run):
    curves = read_curves(run)
    assert len(curves.tokens) == STEPS
    assert curves.seconds[-1] == pytest.approx(240)
    assert curves.mini_epoch_tokens == UNIT * 8192
    known = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**known, "mini_epoch_samples": 4000}))  # of the batch that it began with
    assert read_curves(run).mini_epoch_tokens == 4000 * 512
    (run / "run.json").write_text(json.dumps(known))
    assert curves.val_tokens.tolist() == [8192.0 * 500 * n for n in range(1, 7)]
    assert curves.seconds_at(curves.val_tokens)[0] == pytest.approx(40)
    assert [line.number for line in curves.mini_epochs] == list(range(STEPS // UNIT))


def test_the_running_mean_is_over_the_last_finite_losses(run):
    curves = read_curves(run)
    curves.loss[100] = np.nan
    smoothed, width = curves.smoothed()
    assert width == 60
    assert smoothed[0] == curves.loss[0]
    assert smoothed[120] == pytest.approx(np.nanmean(curves.loss[61:121]))
    assert smoothed[-1] == pytest.approx(curves.loss[-60:].mean())


def test_a_foreign_log_is_read(tmp_path):
    (tmp_path / "train_log.txt").write_text(FOREIGN)
    for path in (tmp_path, tmp_path / "train_log.txt"):
        curves = read_curves(path)
        assert [line.loss for line in curves.mini_epochs] == [4.88, 4.03, 3.801, 3.66]  # of the repeated one the later
        assert curves.tokens.tolist() == [40320 * 512 * n for n in (1, 2, 3, 4)]
        # a day between two starts is no training
        assert curves.seconds[-1] == pytest.approx(4 * 274, rel=0.01)
        assert curves.settings["n_layer"] == 12
    assert read_log("nothing\n") == []


def test_nothing_to_read_is_said(tmp_path, capsys):
    with pytest.raises(ValueError, match="expected the folder of a run"):
        read_curves(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        plot.main([str(tmp_path / "nowhere")])
    assert exit_.value.code == 2
    assert "nowhere" in capsys.readouterr().err


# ---- pictures ---------------------------------------------------------------------------------------------------------------


def test_the_picture_shows_loss_val_rate_and_the_published_run(run, tmp_path):
    figure = plot.draw_run(read_curves(run))
    by_tokens, _, lr_by_tokens, lr_by_time = figure.axes
    labels = [text.get_text() for text in by_tokens.get_legend().get_texts()]
    assert labels[0] == "each step, lowest to highest"
    assert {"mean of 60 steps", "held-out", "published, mean of a mini-epoch"} <= set(labels)
    assert lr_by_tokens.get_xlabel() == "million tokens"
    assert lr_by_time.get_xlabel() == "training time (minutes)"
    low, high = by_tokens.get_ylim()
    assert 2 < low < 3 < 8 < high < 10
    assert plot.loss_picture(run, tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_other_settings_have_no_published_run_beside_them(run):
    curves = read_curves(run)
    curves.settings["lr_init"] = 1e-3
    assert "published" not in str([text.get_text() for text in plot.draw_run(curves).axes[0].get_legend().get_texts()])


@pytest.mark.parametrize("rows", [1, 2, 30])
def test_the_picture_of_a_run_that_has_just_begun(run, tmp_path, rows):
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.csv").write_text("".join(lines[: rows + 1]) + "77,12")
    assert plot.loss_picture(tmp_path, tmp_path / "loss.png").stat().st_size > 5000
    assert len(read_curves(tmp_path).loss) == rows


def test_runs_are_compared_from_their_logs(run, tmp_path, capsys):
    foreign = tmp_path / "other"
    foreign.mkdir()
    (foreign / "train_log.txt").write_text(FOREIGN)
    assert plot.main([str(run), str(foreign), "--out", str(tmp_path / "both.png")]) == 0
    assert (tmp_path / "both.png").read_bytes().startswith(PNG)
    head, first, second, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "tokens", "loss", "held-out", "lowest", "tokens/s", "time"]
    assert first.startswith("L12-D768-x070")
    assert "24,576,000" in first
    assert "3.6600" in second
    figure = plot.draw_comparison([read_curves(run), read_curves(foreign)])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "L12-D768-x070",
        "L12-D768-x070, held-out",
        "other",
    ]


# ---- the report -------------------------------------------------------------------------------------------------------------


def test_the_report_stands_alone(run, tmp_path):
    copy = tmp_path / run.name
    shutil.copytree(run, copy)
    page = html_report.write_report(copy).read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "Curves",
        "Speed",
        "Mini-epochs",
        "What it writes",
        "How to do it again",
        "Where it ran",
        "Settings",
    ]
    assert "<svg" in page
    assert not re.findall(r"""(?:src|href)=["'](?!#)[^"']*["']""", page)  # nothing is fetched
    assert "def &lt;f&gt;" in page
    assert "data/&lt;mini&gt;pile" in page
    assert "NVIDIA H200" in page
    assert "4.875856" in page  # the published run beside
    command = re.search(r"<pre>(python train.py.*?)</pre>", page, re.S)[1]
    assert "--n_layer 12" in command
    assert "--random_seed 7" in command
    assert "--tokenizer data/tok" in command
    assert "d_decay_lora" not in command  # follows from the width
    assert html_report.write_report(copy).read_text() == page  # the same run, the same page


@pytest.mark.parametrize(
    ("settings", "origin", "seed", "weights"),
    [
        ({"random_seed": 9}, {"sha256": "", "seed": 7}, "7", "drawn from the seed"),  # 9 is that of a later start
        ({"random_seed": 7, "data_type": "sft", "data": "12 conversations ab order 0"}, {"sha256": "f", "path": "x.pth", "seed": 7}, "0", "x.pth, "),
        ({"random_seed": 7, "data_type": "sft", "data": "12 conversations ab order 7"}, {"sha256": "f", "path": "x.pth", "seed": 7}, "7", "x.pth, "),
        ({"random_seed": 7, "data_type": "sft", "data": "12 conversations ab order 0"}, {"sha256": "", "seed": 7}, "0", "--train_stage 1 --random_seed 7"),
    ],
    ids=["continued", "sft", "sft with a seed", "sft of new weights"],
)  # fmt: skip
def test_the_command_names_the_seed_that_gives_the_same_run(settings, origin, seed, weights):
    words = html_report._again(settings, {"origin": origin})
    assert re.search(r"--random_seed (\d+)", words)[1] == seed
    assert weights in words


def test_the_report_of_a_folder_that_knows_little(tmp_path):
    (tmp_path / "train_log.txt").write_text(FOREIGN)
    page = html_report.write_report(tmp_path).read_text()
    assert "3.660000" in page
    assert "What it writes" not in page


# ---- the published run ------------------------------------------------------------------------------------------------------


def published_log(change=None, lines=12):
    rows = [[n, loss, lr] for n, (loss, lr) in enumerate(published.MINI_EPOCHS[:lines])]
    for n, column, value in change or ():
        rows[n][column] = value
    text = "".join(f"{n} {loss + 0.004 * (-1) ** n:.6f} 9.9 {lr} 2026-01-01 00:00:00 {n}\n" for n, loss, lr in rows)
    return "NEW RUN\n" + json.dumps({**published.SETTINGS, "epoch_steps": 0}) + "\n" + text


@pytest.mark.parametrize(
    ("change", "lines", "code", "words"),
    [
        ((), 12, 0, "PASS: 12 of 12"),
        ((), 3, 0, "PASS: 3 of 12"),
        (
            [(5, 1, 3.530906)],
            12,
            1,
            "LEFT the published run at mini-epoch 5: loss 3.526906, published 3.510906: off by +0.016000",
        ),
        ([(2, 1, float("nan"))], 12, 1, "LEFT the published run at mini-epoch 2"),
        (
            [(7, 2, "0.00058398")],
            12,
            1,
            "LEFT the published run at mini-epoch 7: learning rate 0.00058398, published 0.00058399",
        ),
        ([(4, 0, 5)], 12, 1, "mini-epoch 4 is missing"),
    ],
    ids=["whole", "under way", "loss", "not a number", "rate", "gap"],
)
def test_the_published_run_is_recognised(tmp_path, capsys, change, lines, code, words):
    (tmp_path / "train_log.txt").write_text(published_log(change, lines))
    assert verify_minipile.main([str(tmp_path)]) == code
    assert words in capsys.readouterr().out


def test_another_batch_is_pointed_out(tmp_path, capsys):
    (tmp_path / "train_log.txt").write_text(published_log().replace('"global_batch": 16', '"global_batch": 32'))
    verify_minipile.main([str(tmp_path)])
    assert "global_batch 32 instead of 16" in capsys.readouterr().out


def test_no_run_at_all(tmp_path, capsys):
    assert verify_minipile.main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err

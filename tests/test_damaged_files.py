"""Damaged files in a run's folder: what the run doesn't need is named, renamed and begun anew; what it needs is named;
figures and reports show what can be read."""

import json
import math
import shutil

import pytest
from training_runs import CTX, log_lines, losses, newest_state, train, train_until

from src import run_folder
from src.errors import UserError
from src.run_folder import newest_weights, numbered_weights, read_run
from src.run_log import read_arrays, read_columns, read_curves, read_log
from src.training.checkpoint.storage import state_folders
from src.training.figures.report_page import write_report
from src.training.plot import main as plot
from src.training.reporting.log_files import MetricsFile, TrainLog, ValidationFile
from src.training.reporting.sink import ValidationReport

RUN = {"my_exit_tokens": CTX * 4 * 30, "epoch_steps": 10, "epoch_save": 1, "val_every": "5steps", "val_windows": 8}


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    """They take most of the time of a tiny run."""
    for name in ("write_loss_figure", "write_report"):
        monkeypatch.setattr(f"src.training.training_run.{name}", lambda *arguments: "")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, data):
    """A run that was killed in step 25 of 30, with a state after step 20."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        train_until(25, out, data, patch, val_data_file=data, **RUN)
    return out


@pytest.fixture
def out(tmp_path, stopped):
    return shutil.copytree(stopped, tmp_path / "run")


DAMAGES = {
    "wrong bytes": lambda content: content[: len(content) // 2] + b"\xff\xfe\x81" + content[len(content) // 2 :],
    "NULs": lambda content: content[: len(content) // 3] + bytes(50) + content[len(content) // 3 + 50 :],
    "all NULs": lambda content: bytes(len(content)),
    "another file": lambda content: b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8 + b"\n",
    "another header": lambda content: b"a,b,c\n" + content.partition(b"\n")[2],
    "words": lambda content: content.replace(b"0", b"zero"),
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["metrics.csv", "val.csv", "train_log.txt"])
def test_a_damaged_log_is_named_renamed_and_begun_anew(out, stopped, capsys, name, damage):
    """With the lines that can be read, and of the small ones those that the state has."""
    content = DAMAGES[damage]((out / name).read_bytes())
    (out / name).write_bytes(content)
    saved = newest_state(stopped).logs
    metrics = MetricsFile(out / "metrics.csv", 20, CTX * 4)
    metrics.close()
    ValidationFile(out / "val.csv", 20, saved)
    TrainLog(out / "train_log.txt", 2, 20, {}, saved)
    output = capsys.readouterr().out
    # words in a log are a header; a file without a line's end is a line that was cut: nothing of it was ever read
    if b"\n" in content and (name, damage) not in (("train_log.txt", "another header"), ("train_log.txt", "words")):
        assert f"WARNING: {out / name} is damaged: " in output
        assert f"renamed to damaged-{name}" in output
        assert (out / f"damaged-{name}").read_bytes() == content
    assert [line.number for line in read_log((out / "train_log.txt").read_text())] == [0, 1]
    assert (out / "val.csv").read_text() == "".join((stopped / "val.csv").read_text().splitlines(keepends=True)[:5])
    steps = read_columns(out / "metrics.csv").get("step", [])
    assert len(steps) + metrics.missing_steps == 20
    if name != "metrics.csv":
        assert steps == list(range(20))


def test_a_run_goes_on_without_its_logs(out, data, capfd):
    for name in ("metrics.csv", "val.csv", "train_log.txt"):
        (out / name).write_bytes(b"\xff\0\n" * 100)
    assert train(out, data, val_data_file=data, **RUN) == 0
    output = capfd.readouterr().out
    assert output.count("is damaged") == 3
    assert "metrics.csv has no rows of 20 of the 20 steps before this start" in output
    assert [line[0] for line in log_lines(out)] == ["0", "1", "2"]
    assert read_columns(out / "val.csv")["steps"] == [5, 10, 15, 20, 25, 30]
    assert len(losses(out)) == 10


def test_a_log_that_the_disk_cannot_read_is_damaged(tmp_path, monkeypatch, capsys):
    from pathlib import Path

    original = Path.read_bytes

    def failing(path):
        if path.name == "metrics.csv" and path.parent == tmp_path:
            raise OSError(5, "Input/output error", str(path))
        return original(path)

    (tmp_path / "metrics.csv").write_text("step,tokens\n0,64\n")
    monkeypatch.setattr(Path, "read_bytes", failing)
    MetricsFile(tmp_path / "metrics.csv", 1, 64).close()
    assert "can't be read (Input/output error)" in capsys.readouterr().out
    assert (tmp_path / "damaged-metrics.csv").exists()


RECORDS = {
    "cut": '{"version": 2, "sett',
    "deep": "[" * 100_000,
    "a list": "[]",
    "NULs": "\0" * 300,
    "settings": '{"settings": []}',
    "a size": '{"settings": {"global_batch": "four"}}',
    "an infinite size": '{"settings": {"ctx_len": Infinity}}',
    "a negative size": '{"mini_epoch_samples": -3}',
    "precision": '{"settings": {"precision": 7}}',
    "the origin's path": '{"origin": {"path": 3, "sha256": ""}}',
    "the tokenizer": '{"tokenizer": ["x"]}',
    "held out": '{"held_out": 3}',
    "the version": '{"version": "new"}',
    "a huge version": '{"version": 1e999}',
}


@pytest.mark.parametrize("text", RECORDS.values(), ids=RECORDS.keys())
def test_a_damaged_run_json_is_refused_with_its_name(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError) as refused:
        read_run(tmp_path)
    assert refused.value.given == tmp_path / "run.json"
    assert "delete it" in refused.value.advice


def test_a_start_with_a_damaged_run_json_says_so(out, data, capfd):
    (out / "run.json").write_text('{"settings": {"global_batch": "four"}}')
    assert train(out, data, val_data_file=data, **RUN) == 2
    error = capfd.readouterr().err
    assert f"{out / 'run.json'}: unreadable" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("name", ["rwkv-99999999999999999999.pth", "rwkv-007.pth", "rwkv-٣.pth", "rwkv--1.pth"])
def test_names_that_no_run_writes_are_no_steps(out, name):
    (out / name).write_bytes(b"anything")
    (out / "resume" / "step-99999999999999999999").mkdir()
    assert list(numbered_weights(out)) == [0, 1]
    assert newest_weights(out) == out / "rwkv-1.pth"
    assert [folder.name for folder in state_folders(out)] == ["step-00000020", "step-00000010"]


def test_damaged_files_are_archived_with_the_run(out):
    (out / "damaged-metrics.csv").write_text("")
    archive = run_folder.archive_run(out)
    assert (archive / "damaged-metrics.csv").exists()


# ---- reports ---------------------------------------------------------------------------------------------------------


def draw(curves):
    """A figure takes a second to draw: here an empty one, from curves that have what it needs."""
    import matplotlib.figure

    assert curves.smoothed()[0].shape == curves.tokens.shape == curves.seconds_at(curves.tokens).shape
    assert len(curves.seconds_at(curves.val_tokens)) == len(curves.val_loss)
    return matplotlib.figure.Figure()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", b"["),
        ("samples.json", b"{"),
        ("samples.json", b"[" * 100_000),
        ("samples.json", b'[{"prompt": 3, "answer": "x"}]'),
        ("val.csv", b"steps,tokens,loss,counted\n5,x,y\n10,640,3.0,128\n"),
        ("val.csv", bytes(200) + b"\n1\n"),
        ("train_log.txt", b"\xff\xfe\n" * 20),
        ("train_log.txt", b"{" * 100_000 + b"\n1 2 3 4 5 6 7\n\xb2 1.0 2.0 3e-4 2026-01-01 00:00:00 0\n"),
    ],
)
def test_figures_and_reports_show_what_can_be_read(out, capsys, monkeypatch, name, content):
    for module in ("src.training.figures.report_page", "src.training.plot"):
        monkeypatch.setattr(f"{module}.draw_run", draw)
    monkeypatch.setattr("src.training.plot.write_figure", lambda figure, path: figure)
    (out / name).write_bytes(content)
    page = write_report(out).read_text()
    assert "training loss" in page
    if name != "train_log.txt":
        assert f"Not everything could be read:<br>{out / name}" in page
        assert f"WARNING: {out / name}" in capsys.readouterr().out
    assert plot([str(out), "--out", str(out / "figure.png")]) == 0


def test_damaged_lines_of_metrics_are_left_out_and_counted(out):
    lines = (out / "metrics.csv").read_bytes().splitlines(keepends=True)
    whole = read_arrays(out / "metrics.csv")
    lines[4], lines[9] = b"\0" * 40 + b"\n", lines[9].replace(b",", b";", 1)
    (out / "metrics.csv").write_bytes(b"".join(lines))
    curves = read_curves(out)
    assert curves.loss.tolist() == [loss for i, loss in enumerate(whole["loss"].tolist()) if i not in (3, 8)]
    assert curves.warnings == [f"{out / 'metrics.csv'}: 2 lines are damaged and left out"]


def test_without_readable_metrics_the_curves_are_those_of_the_log(out):
    (out / "metrics.csv").write_bytes(b"a,b\n1,2\n")
    curves = read_curves(out)
    assert not curves.by_step
    assert len(curves.loss) == 2
    assert "no column step" in curves.warnings[0]


def test_lines_that_are_none_of_a_log_are_passed_over():
    text = "0 3.0 20.1 0.0006 2026-01-01 00:00:00 0\n1 x 20.1 0.0006 2026-01-01 00:00:00 0\n"
    text += "99999999999999999999 3.0 20.1 0.0006 2026-01-01 00:00:00 0\n2 2.5 9 0.0006 0001-01-01 00:00:00 0\n"
    assert [(line.number, line.loss) for line in read_log(text)] == [(0, 3.0), (2, 2.5)]
    assert read_log(text)[1].ended is None


def test_settings_that_are_none_are_left_out_of_the_curves(out):
    record = json.loads((out / "run.json").read_text())
    record["settings"] |= {"n_layer": "many", "lr_init": math.inf}
    (out / "run.json").write_text(json.dumps(record))
    curves = read_curves(out)
    assert "n_layer" not in curves.settings
    assert curves.warnings == ["the settings lr_init, n_layer can't be read"]
    write_report(out)


def test_logs_of_a_new_run_begin_with_their_headers(tmp_path, synced):
    validation = ValidationFile(tmp_path / "val.csv", -1)
    assert not (tmp_path / "val.csv").exists()
    validation.validation(ValidationReport(10, 640, 3.0, 100, 0.1, is_best=True))
    assert (tmp_path / "val.csv").read_text() == "steps,tokens,loss,counted\n10,640,3,100\n"
    TrainLog(tmp_path / "train_log.txt", 0, -1, {"a": 1})
    names = ("val.csv", "train_log.txt")
    assert synced.events == [event for name in names for event in (("file", tmp_path / name), ("folder", tmp_path))]
    assert (tmp_path / "train_log.txt").read_text().splitlines()[1] == '{"a": 1}'

"""What a power cut leaves: everything that a saved state relies on was flushed to the disk before the state has its
name."""

import os
import shutil

import pytest
import torch
from training_runs import CTX, log_lines, losses, newest_state, train, train_until

from src.run_folder import archive_run, replace_drawn_init
from src.run_log import read_columns
from src.training.checkpoint.parts import whole_part
from src.training.checkpoint.storage import StateWriter, state_folders

RUN = {"my_exit_tokens": CTX * 4 * 30, "epoch_steps": 10, "epoch_save": 1, "val_every": "5steps", "val_windows": 8}
LOGS = ("train_log.txt", "metrics.csv", "val.csv")


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    """They take most of the time of a tiny run."""
    for name in ("write_loss_figure", "write_report"):
        monkeypatch.setattr(f"src.training.training_run.{name}", lambda *arguments: "")


def test_logs_are_on_the_disk_before_the_state_that_is_past_them(tmp_path, data, monkeypatch):
    """The disk as the worst cut leaves it: of each log what it held at its last fsync, at the moment when a state or
    the best weights got their name."""
    out = tmp_path / "run"
    durable, cuts = {}, []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def recording_fsync(descriptor):
        fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.basename(path) in LOGS:
            with open(path) as file:
                durable[os.path.basename(path)] = file.read()

    def recording_rename(source, target, **kwargs):
        rename(source, target, **kwargs)
        if os.path.basename(target).startswith("step-"):
            cuts.append((int(os.path.basename(target)[5:]), dict(durable)))

    def recording_replace(source, target, **kwargs):
        if os.path.basename(target) == "rwkv-best.pth":
            best.append(dict(durable))
        replace(source, target, **kwargs)

    best = []
    with monkeypatch.context() as patch:
        for name, function in (
            ("fsync", recording_fsync),
            ("rename", recording_rename),
            ("replace", recording_replace),
        ):
            patch.setattr(os, name, function)
        assert train(out, data, val_data_file=data, save_minutes=1e-6, **RUN) == 0
    assert {10, 20, 30} <= {step for step, _ in cuts}
    for step, files in cuts:
        assert files["metrics.csv"].count("\n") - 1 >= step
        mini_epochs = [line for line in files.get("train_log.txt", "").splitlines() if line[:1].isdigit()]
        assert len(mini_epochs) >= step // 10
        assert files.get("val.csv", "\n").count("\n") - 1 >= step // 5
    assert best
    measured = read_columns(out / "val.csv")["loss"]
    for number, files in enumerate(best):  # its own loss is known before it takes the place of another
        rows = files["val.csv"].splitlines()[1:]
        assert len(rows) > number
        assert min(float(row.split(",")[2]) for row in rows) == pytest.approx(min(measured[: len(rows)]))
        assert float(rows[-1].split(",")[2]) == min(float(row.split(",")[2]) for row in rows)


def test_files_and_names_of_a_state_are_flushed_before_and_after_its_rename(tmp_path, synced):
    writer = StateWriter(tmp_path / "run", keep=1)
    for step in (1, 2):
        writer.write(step, {}, [whole_part("weight/master", torch.zeros(4))])
        writer.wait()
        final = tmp_path / "run" / "resume" / f"step-{step:08d}"
        begin = synced.index("rename", tmp_path / "run" / "resume" / "step-00000001") if step == 2 else -1
        moved = synced.index("rename", final)
        written = [path.name for path in synced.files(before=moved, after=begin)]
        assert written == ["rank0-0000.safetensors", "state.json", "manifest.json"]
        (temporary,) = {path.parent for path in synced.files(before=moved, after=begin)}
        assert synced.events[moved - 1] == ("folder", temporary)  # the names of the files
        assert synced.events[moved + 1] == ("folder", final.parent)
    assert {tmp_path, tmp_path / "run"} <= set(synced.folders())  # those of new folders
    assert [folder.name for folder in state_folders(tmp_path / "run")] == ["step-00000002"]


def test_every_file_under_its_final_name_was_flushed_and_its_name_after_it(tmp_path, data, synced):
    out = tmp_path / "run"
    assert train(out, data, val_data_file=data, **RUN) == 0
    names = {path.name: i for i, (kind, path) in enumerate(synced.events) if kind == "rename" and path.parent == out}
    assert {"rwkv-init.pth", "rwkv-0.pth", "rwkv-best.pth", "rwkv-final.pth", "run.json"} <= names.keys()
    for name, moved in names.items():
        flushed = [path.name for path in synced.files(before=moved)]
        assert any(f".{name}." in file for file in flushed), name
        in_folder = [event for event in synced.events[moved + 1 :] if event[1] == out or event[1].parent == out]
        assert next(event for event in in_folder if event[0] != "file") == ("folder", out), name  # before the next name


def test_what_is_archived_or_replaced_has_its_name_on_the_disk(tmp_path, synced):
    for name in ("rwkv-0.pth", "train_log.txt", "run.json"):
        (tmp_path / name).write_text("{}")
    archive = archive_run(tmp_path)
    moved = synced.index("rename", archive / "run.json")
    assert synced.events[moved + 1 :] == [("folder", archive), ("folder", tmp_path)]
    replace_drawn_init(tmp_path, lambda path: path.write_bytes(b"weights"))
    assert synced.events[-2:] == [("rename", tmp_path / "rwkv-init.pth"), ("folder", tmp_path)]


@pytest.mark.parametrize("lost", ["train_log.txt", "val.csv"])
def test_what_a_small_log_lacks_is_restored_from_the_state(tmp_path, data, monkeypatch, capfd, lost):
    out = tmp_path / "run"
    settings = {"val_data_file": data, **RUN}
    train_until(25, out, data, monkeypatch, **settings)
    before = (out / lost).read_text().splitlines()
    (out / lost).write_text("\n".join(before[: 3 if lost == "train_log.txt" else 2]) + "\n")
    capfd.readouterr()
    assert train(out, data, **settings) == 0
    assert f"note: {lost} lacked" in capfd.readouterr().out
    assert [line[0] for line in log_lines(out)] == ["0", "1", "2"]
    assert read_columns(out / "val.csv")["steps"] == [5, 10, 15, 20, 25, 30]
    assert (out / "train_log.txt").read_text().count("validation after step 10: ") == 1


def test_what_metrics_lack_is_said(tmp_path, data, monkeypatch, capfd):
    out = tmp_path / "run"
    train_until(25, out, data, monkeypatch, **RUN)
    lines = (out / "metrics.csv").read_text().splitlines(keepends=True)
    (out / "metrics.csv").write_text("".join(lines[:8] + lines[12:]))
    assert train(out, data, **RUN) == 0
    assert "metrics.csv has no rows of 4 of the 20 steps before this start" in capfd.readouterr().out


def test_weights_alone_measure_their_held_out_loss_again(tmp_path, data, monkeypatch):
    """A cut between val.csv and rwkv-best.pth, with no state: the row is there, the weights that it is about are not
    the best ones yet."""
    out = tmp_path / "run"
    settings = {"val_data_file": data, **RUN}
    train_until(25, out, data, monkeypatch, **settings)
    rows = read_columns(out / "val.csv")
    shutil.rmtree(out / "resume")
    (out / "rwkv-best.pth").unlink()
    train_until(21, out, data, monkeypatch, **settings)
    assert read_columns(out / "val.csv")["loss"][3] == pytest.approx(rows["loss"][3], abs=1e-6)
    best, at_20 = torch.load(out / "rwkv-best.pth"), torch.load(out / "rwkv-1.pth")
    assert all(torch.equal(best[name], at_20[name]) for name in at_20)


def test_a_state_keeps_the_newest_lines_only(tmp_path, data, monkeypatch):
    monkeypatch.setattr("src.training.reporting.log_files.LINES_IN_STATE", 3)
    out = tmp_path / "run"
    train_until(25, out, data, monkeypatch, val_data_file=data, **RUN)
    logs = newest_state(out).logs
    assert [line.split(",")[0] for line in logs["val.csv"]] == ["10", "15", "20"]
    assert len(logs["train_log.txt"]) == 3
    assert len(losses(out)) >= 20

"""--wandb and --logger: what was logged is read back from the files, after a run that was stopped once."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from training_runs import CTX, losses, metrics, train, train_until

from src.dataset.binidx import BinIdxWriter
from src.training import dashboard
from src.training.reporting import generations, loggers
from src.training.reporting.sink import GeneratedSample, StepReport

STEPS = 60
RUN = {"my_exit_tokens": CTX * 4 * STEPS, "epoch_steps": 20, "epoch_save": 1, "val_windows": 8, "val_every": "1"}


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("held") / "held"
    with BinIdxWriter(prefix, np.uint16) as writer:
        for first in range(1, 28):
            writer.add_document([first + i for i in range(29)] + [0])
    return prefix


@pytest.fixture(autouse=True)
def every_step(monkeypatch):
    """Steps here are shorter than logging one."""
    monkeypatch.setattr(loggers, "TIME_SHARE", float("inf"))


class Letters:
    """A tokenizer whose every token is a letter."""

    eos_ids = (0,)

    def decode(self, ids):
        return "".join(chr(96 + i % 26) for i in ids)


@pytest.fixture
def with_samples(monkeypatch):
    monkeypatch.setattr(generations, "load_tokenizer", lambda name: Letters())
    return {"tokenizer": "world"}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))  # no login of whoever runs this
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home" / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "home" / "cache"))


def records(path):
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB, each piece with checksum, length and kind) after 7 bytes."""
    raw, at, whole = path.read_bytes(), 7, b""
    assert raw[:4] == b":W&B"
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:  # no room for a piece: the block is filled up
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        whole += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield whole
            whole = b""


def read_back(folder):
    """(rows by step, config, ids) of all offline runs in a folder."""
    from wandb.proto import wandb_internal_pb2

    rows, config, ids = {}, {}, set()
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for raw in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(raw)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.WhichOneof("record_type") == "history":
                items = {
                    (item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item
                }
                rows.setdefault(items.pop("_step", record.history.step.num), {}).update(items)
    return rows, config, ids


def test_wandb_offline_keeps_one_run_over_two_starts(tmp_path, data, held, monkeypatch, offline, with_samples, capfd):
    pytest.importorskip("wandb")
    out = tmp_path / "run"
    settings = {**RUN, **with_samples, "wandb": "a-project", "val_data_file": held}
    train_until(35, out, data, monkeypatch, **settings)
    assert train(out, data, **settings) == 0
    words = capfd.readouterr().out
    assert "no login is known" in words
    assert "wandb sync" in words
    rows, config, ids = read_back(out)
    assert ids == {json.loads((out / "run.json").read_text())["wandb_id"]}
    assert len(list(out.glob("wandb/offline-run-*"))) == 2
    assert set(range(STEPS)) <= set(rows)
    expected = metrics(out)
    for step in range(STEPS):
        row = rows[step]
        assert row["loss"] == pytest.approx(float(expected[step]["loss"]), rel=1e-6)
        assert row["lr"] == pytest.approx(float(expected[step]["lr"]), rel=1e-6)
        assert row["Gtokens"] == pytest.approx(CTX * 4 * (step + 1) / 1e9)
        assert row["tokens"] == CTX * 4 * (step + 1)
        assert row["wd"] == 0
        assert row["kt/s"] > 0
        assert row["grad norm"] == pytest.approx(float(expected[step]["grad_norm"]), rel=1e-6)
        assert "memory GiB" in row
        assert "MFU" not in row  # not known on a CPU
    for step in (0, 50):
        assert rows[step]["largest logit"] > 0
        assert set(loggers.UPDATE_NAMES) <= rows[step].keys()
    assert [step for step in rows if "val loss" in rows[step]] == [19, 39, 59]
    assert [step for step in rows if "mini-epoch loss" in rows[step]] == [19, 39, 59]
    assert config["n_layer"] == 2
    assert config["my_exit_tokens"] == CTX * 4 * STEPS
    assert "git_commit" in config
    tables = list(out.glob("wandb/offline-run-*/files/media/table/samples*.table.json"))
    assert len(tables) == 1
    table = json.loads(tables[0].read_text())
    assert table["columns"] == ["prompt", "the model goes on", "the data goes on"]
    assert len(table["data"]) == generations.COUNT
    assert [row["prompt"] for row in json.loads((out / "samples.json").read_text())] == [
        row[0] for row in table["data"]
    ]


def test_wandb_as_the_environment_says(tmp_path, monkeypatch, offline, capfd):
    """WANDB_MODE is believed; a key, in the environment or where `wandb login` puts it, means online; else it is said."""
    pytest.importorskip("wandb")
    for given, mode in (("offline", "offline"), ("dryrun", "offline"), ("online", "online"), ("disabled", "disabled")):
        monkeypatch.setenv("WANDB_MODE", given)
        assert loggers._wandb_mode("a-project", tmp_path) == mode
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert loggers._wandb_mode("a-project", tmp_path) == "online"
    monkeypatch.delenv("WANDB_API_KEY")
    assert capfd.readouterr().out == ""
    assert loggers._wandb_mode("a-project", tmp_path) == "offline"
    assert "wandb login" in capfd.readouterr().out
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "netrc").write_text("machine api.wandb.ai login user password " + "x" * 40 + "\n")
    assert loggers._wandb_mode("a-project", tmp_path) == "online"


def test_a_missing_package_is_named(tmp_path, data, monkeypatch, capfd):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    assert train(tmp_path / "run", data, wandb="a-project", **RUN) == 2
    assert "pip install wandb" in capfd.readouterr().err
    assert train(tmp_path / "other", data, logger="tensorboard", **RUN) == 2
    assert "pip install tensorboard" in capfd.readouterr().err


def test_tensorboard_over_two_starts(tmp_path, data, held, monkeypatch, with_samples):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    settings = {**RUN, **with_samples, "logger": "tensorboard", "val_data_file": held}
    train_until(35, out, data, monkeypatch, **settings)
    assert train(out, data, **settings) == 0
    events = EventAccumulator(str(out / "tensorboard"), {"scalars": 0, "tensors": 0})
    events.Reload()
    last = {event.step: event.value for event in events.Scalars("loss")}
    assert [last[step] for step in range(STEPS)] == pytest.approx(losses(out), rel=1e-6)
    assert [
        event.step for event in events.Scalars("val_loss" if "val_loss" in events.Tags()["scalars"] else "val loss")
    ][-1] == 59
    assert any("samples" in tag for tag in events.Tags()["tensors"])


def test_csv_logger(tmp_path, data):
    assert train(tmp_path / "run", data, logger="csv", **{**RUN, "my_exit_tokens": CTX * 4 * 20}) == 0
    (file,) = (tmp_path / "run" / "csv").rglob("metrics.csv")
    with open(file, newline="") as rows:
        values = [float(row["loss"]) for row in csv.DictReader(rows) if row["loss"]]
    assert values == pytest.approx(losses(tmp_path / "run"), rel=1e-6)


def test_where_steps_are_short_some_are_left_out(tmp_path, data, monkeypatch):
    monkeypatch.setattr(loggers, "TIME_SHARE", 0.0)
    assert train(tmp_path / "run", data, logger="csv", **RUN) == 0
    (file,) = (tmp_path / "run" / "csv").rglob("metrics.csv")
    with open(file, newline="") as rows:
        assert [row["step"] for row in csv.DictReader(rows) if row["loss"]] == [
            "0",
            "1",
            "50",
        ]  # the first is free, 50 is measured
    assert len(losses(tmp_path / "run")) == STEPS


def test_a_slow_first_call_costs_no_later_ones(monkeypatch):
    """wandb takes a tenth of a second for the first; in a short run nothing else would be logged."""
    now, shown = 0.0, []
    monkeypatch.setattr(loggers, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(loggers, "TIME_SHARE", 0.003)
    sink = loggers.LoggerSink(SimpleNamespace(), 0.0)

    def log(values):
        nonlocal now
        now += 0.1 if not shown else 0.001
        shown.append(values["loss"])

    monkeypatch.setattr(sink, "_log", log)
    for step in range(200):
        now += 0.2
        sink.step(StepReport(step, 64 * step, float(step), 1e-3, 0.5, 6400.0))
    assert 100 < len(shown) <= 200 * 0.2 * 0.003 / 0.001 + 2


def test_samples_begin_like_the_data(tmp_path, data, held, with_samples):
    assert train(tmp_path / "run", data, val_data_file=held, **with_samples, **RUN) == 0
    found = [GeneratedSample(**row) for row in json.loads((tmp_path / "run" / "samples.json").read_text())]
    assert len(found) == generations.COUNT
    for sample in found:
        assert 1 <= len(sample.prompt) <= generations.PROMPT_TOKENS
        assert len(sample.answer) <= generations.NEW_TOKENS


def test_the_dashboard_shows_what_is_logged():
    shown = [name for plots in dashboard.LAYOUT.values() for _, _, names, _ in plots for name in names]
    logged = {*loggers.STEP_NAMES, *loggers.UPDATE_NAMES, *loggers.OTHER_NAMES}
    assert set(shown) <= logged
    assert logged - set(shown) == {"Gtokens"}  # the axis
    assert {axis for plots in dashboard.LAYOUT.values() for _, axis, _, _ in plots} == {"Gtokens", "_runtime"}


def test_the_dashboard_without_what_it_needs(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces", None)
    with pytest.raises(SystemExit) as exit_:
        dashboard.main(["a-project", "--entity", "us"])
    assert exit_.value.code == 2
    assert "pip install wandb wandb-workspaces" in capsys.readouterr().err


@pytest.mark.parametrize("entity", [[], ["--entity", "us"]], ids=["own", "named"])
def test_the_dashboard_without_login_or_network(capsys, monkeypatch, entity):
    wandb = pytest.importorskip("wandb")

    def refuse(*args, **kwargs):
        raise wandb.Error("No API key configured")

    monkeypatch.setattr(wandb, "Api", refuse)
    monkeypatch.setattr(dashboard, "workspace", lambda project, entity: SimpleNamespace(save=refuse))
    with pytest.raises(SystemExit) as exit_:
        dashboard.main(["a-project", *entity])
    assert exit_.value.code == 2
    words = capsys.readouterr().err
    assert "No API key configured" in words
    assert "wandb login" in words
    assert "the network" in words


def test_the_dashboard_is_one_that_wandb_understands():
    pytest.importorskip("wandb_workspaces")
    view = dashboard.workspace("a-project", "us")
    assert [section.name for section in view.sections] == list(dashboard.LAYOUT)


def test_the_commit_of_this_program(monkeypatch):
    from src.training.reporting import environment

    assert len(environment.git_commit().rstrip("+")) in (0, 40)
    monkeypatch.setattr(environment, "__file__", str(Path("/") / "environment.py"))
    assert environment.git_commit() == ""

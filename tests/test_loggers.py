"""--wandb and --logger: what was logged is read back from the files of a run that was stopped and resumed."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from chat_models import tokenizer_with_entries
from training_runs import CTX, VOCAB, losses, metrics, train, train_until

from src.dataset.binidx import BinIdxWriter
from src.training import dashboard
from src.training.reporting import generations, loggers
from src.training.reporting.sink import GeneratedSample, StepReport

STEPS = 60
RUN = {"my_exit_tokens": CTX * 4 * STEPS, "epoch_steps": 20, "epoch_save": 1, "val_windows": 8, "val_every": "1"}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("held-out") / "data"
    with BinIdxWriter(prefix, np.uint16) as writer:
        for first in range(1, 28):
            writer.add_document([first + i for i in range(29)] + [0])
    return prefix


@pytest.fixture(autouse=True)
def log_every_step(monkeypatch):
    """Steps of these runs take less time than logging one."""
    monkeypatch.setattr(loggers, "TIME_SHARE", float("inf"))


@pytest.fixture
def with_samples(tmp_path_factory):
    """A tokenizer of the model's vocabulary: a visible character for each token, and token 0, which ends documents."""
    folder = tmp_path_factory.mktemp("characters")
    characters = [chr(33 + i) for i in range(VOCAB - 1)]
    return {"tokenizer": tokenizer_with_entries(folder, ["<|end|>", *characters], end="<|end|>")}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))  # not the login of the user who runs the tests
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home" / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "home" / "cache"))


def records(path):
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes.

    Blocks of 32 KiB hold fragments of records, each with checksum (4 bytes), length (2) and kind (1).
    """
    raw, position, record = path.read_bytes(), 7, b""
    assert raw[:4] == b":W&B"
    while position + 7 <= len(raw):
        if 32768 - position % 32768 < 7:  # no room for another header: the rest of the block is padding
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(raw[position + 4 : position + 6], "little"), raw[position + 6]
        record += raw[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last fragment
            yield record
            record = b""


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


def test_offline_wandb_logs_one_run_over_two_starts(
    tmp_path, data, held_out, monkeypatch, offline, with_samples, capfd
):
    pytest.importorskip("wandb")
    out = tmp_path / "run"
    settings = {**RUN, **with_samples, "wandb": "a-project", "val_data_file": held_out}
    train_until(35, out, data, monkeypatch, **settings)
    assert train(out, data, **settings) == 0
    output = capfd.readouterr().out
    assert "--wandb a-project: not logged in" in output
    assert "wandb sync" in output
    rows, config, ids = read_back(out)
    assert ids == {json.loads((out / "run.json").read_text())["wandb_id"]}
    assert len(list(out.glob("wandb/offline-run-*"))) == 2
    assert set(rows) == set(range(1, STEPS + 1))  # as in the official trainer
    expected = metrics(out)
    for step in range(STEPS):
        row = rows[step + 1]
        assert row["loss"] == pytest.approx(float(expected[step]["loss"]), rel=1e-6)
        assert row["lr"] == pytest.approx(float(expected[step]["lr"]), rel=1e-6)
        assert row["Gtokens"] == pytest.approx(CTX * 4 * (step + 1) / 1e9)
        assert row["tokens"] == CTX * 4 * (step + 1)
        assert row["wd"] == 0
        assert row["kt/s"] > 0
        assert row["grad norm"] == pytest.approx(float(expected[step]["grad_norm"]), rel=1e-6)
        assert "memory GiB" in row
        assert "MFU" not in row  # not known on a CPU
    for step in (1, 51):
        assert rows[step]["largest logit"] > 0
        assert set(loggers.UPDATE_NAMES) <= rows[step].keys()
    assert [step for step in rows if "val loss" in rows[step]] == [20, 40, 60]
    assert [step for step in rows if "mini-epoch loss" in rows[step]] == [20, 40, 60]
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


def test_the_mode_of_wandb_follows_the_environment(tmp_path, monkeypatch, offline, capfd):
    """WANDB_MODE has priority, then an API key in the environment or the netrc file; else offline, with a note."""
    pytest.importorskip("wandb")
    for value, mode in (("offline", "offline"), ("dryrun", "offline"), ("online", "online"), ("disabled", "disabled")):
        monkeypatch.setenv("WANDB_MODE", value)
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


def test_a_missing_package_is_reported(tmp_path, data, monkeypatch, capfd):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    assert train(tmp_path / "run", data, wandb="a-project", **RUN) == 2
    assert "pip install wandb" in capfd.readouterr().err
    assert train(tmp_path / "other", data, logger="tensorboard", **RUN) == 2
    assert "pip install tensorboard" in capfd.readouterr().err


def test_tensorboard_logs_one_run_over_two_starts(tmp_path, data, held_out, monkeypatch, with_samples):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    settings = {**RUN, **with_samples, "logger": "tensorboard", "val_data_file": held_out}
    train_until(35, out, data, monkeypatch, **settings)
    assert train(out, data, **settings) == 0
    events = EventAccumulator(str(out / "tensorboard"), {"scalars": 0, "tensors": 0})
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert [logged[step] for step in range(STEPS)] == pytest.approx(losses(out), rel=1e-6)
    assert events.Scalars("val loss")[-1].step == 59
    assert any("samples" in tag for tag in events.Tags()["tensors"])


def test_the_csv_logger_logs_every_loss(tmp_path, data):
    assert train(tmp_path / "run", data, logger="csv", **{**RUN, "my_exit_tokens": CTX * 4 * 20}) == 0
    (file,) = (tmp_path / "run" / "csv").rglob("metrics.csv")
    with open(file, newline="") as rows:
        values = [float(row["loss"]) for row in csv.DictReader(rows) if row["loss"]]
    assert values == pytest.approx(losses(tmp_path / "run"), rel=1e-6)


def test_some_short_steps_are_not_logged_and_are_counted_at_the_end(tmp_path, data, monkeypatch, capfd):
    monkeypatch.setattr(loggers, "TIME_SHARE", 0.0)
    assert train(tmp_path / "run", data, logger="csv", **RUN) == 0
    (file,) = (tmp_path / "run" / "csv").rglob("metrics.csv")
    with open(file, newline="") as rows:
        logged = {row["step"]: row for row in csv.DictReader(rows) if row["loss"]}
    # The first call is not counted, step 50 has update ratios, and step 59 is the last one.
    assert list(logged) == ["0", "1", "50", "59"]
    assert logged["59"].keys() == logged["1"].keys()
    assert float(logged["59"]["loss"]) == pytest.approx(losses(tmp_path / "run")[-1], rel=1e-6)
    assert logged["59"]["kt/s"]
    assert len(losses(tmp_path / "run")) == STEPS
    assert "csv  56 of 60 steps were left out, because logging is limited to 0 % of the time" in capfd.readouterr().out


def test_every_start_ends_with_a_whole_row_in_wandb(tmp_path, data, held_out, monkeypatch, offline, capfd):
    """The last step of a start was left out before its held-out loss was logged: wandb's summary shows both."""
    pytest.importorskip("wandb")
    monkeypatch.setattr(loggers, "TIME_SHARE", 0.0)
    out = tmp_path / "run"
    settings = {**RUN, "wandb": "a-project", "val_data_file": held_out}
    train_until(35, out, data, monkeypatch, **settings)
    stopped_at = len(losses(out)) - 1
    assert re.search(r"wandb  \d+ of \d+ steps were left out", capfd.readouterr().out)
    assert train(out, data, **settings) == 0
    rows, _, _ = read_back(out)
    expected = losses(out)
    for step in (stopped_at, STEPS - 1):
        row = rows[step + 1]
        assert row["loss"] == pytest.approx(expected[step], rel=1e-6)
        assert {"lr", "wd", "Gtokens", "tokens", "kt/s", "grad norm", "memory GiB"} <= row.keys()
    assert "val loss" in rows[STEPS]
    assert sum("loss" in row for row in rows.values()) < 10


def test_nothing_is_said_where_every_step_is_logged(tmp_path, data, capfd):
    assert train(tmp_path / "run", data, logger="csv", **{**RUN, "my_exit_tokens": CTX * 4 * 20}) == 0
    assert "left out" not in capfd.readouterr().out


def test_a_slow_first_call_does_not_suppress_later_ones(monkeypatch):
    """wandb takes a tenth of a second for the first; counted, a short run would log nothing else."""
    now, logged = 0.0, []
    monkeypatch.setattr(loggers, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(loggers, "TIME_SHARE", 0.003)
    sink = loggers.LoggerSink(SimpleNamespace(), 0.0, "csv")

    def log(values):
        nonlocal now
        now += 0.1 if not logged else 0.001
        logged.append(values["loss"])

    monkeypatch.setattr(sink, "_log", log)
    for step in range(200):
        now += 0.2
        sink.step(StepReport(step, 64 * step, float(step), 1e-3, 0.5, 6400.0))
    assert 100 < len(logged) <= 200 * 0.2 * 0.003 / 0.001 + 2


def test_samples_are_written_for_each_prompt(tmp_path, data, held_out, with_samples):
    assert train(tmp_path / "run", data, val_data_file=held_out, **with_samples, **RUN) == 0
    samples = [GeneratedSample(**row) for row in json.loads((tmp_path / "run" / "samples.json").read_text())]
    assert len(samples) == generations.COUNT
    for sample in samples:
        assert 1 <= len(sample.prompt) <= generations.PROMPT_TOKENS
        assert len(sample.answer) <= generations.NEW_TOKENS


def test_the_dashboard_shows_what_is_logged():
    drawn = [name for plots in dashboard.LAYOUT.values() for _, _, names, _ in plots for name in names]
    logged = {*loggers.STEP_NAMES, *loggers.UPDATE_NAMES, *loggers.OTHER_NAMES}
    assert set(drawn) <= logged
    assert logged - set(drawn) == {"Gtokens"}  # the axis
    assert {axis for plots in dashboard.LAYOUT.values() for _, axis, _, _ in plots} == {"Gtokens", "_runtime"}


def test_the_dashboard_reports_a_missing_package(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces", None)
    with pytest.raises(SystemExit) as exit_:
        dashboard.main(["a-project", "--entity", "us"])
    assert exit_.value.code == 2
    assert "pip install wandb wandb-workspaces" in capsys.readouterr().err


@pytest.mark.parametrize("entity", [[], ["--entity", "us"]], ids=["default entity", "named entity"])
def test_the_dashboard_reports_a_missing_login(capsys, monkeypatch, entity):
    wandb = pytest.importorskip("wandb")

    def refuse(*args, **kwargs):
        raise wandb.Error("No API key configured")

    monkeypatch.setattr(wandb, "Api", refuse)
    monkeypatch.setattr(dashboard, "workspace", lambda project, entity: SimpleNamespace(save=refuse))
    with pytest.raises(SystemExit) as exit_:
        dashboard.main(["a-project", *entity])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert "No API key configured" in message
    assert "wandb login" in message
    assert "the network" in message


def test_the_dashboard_is_a_valid_workspace():
    pytest.importorskip("wandb_workspaces")
    view = dashboard.workspace("a-project", "us")
    assert [section.name for section in view.sections] == list(dashboard.LAYOUT)


def test_the_git_commit_is_empty_outside_of_a_repository(monkeypatch):
    from src.training.reporting import environment

    assert len(environment.git_commit().rstrip("+")) in (0, 40)
    monkeypatch.setattr(environment, "__file__", str(Path("/") / "environment.py"))
    assert environment.git_commit() == ""

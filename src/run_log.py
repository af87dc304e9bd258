"""Reads a run's curves back from its files: metrics.csv and val.csv, or the train_log.txt of any RWKV training run."""

from __future__ import annotations

import io
import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from src.config import MINI_EPOCH_SAMPLES, RunConfig
from src.errors import UserError
from src.run_folder import LOG, METRICS, VALIDATION, read_run

Numbers = npt.NDArray[np.float64]
CHUNK_BYTES = 1 << 16  # of a csv file parsed at a time: training gets the interpreter's lock in between
SMOOTHING_SHARE = 0.02  # of the run's steps: the width of the running mean
MIN_SMOOTHING_STEPS = 10
REQUIRED_COLUMNS = ("step", "tokens", "loss", "lr")


@dataclass(frozen=True)
class MiniEpoch:
    """A line of train_log.txt. `lr` is the text that is printed there; `ended` is None where the time is unreadable."""

    number: int
    loss: float
    lr: str
    ended: datetime | None


@dataclass
class Curves:
    """Values by step, or by mini-epoch (`by_step` False) where only a log exists. NaN stands for an unknown value."""

    name: str
    by_step: bool
    tokens: Numbers  # trained on up to and including each point
    seconds: Numbers  # of training
    loss: Numbers
    lr: Numbers
    speed: Numbers  # tokens/s
    mini_epochs: list[MiniEpoch]
    mini_epoch_tokens: float
    settings: dict[str, Any]
    columns: dict[str, Numbers] = field(default_factory=dict)  # of metrics.csv
    val_tokens: Numbers = field(default_factory=lambda: np.empty(0))
    val_loss: Numbers = field(default_factory=lambda: np.empty(0))
    warnings: list[str] = field(default_factory=list)  # sentences on what is damaged and was left out

    def smoothed(self) -> tuple[Numbers, int]:
        """(running mean of the finite losses over the last `width` points, `width`)."""
        width = max(MIN_SMOOTHING_STEPS, int(len(self.loss) * SMOOTHING_SHARE)) if self.by_step else 1
        is_finite = np.isfinite(self.loss)
        # differences of cumulative sums: linear in the number of points, whatever the width
        total = np.cumsum(np.where(is_finite, self.loss, 0.0))
        count = np.cumsum(is_finite)
        start = np.maximum(np.arange(len(total)) - width, -1)
        total -= np.where(start >= 0, total[start], 0.0)
        count = count - np.where(start >= 0, count[start], 0)
        return np.divide(total, count, out=np.full(len(total), math.nan), where=count > 0), width

    def seconds_at(self, tokens: Numbers) -> Numbers:
        """The training time at which so many tokens had been trained on, interpolated between points."""
        is_finite = np.isfinite(self.seconds)
        if not is_finite.any():
            return np.full(len(tokens), math.nan)
        return np.interp(tokens, np.r_[0.0, self.tokens[is_finite]], np.r_[0.0, self.seconds[is_finite]])


def read_curves(run: str | Path) -> Curves:
    """The curves of a run's folder or of a log file, from what can be read of them; `Curves.warnings` has the rest.
    Raises UserError naming it when there is nothing to read."""
    run = Path(run)
    folder = run if run.is_dir() else run.parent
    log = run / LOG if run.is_dir() else run
    metrics = folder / METRICS
    if not log.is_file() and not metrics.is_file():
        raise UserError(given=run, expected=f"the folder of a run ({METRICS}, {LOG}), or a log file")
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    warnings: list[str] = []
    record = read_record(folder, warnings)
    mini_epochs, settings = read_log(text), _usable(record.get("settings") or _read_settings(text), warnings)
    # from run.json first: the settings are those of the last start, whose batch may differ from the one that fixed the
    # mini-epochs
    samples = record.get("mini_epoch_samples") or settings.get("epoch_steps", 0) * settings.get("global_batch", 0)
    mini_epoch_tokens = float((samples or MINI_EPOCH_SAMPLES) * settings.get("ctx_len", 1))
    name = run.resolve().name if run.is_dir() else str(run)
    # an explicit path to train_log.txt asks for the log's own curve
    columns = read_arrays(metrics, warnings) if metrics.is_file() and run.name != LOG else {}
    if missing := [column for column in REQUIRED_COLUMNS if columns and column not in columns]:
        problem = f"no column {', '.join(missing)}"
        if not mini_epochs:
            raise UserError(problem, given=metrics, expected=f"the columns {', '.join(REQUIRED_COLUMNS)}")
        warnings.append(f"{metrics}: {problem}; the curves are those of {LOG}")
        columns = {}
    if columns:
        curves = _by_step(name, columns, mini_epochs, mini_epoch_tokens, settings)
        _add_validation(curves, folder / VALIDATION, warnings)
    elif mini_epochs:
        curves = _by_mini_epoch(name, mini_epochs, mini_epoch_tokens, settings)
    else:
        raise UserError("; ".join(warnings) or "nothing has been logged yet", given=run)
    curves.warnings = warnings
    return curves


def read_log(text: str) -> list[MiniEpoch]:
    """The mini-epochs of a train_log.txt. Of one that was trained again after a stop the last line counts."""
    by_number = {}
    for line in text.splitlines():
        if is_mini_epoch_line(line):
            number, loss, _, lr, date, time, _ = line.split()
            ended: datetime | None = None
            with suppress(ValueError):
                ended = datetime.fromisoformat(f"{date} {time}")
            if ended is not None and ended.year <= 1970:  # of a clock that was not set: it has no timestamp
                ended = None
            by_number[int(number)] = MiniEpoch(int(number), float(loss), lr, ended)
    return [by_number[number] for number in sorted(by_number)]


def _by_step(
    name: str,
    columns: dict[str, Numbers],
    mini_epochs: list[MiniEpoch],
    mini_epoch_tokens: float,
    settings: dict[str, Any],
) -> Curves:
    tokens, unknown = columns["tokens"], np.full(len(columns["tokens"]), math.nan)
    speed, seconds = columns.get("tokens_per_second", unknown), columns.get("seconds", unknown)
    if not np.isfinite(seconds).any() and np.isfinite(speed).any():  # written before this column existed
        seconds = np.cumsum(np.diff(tokens, prepend=0.0) / np.maximum(speed, 1e-9))
    return Curves(
        name=name,
        by_step=True,
        tokens=tokens,
        seconds=seconds,
        loss=columns["loss"],
        lr=columns["lr"],
        speed=speed,
        mini_epochs=mini_epochs,
        mini_epoch_tokens=mini_epoch_tokens,
        settings=settings,
        columns=columns,
    )


def _by_mini_epoch(
    name: str, mini_epochs: list[MiniEpoch], mini_epoch_tokens: float, settings: dict[str, Any]
) -> Curves:
    exit_tokens = settings.get("my_exit_tokens") or math.inf  # the last mini-epoch may be partial
    tokens = np.array([min(exit_tokens, (line.number + 1) * mini_epoch_tokens) for line in mini_epochs])
    end_times = np.array([line.ended.timestamp() if line.ended else math.nan for line in mini_epochs])
    durations = np.diff(end_times)
    typical = float(np.nanmedian(durations)) if np.isfinite(durations).any() else math.nan
    # pauses between two starts are not training time: a mini-epoch that took far longer than the others counts as a
    # typical one
    durations = np.where(durations > 3 * typical, typical, durations)
    seconds = np.cumsum(np.r_[typical, durations])  # the log doesn't say when the first one began
    new_tokens, new_seconds = np.diff(tokens, prepend=tokens[0] - mini_epoch_tokens), np.diff(seconds, prepend=0.0)
    speed = np.divide(new_tokens, new_seconds, out=np.full(len(tokens), math.nan), where=new_seconds > 0)
    loss, lr = (np.array([float(getattr(line, key)) for line in mini_epochs]) for key in ("loss", "lr"))
    return Curves(name, False, tokens, seconds, loss, lr, speed, mini_epochs, mini_epoch_tokens, settings)


def _add_validation(curves: Curves, path: Path, warnings: list[str]) -> None:
    columns, empty = read_arrays(path, warnings), np.empty(0)
    if not {"tokens", "loss"} <= columns.keys():
        if columns:
            warnings.append(f"{path}: no columns tokens and loss")
        return
    is_finite = np.isfinite(columns.get("loss", empty))
    curves.val_tokens = columns.get("tokens", empty)[is_finite]
    curves.val_loss = columns.get("loss", empty)[is_finite]


def read_record(folder: Path, warnings: list[str]) -> dict[str, Any]:
    """The content of run.json; {} where it is missing, or unreadable with a warning: the log has the settings too."""
    try:
        return read_run(folder)
    except UserError as error:
        warnings.append(str(error))
        return {}


def _usable(settings: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
    """`settings` without numbers that are none, which figures and reports would compute with."""
    numbers = {column.name for column in fields(RunConfig) if type(column.default) in (int, float)}
    wrong = [
        name
        for name in sorted(numbers & settings.keys())
        if type(settings[name]) not in (int, float) or not math.isfinite(settings[name])
    ]
    if wrong:
        warnings.append(f"the settings {', '.join(wrong)} can't be read")
    return {name: value for name, value in settings.items() if name not in wrong}


def _read_settings(log: str) -> dict[str, Any]:
    """The settings in the log's last header: this program's JSON, or the dict that other RWKV scripts print."""
    settings: dict[str, Any] = {}
    for line in log.splitlines():
        if line.startswith("{"):
            try:
                settings = json.loads(line)
            except (ValueError, RecursionError):
                # a printed dict may hold objects that no parser reads: only its numbers are needed
                pairs = re.findall(r"'(\w+)': (-?[0-9.]{1,20}(?:e-?[0-9]{1,3})?)(?=[,}])", line)
                pairs = [(name, value) for name, value in pairs if is_number(value)]
                settings = {name: float(value) if re.search(r"[.e]", value) else int(value) for name, value in pairs}
                if "real_bsz" in settings:
                    settings["global_batch"] = settings["real_bsz"]
    return settings


def is_mini_epoch_line(line: str) -> bool:
    """Whether a line is `N loss perplexity lr date time count`, as RWKV training scripts write it."""
    words = line.split()
    return (
        len(words) == 7 and bool(re.fullmatch("[0-9]{1,12}", words[0])) and is_number(words[1]) and is_number(words[3])
    )


def is_number(text: str) -> bool:
    """Whether a word or a cell is a number as programs write it; Python's float accepts more."""
    if not re.fullmatch(r"[-+]?([0-9.]+([eE][-+]?[0-9]+)?|inf|nan)", text):
        return False
    try:
        float(text)
    except ValueError:
        return False
    return True


# ---- csv files -------------------------------------------------------------------------------------------------------


def read_columns(path: Path) -> dict[str, list[float]]:
    """As `read_arrays`, but lists."""
    return {name: values.tolist() for name, values in read_arrays(path).items()}


def read_arrays(path: Path, warnings: list[str] | None = None) -> dict[str, Numbers]:
    """The columns of a csv file with a header, float64 by name; {} where there is no file or no row.

    An empty cell is NaN, and a last line without its newline is left out: it is being written. So are lines that are
    damaged, with a sentence in `warnings` that counts them.
    """
    if not path.exists():
        return {}
    chunks: list[Numbers] = []
    damaged = 0
    with open(path, "rb") as file:
        names = file.readline().decode("utf-8", "replace").strip().split(",")
        while text := file.read(CHUNK_BYTES) + file.readline():
            text = text[: text.rfind(b"\n") + 1]
            if text.strip():
                rows, n_damaged = _parse_rows(text, len(names))
                damaged += n_damaged
                chunks += [rows] if len(rows) else []
    if damaged and warnings is not None:
        warnings.append(f"{path}: {damaged} lines are damaged and left out")
    return dict(zip(names, np.concatenate(chunks).T, strict=True)) if chunks else {}


def _parse_rows(text: bytes, width: int) -> tuple[Numbers, int]:
    """Whole lines as numbers, [rows, width], and how many of them are damaged."""
    text = text.replace(b"\r\n", b"\n")
    # numpy's parser, since files have hundreds of thousands of rows; it accepts no empty cells
    for _ in range(2):  # of several empty cells in a row, one pass sees every other
        text = text.replace(b",,", b",nan,")
    text = text.replace(b",\n", b",nan\n")
    try:
        rows = np.loadtxt(io.BytesIO(text), delimiter=",", ndmin=2, comments=None)
        if rows.shape[1] == width:
            return rows, 0
    except ValueError:  # of a line that is no row
        pass
    lines = [line.decode("utf-8", "replace").split(",") for line in text.split(b"\n") if line.strip()]
    whole = [cells for cells in lines if len(cells) == width and all(map(is_number, cells))]
    return np.array(whole, np.float64).reshape(-1, width), len(lines) - len(whole)

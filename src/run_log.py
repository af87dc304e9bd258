"""Reads a run's curves back from its files: metrics.csv and val.csv, or the train_log.txt of any RWKV training run."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from src.config import MINI_EPOCH_SAMPLES
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
    """The curves of a run's folder or of a log file. Raises UserError naming it when there is nothing to read."""
    run = Path(run)
    folder = run if run.is_dir() else run.parent
    log = run / LOG if run.is_dir() else run
    metrics = folder / METRICS
    if not log.is_file() and not metrics.is_file():
        raise UserError(given=run, expected=f"the folder of a run ({METRICS}, {LOG}), or a log file")
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    record = _read_record(folder)
    mini_epochs, settings = read_log(text), record.get("settings") or _read_settings(text)
    # from run.json first: the settings are those of the last start, whose batch may differ from the one that fixed the
    # mini-epochs
    samples = record.get("mini_epoch_samples") or settings.get("epoch_steps", 0) * settings.get("global_batch", 0)
    mini_epoch_tokens = float((samples or MINI_EPOCH_SAMPLES) * settings.get("ctx_len", 1))
    name = run.resolve().name if run.is_dir() else str(run)
    # an explicit path to train_log.txt asks for the log's own curve
    columns = read_arrays(metrics) if metrics.is_file() and run.name != LOG else {}
    if columns:
        curves = _by_step(name, metrics, columns, mini_epochs, mini_epoch_tokens, settings)
        _add_validation(curves, folder / VALIDATION)
        return curves
    if not mini_epochs:
        raise UserError("nothing has been logged yet", given=run)
    return _by_mini_epoch(name, mini_epochs, mini_epoch_tokens, settings)


def read_log(text: str) -> list[MiniEpoch]:
    """The mini-epochs of a train_log.txt. Of one that was trained again after a stop the last line counts."""
    by_number = {}
    for line in text.splitlines():
        if is_mini_epoch_line(line):
            number, loss, _, lr, date, time, _ = line.split()
            try:
                ended = datetime.fromisoformat(f"{date} {time}")
            except ValueError:
                ended = None
            by_number[int(number)] = MiniEpoch(int(number), float(loss), lr, ended)
    return [by_number[number] for number in sorted(by_number)]


def _by_step(
    name: str,
    metrics: Path,
    columns: dict[str, Numbers],
    mini_epochs: list[MiniEpoch],
    mini_epoch_tokens: float,
    settings: dict[str, Any],
) -> Curves:
    if missing := [column for column in REQUIRED_COLUMNS if column not in columns]:
        raise UserError(
            f"no column {', '.join(missing)}", given=metrics, expected=f"the columns {', '.join(REQUIRED_COLUMNS)}"
        )
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


def _add_validation(curves: Curves, path: Path) -> None:
    columns, empty = read_arrays(path), np.empty(0)
    is_finite = np.isfinite(columns.get("loss", empty))
    curves.val_tokens = columns.get("tokens", empty)[is_finite]
    curves.val_loss = columns.get("loss", empty)[is_finite]


def _read_record(folder: Path) -> dict[str, Any]:
    """The content of run.json; {} where it is missing or unreadable, since the log's header has the settings too."""
    try:
        return read_run(folder)
    except UserError:
        return {}


def _read_settings(log: str) -> dict[str, Any]:
    """The settings in the log's last header: this program's JSON, or the dict that other RWKV scripts print."""
    settings: dict[str, Any] = {}
    for line in log.splitlines():
        if line.startswith("{"):
            try:
                settings = json.loads(line)
            except ValueError:
                # a printed dict may hold objects that no parser reads: only its numbers are needed
                pairs = re.findall(r"'(\w+)': (-?[\d.]+(?:e-?\d+)?)(?=[,}])", line)
                settings = {name: float(value) if re.search(r"[.e]", value) else int(value) for name, value in pairs}
                if "real_bsz" in settings:
                    settings["global_batch"] = settings["real_bsz"]
    return settings


def is_mini_epoch_line(line: str) -> bool:
    """Whether a line is `N loss perplexity lr date time count`, as RWKV training scripts write it."""
    return len(line.split()) == 7 and line.split()[0].isdigit()


# ---- csv files -------------------------------------------------------------------------------------------------------


def read_columns(path: Path) -> dict[str, list[float]]:
    """As `read_arrays`, but lists."""
    return {name: values.tolist() for name, values in read_arrays(path).items()}


def read_arrays(path: Path) -> dict[str, Numbers]:
    """The columns of a csv file with a header, float64 by name; {} where there is no file or no row.

    An empty cell is NaN, and a last line without its newline is left out: it is being written. Raises UserError naming
    the file when a line has another number of cells.
    """
    if not path.exists():
        return {}
    chunks: list[Numbers] = []
    with open(path, "rb") as file:
        names = file.readline().decode().strip().split(",")
        while text := file.read(CHUNK_BYTES) + file.readline():
            text = text[: text.rfind(b"\n") + 1]
            if text.strip():
                chunks.append(_parse_rows(path, text, len(names)))
    return dict(zip(names, np.concatenate(chunks).T, strict=True)) if chunks else {}


def _parse_rows(path: Path, text: bytes, width: int) -> Numbers:
    """Whole lines as numbers, [rows, width]."""
    text = text.replace(b"\r\n", b"\n")
    # numpy's parser, since files have hundreds of thousands of rows; it accepts no empty cells
    for _ in range(2):  # of several empty cells in a row, one pass sees every other
        text = text.replace(b",,", b",nan,")
    text = text.replace(b",\n", b",nan\n")
    try:
        rows = np.loadtxt(io.BytesIO(text), delimiter=",", ndmin=2)
    except ValueError as error:
        raise _malformed(path, str(error)) from error
    if rows.shape[1] != width:
        raise _malformed(path, f"{rows.shape[1]} cells under {width} names")
    return rows


def _malformed(path: Path, detail: str) -> UserError:
    return UserError(f"a line is malformed ({detail})", given=path, advice="repair the line or remove it")

"""A run's course, read back from its files: metrics.csv and val.csv, or the train_log.txt alone of any RWKV training run."""

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
from src.run_folder import LOG, METRICS, RUN, VALIDATION

Numbers = npt.NDArray[np.float64]
PIECE_BYTES = 1 << 16  # of a csv that are read at a time
SMOOTHED_SHARE = 0.02  # of the run's steps: the width of the running mean
SMOOTHED_STEPS = 10  # at least


@dataclass(frozen=True)
class MiniEpoch:
    """A line of train_log.txt; `lr` as it is printed there."""

    number: int
    loss: float
    lr: str
    ended: datetime | None


@dataclass
class Curves:
    """Values by step, or by mini-epoch (`by_step` False) where only a log is there. NaN: not known."""

    name: str
    by_step: bool
    tokens: Numbers  # trained on up to and with each point
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
        """Running mean of the loss over the last steps (those that are finite), and how many steps it is over."""
        width = max(SMOOTHED_STEPS, int(len(self.loss) * SMOOTHED_SHARE)) if self.by_step else 1
        known = np.isfinite(self.loss)
        total = np.cumsum(np.where(known, self.loss, 0.0))
        count = np.cumsum(known)
        before = np.maximum(np.arange(len(total)) - width, -1)
        total -= np.where(before >= 0, total[before], 0.0)
        count = count - np.where(before >= 0, count[before], 0)
        return np.divide(total, count, out=np.full(len(total), math.nan), where=count > 0), width

    def seconds_at(self, tokens: Numbers) -> Numbers:
        """The training time at which so many tokens had been trained on."""
        known = np.isfinite(self.seconds)
        if not known.any():
            return np.full(len(tokens), math.nan)
        return np.interp(tokens, np.r_[0.0, self.tokens[known]], np.r_[0.0, self.seconds[known]])


def read_curves(run: str | Path) -> Curves:
    """Of a run's folder or a log file. Raises ValueError naming it when there is nothing to read."""
    run = Path(run)
    folder = run if run.is_dir() else run.parent
    log = run / LOG if run.is_dir() else run
    metrics = folder / METRICS
    if not log.is_file() and not metrics.is_file():
        raise UserError(f"{run}: expected the folder of a run ({METRICS}, {LOG}), or a log file")
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    remembered = _remembered(folder)
    mini_epochs, settings = read_log(text), remembered.get("settings") or _settings(text)
    # as the run remembers its mini-epochs: its batch may have changed since it began
    samples = remembered.get("mini_epoch_samples") or settings.get("epoch_steps", 0) * settings.get("global_batch", 0)
    mini_epoch_tokens = float((samples or MINI_EPOCH_SAMPLES) * settings.get("ctx_len", 1))
    name = run.resolve().name if run.is_dir() else str(run)
    if metrics.is_file() and run.name != LOG:
        columns = read_arrays(metrics)
        if columns and not {"step", "tokens", "loss", "lr"} <= columns.keys():
            raise UserError(f"{metrics}: expected the columns step, tokens, loss and lr")
        if columns:
            curves = _by_step(name, columns, mini_epochs, mini_epoch_tokens, settings)
            if (folder / VALIDATION).is_file():
                val, none = read_arrays(folder / VALIDATION), np.empty(0)
                known = np.isfinite(val.get("loss", none))
                curves.val_tokens, curves.val_loss = val.get("tokens", none)[known], val.get("loss", none)[known]
            return curves
    if not mini_epochs:
        raise UserError(f"{run}: nothing has been logged in it yet")
    return _by_mini_epoch(name, mini_epochs, mini_epoch_tokens, settings)


def read_log(text: str) -> list[MiniEpoch]:
    """The mini-epochs of a train_log.txt; of one that stands there twice (trained again after a stop), the later line."""
    found = {}
    for line in text.splitlines():
        if is_mini_epoch_line(line):
            number, loss, _, lr, date, time, _ = line.split()
            try:
                ended = datetime.fromisoformat(f"{date} {time}")
            except ValueError:
                ended = None
            found[int(number)] = MiniEpoch(int(number), float(loss), lr, ended)
    return [found[number] for number in sorted(found)]


def _by_step(
    name: str,
    columns: dict[str, Numbers],
    mini_epochs: list[MiniEpoch],
    mini_epoch_tokens: float,
    settings: dict[str, Any],
) -> Curves:
    tokens, unknown = columns["tokens"], np.full(len(columns["tokens"]), math.nan)
    speed, seconds = columns.get("tokens_per_second", unknown), columns.get("seconds", unknown)
    if not np.isfinite(seconds).any() and np.isfinite(speed).any():  # written before this column was
        seconds = np.cumsum(np.diff(tokens, prepend=0.0) / np.maximum(speed, 1e-9))
    return Curves(
        name,
        True,
        tokens,
        seconds,
        columns["loss"],
        columns["lr"],
        speed,
        mini_epochs,
        mini_epoch_tokens,
        settings,
        columns,
    )


def _by_mini_epoch(
    name: str, mini_epochs: list[MiniEpoch], mini_epoch_tokens: float, settings: dict[str, Any]
) -> Curves:
    most = settings.get("my_exit_tokens") or math.inf  # the last one may be partial
    tokens = np.array([min(most, (line.number + 1) * mini_epoch_tokens) for line in mini_epochs])
    ends = np.array([line.ended.timestamp() if line.ended else math.nan for line in mini_epochs])
    took = np.diff(ends)
    usual = float(np.nanmedian(took)) if np.isfinite(took).any() else math.nan
    # breaks between two starts are not training: a mini-epoch that took far longer than usual counts as usual
    took = np.where(took > 3 * usual, usual, took)
    seconds = np.cumsum(np.r_[usual, took])
    gained, took = np.diff(tokens, prepend=tokens[0] - mini_epoch_tokens), np.diff(seconds, prepend=0.0)
    speed = np.divide(gained, took, out=np.full(len(gained), math.nan), where=took > 0)
    loss, lr = (np.array([float(getattr(line, key)) for line in mini_epochs]) for key in ("loss", "lr"))
    return Curves(name, False, tokens, seconds, loss, lr, speed, mini_epochs, mini_epoch_tokens, settings)


def _remembered(folder: Path) -> dict[str, Any]:
    """What run.json says; nothing where it can't be read: the log may know."""
    try:
        return json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def _settings(log: str) -> dict[str, Any]:
    """From the log's last header: JSON as written here, or the printed dict of other RWKV training scripts."""
    found: dict[str, Any] = {}
    for line in log.splitlines():
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                pairs = re.findall(r"'(\w+)': (-?[\d.]+(?:e-?\d+)?)(?=[,}])", line)
                found = {name: float(value) if re.search(r"[.e]", value) else int(value) for name, value in pairs}
                if "real_bsz" in found:
                    found["global_batch"] = found["real_bsz"]
    return found


def is_mini_epoch_line(line: str) -> bool:
    """`N loss perplexity lr date time count`, as RWKV training scripts write it."""
    return len(line.split()) == 7 and line.split()[0].isdigit()


def read_columns(path: Path) -> dict[str, list[float]]:
    """As `read_arrays`, in lists."""
    return {name: values.tolist() for name, values in read_arrays(path).items()}


def read_arrays(path: Path) -> dict[str, Numbers]:
    """The columns of a csv with a header, as numbers; an empty cell is NaN, a last line that was cut is left out. {} where there are none.

    Raises ValueError naming the file when a line has other columns. Made for hundreds of thousands of rows, read by a thread beside training: numpy takes them a piece at a time, and the lock of the
    interpreter is free for training in between.
    """
    if not path.exists():
        return {}
    pieces: list[Numbers] = []
    with open(path, "rb") as file:
        names = file.readline().decode().strip().split(",")
        while text := file.read(PIECE_BYTES) + file.readline():
            text = text[: text.rfind(b"\n") + 1].replace(b"\r\n", b"\n")
            for _ in range(2):  # of several empty cells in a row, one pass sees every other
                text = text.replace(b",,", b",nan,")
            text = text.replace(b",\n", b",nan\n")
            if text.strip():
                try:
                    pieces.append(np.loadtxt(io.BytesIO(text), delimiter=",", ndmin=2))
                    if pieces[-1].shape[1] != len(names):
                        raise UserError(f"{pieces[-1].shape[1]} cells under {len(names)} names")
                except ValueError as error:
                    raise UserError(f"{path}: a line is not like the others; mend or remove it ({error})") from error
    return dict(zip(names, np.concatenate(pieces).T, strict=True)) if pieces else {}

"""Writes a run's log files (train_log.txt, metrics.csv, val.csv); a resumed run first drops what it trains again.

The two small ones are flushed to the disk with each line, metrics.csv at mini-epochs and before a state that is past
its rows: after a power cut a log has every line up to the state that the run resumes from. A state keeps the newest
lines of the small ones, from which a resumed run restores what they lack. A damaged log is renamed, and a new one
begins with the lines of it that can be read.
"""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from src.files import atomic_write, sync_folder
from src.run_folder import LOG, VALIDATION, rename_damaged
from src.run_log import is_mini_epoch_line, is_number
from src.training.console import log
from src.training.reporting.sink import UPDATE_GROUPS, MiniEpochReport, Sink, StepReport, ValidationReport

VALIDATION_LINE = re.compile(r"validation after step ([0-9]{1,12}): ")
# exp(709.8) is the largest that a float64 can hold; a diverged run should log its loss, not fail on its perplexity
MAX_LOSS_OF_PERPLEXITY = 700.0
# Of a small log that a state keeps, the newest ones: 70 kB.
LINES_IN_STATE = 1000
Row = dict[str, str]
Lines = Mapping[str, Sequence[str]]  # of the small logs, by file name, as a state keeps them


def _no_check() -> None: ...


class TrainLog(Sink):
    """train_log.txt: a header per start, then a line per mini-epoch and per validation.

    Lines of mini-epochs that are trained again, because their weights were not saved, are dropped first.
    """

    def __init__(
        self,
        path: Path,
        first_mini_epoch: int,
        last_validation: int,
        settings: dict[str, Any],
        saved: Lines | None = None,
        check_folder: Callable[[], None] = _no_check,
    ) -> None:
        """`last_validation`: the step up to which validations are not measured again, -1 for none. `saved`: the lines
        in the state that is resumed. `check_folder` raises where the folder is another run's."""
        # `count` is the last column: other RWKV training scripts number the lines of each start
        self.path, self.check_folder, self.count = path, check_folder, 0

        def is_kept(line: str) -> bool:
            if match := VALIDATION_LINE.match(line):
                return int(match[1]) <= last_validation
            return not is_mini_epoch_line(line) or int(line.split()[0]) < first_mini_epoch

        lines = _read_lines(path, is_kept)
        present = {key for line in lines if (key := _key(line))}
        missing = [line for line in (saved or {}).get(LOG, ()) if _key(line) and _key(line) not in present]
        if missing:
            log(f"note: {path.name} lacked {len(missing)} lines of this run; restored from its state")
        self._lines = [line for line in lines if _key(line)] + missing
        title = "NEW RUN" if first_mini_epoch == 0 else f"NEW RUN continues at mini-epoch {first_mini_epoch}"
        header = f"{title} {datetime.now():%Y-%m-%d %H:%M:%S}\n{json.dumps(settings)}"
        self._append([*missing, header])

    def mini_epoch(self, report: MiniEpochReport) -> None:
        now, lr = datetime.now(), report.last.lr
        is_finite = math.isfinite(report.loss)
        perplexity = math.exp(min(report.loss, MAX_LOSS_OF_PERPLEXITY)) if is_finite else math.nan
        self._add(f"{report.mini_epoch} {report.loss:.6f} {perplexity:.4f} {lr:.8f} {now} {self.count}")
        self.count += 1

    def validation(self, report: ValidationReport) -> None:
        self._add(f"validation after step {report.steps}: {report.loss:.6f}")

    def lines_for_state(self) -> dict[str, list[str]]:
        return {LOG: self._lines[-LINES_IN_STATE:]}

    def _add(self, line: str) -> None:
        self._lines.append(line)
        self._append([line])

    def _append(self, lines: list[str]) -> None:
        self.check_folder()
        # opened for each line: there are few, and the file may be edited during the run
        _append_durably(self.path, "".join(f"{line}\n" for line in lines))


def _key(line: str) -> tuple[str, int] | None:
    """What a line of train_log.txt is about; None for a header."""
    if match := VALIDATION_LINE.match(line):
        return "validation", int(match[1])
    return ("mini-epoch", int(line.split()[0])) if is_mini_epoch_line(line) else None


class MetricsFile(Sink):
    """metrics.csv: a row per step, for plots and comparisons. Rows of steps that are trained again are dropped first.

    A cell is empty where the value is unknown. `seconds` continues from the last row that is kept; `lost_seconds` is
    the training time of the dropped rows; `missing_steps` counts the steps before this start that have no row.
    """

    COLUMNS = (
        *(column.name for column in fields(StepReport) if column.name != "update_ratios"),
        *(f"update_{group}" for group in UPDATE_GROUPS),
    )

    def __init__(self, path: Path, first_step: int, tokens_per_step: int) -> None:
        self.lost_seconds = self._seconds_before = 0.0
        rows, is_damaged = _read_rows(path, "step")
        kept = [row for row in rows if int(row["step"]) < first_step]
        # from the speed, not from `seconds`: files of earlier versions lack that column
        speeds = [_parse_number(row.get("tokens_per_second")) for row in rows if int(row["step"]) >= first_step]
        self.lost_seconds = sum(tokens_per_step / speed for speed in speeds if speed > 0)
        known = [seconds for row in kept if math.isfinite(seconds := _parse_number(row.get("seconds")))]
        self._seconds_before = known[-1] if known else 0.0
        # a run may begin in the middle (--epoch_begin): nothing is missing before its first row
        begin = int(kept[0]["step"]) if kept and not is_damaged else 0
        self.missing_steps = max(0, first_step - begin - len(kept))
        if path.exists():
            _rewrite(path, self.COLUMNS, kept)
        self._file, self._writer = _open_for_append(path, self.COLUMNS)
        sync_folder(path.parent)

    def step(self, report: StepReport) -> None:
        *values, update_ratios = astuple(report)
        row = dict(zip(self.COLUMNS, values, strict=False))
        row["seconds"] += self._seconds_before
        row |= {f"update_{group}": ratio for group, ratio in update_ratios.items()}
        self._writer.writerow([_format_cell(row.get(name, math.nan)) for name in self.COLUMNS])
        self._file.flush()  # each row is handed to the system, so that a killed process loses none

    def mini_epoch(self, report: MiniEpochReport) -> None:
        self.sync()

    def sync(self) -> None:
        # not at each step: training would wait for the disk
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class ValidationFile(Sink):
    """val.csv, a row per validation: steps and tokens trained on before it, loss, and number of tokens it covers."""

    COLUMNS = ("steps", "tokens", "loss", "counted")

    def __init__(
        self,
        path: Path,
        last_validation: int,
        saved: Lines | None = None,
        check_folder: Callable[[], None] = _no_check,
    ) -> None:
        """The arguments are those of `TrainLog`."""
        self.path, self.check_folder = path, check_folder
        present, _ = _read_rows(path, "steps")
        kept = {int(row["steps"]): row for row in present if int(row["steps"]) <= last_validation}
        rows = [dict(zip(self.COLUMNS, line.split(","), strict=False)) for line in (saved or {}).get(VALIDATION, ())]
        in_state = {int(row["steps"]): row for row in rows if _is_row(row, self.COLUMNS, "steps")}
        if missing := in_state.keys() - kept.keys():
            log(f"note: {path.name} lacked {len(missing)} rows of this run; restored from its state")
            kept |= {steps: in_state[steps] for steps in missing}
        kept = dict(sorted(kept.items()))
        self._lines = [",".join(row.get(name, "") for name in self.COLUMNS) for row in kept.values()]
        if path.exists() or kept:
            _rewrite(path, self.COLUMNS, list(kept.values()))

    def validation(self, report: ValidationReport) -> None:
        self.check_folder()
        line = ",".join(_format_cell(getattr(report, name)) for name in self.COLUMNS)
        self._lines.append(line)
        header = "" if self.path.exists() else ",".join(self.COLUMNS) + "\n"
        _append_durably(self.path, f"{header}{line}\n")

    def lines_for_state(self) -> dict[str, list[str]]:
        return {VALIDATION: self._lines[-LINES_IN_STATE:]}


# ---- rows ------------------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    """The whole lines of a log; bytes that are no UTF-8 are replaced. "" where there is no file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ""
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        _archive(path, f"can't be read ({error.strerror})")
        return ""
    # a last line without its newline was cut by a crash
    return data[: data.rfind(b"\n") + 1].decode("utf-8", "replace")


def _archive(path: Path, problem: str) -> None:
    log(f"WARNING: {path} is damaged: {problem}; renamed to {rename_damaged(path).name}, a new one begins")


def _read_lines(path: Path, is_kept: Callable[[str], bool]) -> list[str]:
    """The kept lines of train_log.txt, of which the file then consists. Lines that are no text make it damaged."""
    lines = _read_text(path).split("\n")[:-1]
    readable = [line for line in lines if "\0" not in line and "\ufffd" not in line]
    if unreadable := len(lines) - len(readable):
        _archive(path, f"{unreadable} of {len(lines)} lines can't be read")
    kept = [line for line in readable if is_kept(line)]
    text = "".join(f"{line}\n" for line in kept)
    # an untouched file keeps its modification time
    if unreadable or (path.exists() and text.encode() != path.read_bytes()):
        with atomic_write(path, "w") as file:
            file.write(text)
    return kept


def _read_rows(path: Path, key: str) -> tuple[list[Row], bool]:
    """The rows of a csv file of numbers, `key` an integer in each, and whether it was damaged: a file that has anything
    else is archived."""
    lines = [line.rstrip("\r") for line in _read_text(path).split("\n")[:-1]]
    if not lines:
        return [], False
    columns = lines[0].split(",")
    if key not in columns:
        _archive(path, f"its first line has no column {key}")
        return [], True
    filled = [line for line in lines[1:] if line]
    cells = [line.split(",") for line in filled]
    whole = (dict(zip(columns, row, strict=True)) for row in cells if len(row) == len(columns))
    rows = [row for row in whole if _is_row(row, columns, key)]
    if unreadable := len(filled) - len(rows):
        _archive(path, f"{unreadable} of {len(filled)} rows can't be read")
        _rewrite(path, tuple(columns), rows)
    return rows, unreadable > 0


def _is_row(row: Row, columns: Sequence[str], key: str) -> bool:
    is_complete = re.fullmatch(r"[0-9]{1,15}", row.get(key, "")) is not None and len(row) == len(columns)
    return is_complete and all(is_number(cell) for cell in row.values() if cell)


def _rewrite(path: Path, columns: Sequence[str], rows: list[Row]) -> None:
    """Replace the file by these rows under `columns`, which may differ from those of the version that wrote it."""
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _append_durably(path: Path, text: str) -> None:
    """Append, and flush to the disk before returning; the name too, where the file is new."""
    is_new = not path.exists()
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync_folder(path.parent)


def _open_for_append(path: Path, columns: tuple[str, ...]) -> tuple[Any, Any]:
    """(file, csv writer); a new file gets its header."""
    file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 (the caller closes it)
    writer = csv.writer(file, lineterminator="\n")
    if file.tell() == 0:
        writer.writerow(columns)
    return file, writer


def _format_cell(value: float) -> str:
    if isinstance(value, int):  # tokens: all digits, which .9g would round
        return str(value)
    return "" if math.isnan(value) else f"{value:.9g}"  # nine digits tell any two fp32 values apart


def _parse_number(cell: str | None) -> float:
    return float(cell) if cell else math.nan

"""Writes a run's log files (train_log.txt, metrics.csv, val.csv); a resumed run first drops what it trains again."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import astuple, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from src.errors import UserError
from src.files import atomic_write
from src.run_log import is_mini_epoch_line
from src.training.reporting.sink import UPDATE_GROUPS, MiniEpochReport, Sink, StepReport, ValidationReport

VALIDATION_LINE = re.compile(r"validation after step (\d+): ")
# exp(709.8) is the largest that a float64 can hold; a diverged run should log its loss, not fail on its perplexity
MAX_LOSS_OF_PERPLEXITY = 700.0
Row = dict[str, str]


class TrainLog(Sink):
    """train_log.txt: a header per start, then a line per mini-epoch and per validation.

    Lines of mini-epochs that are trained again, because their weights were not saved, are dropped first.
    """

    def __init__(self, path: Path, first_mini_epoch: int, first_step: int, settings: dict[str, Any]) -> None:
        # `count` is the last column: other RWKV training scripts number the lines of each start
        self.path, self.count = path, 0

        def is_kept(line: str) -> bool:
            if match := VALIDATION_LINE.match(line):
                return first_step > 0 and int(match[1]) <= first_step  # before step 0 it is measured again
            return not is_mini_epoch_line(line) or int(line.split()[0]) < first_mini_epoch

        if path.exists():
            _filter_lines(path, is_kept)
        title = "NEW RUN" if first_mini_epoch == 0 else f"NEW RUN continues at mini-epoch {first_mini_epoch}"
        self._append(f"{title} {datetime.now():%Y-%m-%d %H:%M:%S}\n{json.dumps(settings)}\n")

    def mini_epoch(self, report: MiniEpochReport) -> None:
        now, lr = datetime.now(), report.last.lr
        is_finite = math.isfinite(report.loss)
        perplexity = math.exp(min(report.loss, MAX_LOSS_OF_PERPLEXITY)) if is_finite else math.nan
        self._append(f"{report.mini_epoch} {report.loss:.6f} {perplexity:.4f} {lr:.8f} {now} {self.count}\n")
        self.count += 1

    def validation(self, report: ValidationReport) -> None:
        self._append(f"validation after step {report.steps}: {report.loss:.6f}\n")

    def _append(self, text: str) -> None:
        # opened for each line: there are few, and the file may be moved or edited during the run
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text)


class MetricsFile(Sink):
    """metrics.csv: a row per step, for plots and comparisons. Rows of steps that are trained again are dropped first.

    A cell is empty where the value is unknown. `seconds` continues from the last row that is kept; `lost_seconds` is
    the training time of the dropped rows.
    """

    COLUMNS = (
        *(column.name for column in fields(StepReport) if column.name != "update_ratios"),
        *(f"update_{group}" for group in UPDATE_GROUPS),
    )

    def __init__(self, path: Path, first_step: int, tokens_per_step: int) -> None:
        self.lost_seconds = self._seconds_before = 0.0
        if path.exists():
            rows, dropped = _split_rows(path, lambda row: int(row["step"]) < first_step)
            # from the speed, not from `seconds`: files of earlier versions lack that column
            speeds = [_parse_number(row.get("tokens_per_second")) for row in dropped]
            self.lost_seconds = sum(tokens_per_step / speed for speed in speeds if speed > 0)
            known = [seconds for row in rows if math.isfinite(seconds := _parse_number(row.get("seconds")))]
            self._seconds_before = known[-1] if known else 0.0
            _rewrite(path, self.COLUMNS, rows)
        self._file, self._writer = _open_for_append(path, self.COLUMNS)

    def step(self, report: StepReport) -> None:
        *values, update_ratios = astuple(report)
        row = dict(zip(self.COLUMNS, values, strict=False))
        row["seconds"] += self._seconds_before
        row |= {f"update_{group}": ratio for group, ratio in update_ratios.items()}
        self._writer.writerow([_format_cell(row.get(name, math.nan)) for name in self.COLUMNS])
        self._file.flush()  # each row is handed to the system, so that a killed process loses none

    def mini_epoch(self, report: MiniEpochReport) -> None:
        # a power cut loses one mini-epoch at most; at each step training would wait for the disk
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class ValidationFile(Sink):
    """val.csv, a row per validation: steps and tokens trained on before it, loss, and number of tokens it covers."""

    COLUMNS = ("steps", "tokens", "loss", "counted")

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        if path.exists():
            # at step 0 none is kept: the measurement before the run is repeated
            rows, _ = _split_rows(path, lambda row: first_step > 0 and int(row["steps"]) <= first_step)
            _rewrite(path, self.COLUMNS, rows)

    def validation(self, report: ValidationReport) -> None:
        file, writer = _open_for_append(self.path, self.COLUMNS)
        with file:
            writer.writerow([_format_cell(getattr(report, name)) for name in self.COLUMNS])


# ---- rows ------------------------------------------------------------------------------------------------------------


def _split_rows(path: Path, is_kept: Callable[[Row], bool]) -> tuple[list[Row], list[Row]]:
    """(kept, dropped) rows of a csv file."""
    text = path.read_text(encoding="utf-8")
    # a last line without its newline was cut by a crash
    rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
    try:
        kept = [is_kept(row) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        advice = "repair or remove the file: the run continues without it"
        raise UserError(f"a row can't be read ({error})", given=path, advice=advice) from error
    pairs = list(zip(rows, kept, strict=True))
    return [row for row, is_kept in pairs if is_kept], [row for row, is_kept in pairs if not is_kept]


def _rewrite(path: Path, columns: tuple[str, ...], rows: list[Row]) -> None:
    """Replace the file by these rows under `columns`, which may differ from those of the version that wrote it."""
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


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


def _filter_lines(path: Path, is_kept: Callable[[str], bool]) -> None:
    """Drop the other lines, and a last one that was cut by a crash."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and is_kept(line)]
    if len(kept) < len(lines):  # an untouched file keeps its modification time
        with atomic_write(path, "w") as file:
            file.writelines(kept)

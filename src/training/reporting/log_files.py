"""The files that a run tells its course in: train_log.txt, metrics.csv, val.csv. What is trained again is dropped from them first."""

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

from src.files import atomic_write
from src.run_log import is_mini_epoch_line
from src.training.reporting.sink import UPDATE_GROUPS, MiniEpochReport, Sink, StepReport, ValidationReport

VALIDATION_LINE = re.compile(r"validation after step (\d+): ")


class TrainLog(Sink):
    """train_log.txt: a header per start, then a line per mini-epoch, and one per validation.

    Lines of mini-epochs that are trained again, because their weights were not saved, are dropped first.
    """

    def __init__(self, path: Path, first_mini_epoch: int, first_step: int, settings: dict[str, Any]) -> None:
        self.path, self.count = path, 0

        def stays(line: str) -> bool:
            if found := VALIDATION_LINE.match(line):
                return first_step > 0 and int(found[1]) <= first_step  # before step 0 it is measured again
            return not is_mini_epoch_line(line) or int(line.split()[0]) < first_mini_epoch

        if path.exists():
            _keep_lines(path, stays)
        title = "NEW RUN" if first_mini_epoch == 0 else f"NEW RUN continues at mini-epoch {first_mini_epoch}"
        self._append(f"{title} {datetime.now():%Y-%m-%d %H:%M:%S}\n{json.dumps(settings)}\n")

    def mini_epoch(self, report: MiniEpochReport) -> None:
        now, lr = datetime.now(), report.last.lr
        perplexity = math.exp(min(report.loss, 700.0)) if math.isfinite(report.loss) else math.nan
        self._append(f"{report.mini_epoch} {report.loss:.6f} {perplexity:.4f} {lr:.8f} {now} {self.count}\n")
        self.count += 1

    def validation(self, report: ValidationReport) -> None:
        self._append(f"validation after step {report.steps}: {report.loss:.6f}\n")

    def _append(self, text: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text)


class MetricsFile(Sink):
    """metrics.csv: a row per step, for plots and comparisons. Rows of steps that are trained again are dropped first.

    `lost_seconds` is the training time of the dropped rows. `seconds` goes on from the last row that stays. A cell is empty where
    the value isn't known. Each row is handed to the system at once, so that a run that was killed has told how far it came.
    """

    COLUMNS = (
        *(column.name for column in fields(StepReport) if column.name != "update_ratios"),
        *(f"update_{group}" for group in UPDATE_GROUPS),
    )

    def __init__(self, path: Path, first_step: int, tokens_per_step: int) -> None:
        self.lost_seconds = self._seconds_before = 0.0
        if path.exists():
            rows, dropped = _split_rows(path, lambda row: int(row["step"]) < first_step)
            speeds = [_number(row.get("tokens_per_second")) for row in dropped]
            self.lost_seconds = sum(tokens_per_step / speed for speed in speeds if speed > 0)
            known = [seconds for row in rows if math.isfinite(seconds := _number(row.get("seconds")))]
            self._seconds_before = known[-1] if known else 0.0
            _rewrite(path, self.COLUMNS, rows)
        self._file, self._writer = _open_rows(path, self.COLUMNS)

    def step(self, report: StepReport) -> None:
        *plain, ratios = astuple(report)
        row = dict(zip(self.COLUMNS, plain, strict=False))
        row["seconds"] += self._seconds_before
        row |= {f"update_{group}": ratio for group, ratio in ratios.items()}
        self._writer.writerow([_cell(row.get(name, math.nan)) for name in self.COLUMNS])
        self._file.flush()

    def mini_epoch(self, report: MiniEpochReport) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class ValidationFile(Sink):
    """val.csv: a row per validation, `steps` after which it was, tokens trained on, loss, tokens that it counts."""

    COLUMNS = ("steps", "tokens", "loss", "counted")

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        if path.exists():
            rows, _ = _split_rows(path, lambda row: first_step > 0 and int(row["steps"]) <= first_step)
            _rewrite(path, self.COLUMNS, rows)

    def validation(self, report: ValidationReport) -> None:
        file, writer = _open_rows(self.path, self.COLUMNS)
        with file:
            writer.writerow([_cell(getattr(report, name)) for name in self.COLUMNS])


# ---- rows -------------------------------------------------------------------------------------------------------------------


def _rows(path: Path) -> list[dict[str, str]]:
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def _split_rows(
    path: Path, wanted: Callable[[dict[str, str]], bool]
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    rows = _rows(path)
    return [row for row in rows if wanted(row)], [row for row in rows if not wanted(row)]


def _rewrite(path: Path, columns: tuple[str, ...], rows: list[dict[str, str]]) -> None:
    """The file with these rows and columns, whatever version of this program wrote it."""
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _open_rows(path: Path, columns: tuple[str, ...]) -> tuple[Any, Any]:
    file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 (the caller closes it)
    writer = csv.writer(file, lineterminator="\n")
    if file.tell() == 0:
        writer.writerow(columns)
    return file, writer


def _cell(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return "" if math.isnan(value) else f"{value:.9g}"


def _number(cell: str | None) -> float:
    return float(cell) if cell else math.nan


def _keep_lines(path: Path, wanted: Callable[[str], bool]) -> None:
    """Drop the other lines, and a last one that was cut by a crash."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    keeps = [line.endswith("\n") and wanted(line) for line in lines]
    if not all(keeps):
        with atomic_write(path, "w") as file:
            file.writelines(line for line, keep in zip(lines, keeps, strict=True) if keep)

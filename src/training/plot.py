"""Draws runs from their logs: one run in detail, or several compared, and prints a table of their final losses.

    python -m src.training.plot RUN [RUN ...] [--out compare.png]

RUN is the folder of a run, or the train_log.txt of any RWKV training program.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from src.errors import UserError
from src.run_folder import FIGURE
from src.run_log import Curves, read_curves
from src.terminal import prepare_output, show
from src.training.figures.loss_figure import draw_comparison, draw_run, write_figure
from src.training.reporting.progress import duration


def table(runs: list[Curves]) -> str:
    """One line per run: last losses, median speed, training time; a cell is empty where the logs lack the value."""
    head: tuple[str, ...] = ("run", "tokens", "loss", "held-out", "lowest", "tokens/s", "time")
    rows = [head, *map(_row, runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        # Names start at the left, numbers end at the right, so that their digits stand in columns.
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *numbers]))
    return "\n".join(lines)


def _row(curves: Curves) -> tuple[str, ...]:
    val_loss, speed = curves.val_loss, curves.speed[np.isfinite(curves.speed)]
    return (
        curves.name,
        f"{curves.tokens[-1]:,.0f}",
        f"{curves.smoothed()[0][-1]:.4f}",
        f"{val_loss[-1]:.4f}" if len(val_loss) else "",
        f"{val_loss.min():.4f}" if len(val_loss) else "",
        # The median, as the mean would count compilation and pauses of the machine.
        f"{np.median(speed):,.0f}" if len(speed) else "",
        duration(curves.seconds[-1]) if np.isfinite(curves.seconds[-1]) else "",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m src.training.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument(
        "--out", default="", help=f"output file (.png, .svg) [RUN/{FIGURE} for a single run, else compare.png]"
    )
    prepare_output()
    options = parser.parse_args(argv)
    # All are read before anything is drawn: a mistyped second name must not leave a figure of the first run alone.
    try:
        runs = [read_curves(run) for run in options.runs]
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    for warning in (warning for run in runs for warning in run.warnings):
        print(f"WARNING: {warning}", file=sys.stderr)
    is_single = len(runs) == 1
    # A log file may lie in a folder of another program's: its figure goes to the current folder, as a comparison does.
    default = Path(options.runs[0]) / FIGURE if is_single and Path(options.runs[0]).is_dir() else Path("compare.png")
    # --out decides the format too: a suffix of .svg gives a figure that can be scaled.
    path = Path(options.out) if options.out else default
    write_figure(draw_run(runs[0]) if is_single else draw_comparison(runs), path)
    show(f"{table(runs)}\n\nwrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

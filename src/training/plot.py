"""Pictures of a run, drawn from its metrics.csv."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from src.files import write_whole

SMOOTHED_SHARE = 0.02  # of the run's steps: the width of the running mean
SMOOTHED_STEPS = 10  # at least


def read_metrics(path: Path) -> dict[str, list[float]]:
    """The columns of a metrics.csv. Raises ValueError when it isn't one."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if rows and not {"step", "loss", "lr"} <= rows[0].keys():
        raise ValueError(f"{path}: expected the columns step, loss and lr")
    return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else ())}


def running_mean(values: list[float], width: int) -> list[float]:
    """Mean of the last `width` values at each place (of those there are, at the beginning)."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        means.append(total / min(i + 1, width))
    return means


def loss_curve(metrics: Path, picture: Path) -> Path:
    """Loss by step, raw and smoothed, with the learning rate, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = read_metrics(metrics)
    figure, axes = plt.subplots(figsize=(9, 5), dpi=110)
    if columns:
        told = [i for i, loss in enumerate(columns["loss"]) if math.isfinite(loss)]
        steps, losses = ([columns[name][i] for i in told] for name in ("step", "loss"))
        width = max(SMOOTHED_STEPS, int(len(losses) * SMOOTHED_SHARE))
        axes.plot(steps, losses, color="#9db8d9", linewidth=0.7, label="loss of each step")
        axes.plot(steps, running_mean(losses, width), color="#1f4e8c", linewidth=1.8, label=f"mean of {width} steps")
        rate = axes.twinx()
        rate.plot(columns["step"], columns["lr"], color="#c77d2e", linewidth=1.0, linestyle="--", label="learning rate")
        rate.set_ylabel("learning rate")
        rate.set_ylim(bottom=0)
        handles = [*axes.get_lines(), *rate.get_lines()]
        axes.legend(handles=handles, loc="upper right", frameon=False)
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy (nats per token)")
    axes.set_title(f"{metrics.parent.name}: loss")
    axes.grid(alpha=0.25)
    figure.tight_layout()
    with write_whole(picture) as file:
        figure.savefig(file, format="png")
    plt.close(figure)
    return picture

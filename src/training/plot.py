"""Pictures of runs, from their logs.

python -m src.training.plot RUN [RUN ...] [--out compare.png]      RUN: the folder of a run, or any RWKV run's train_log.txt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src.files import atomic_write
from src.run_folder import FIGURE
from src.run_log import Curves, Numbers, read_curves
from src.training.figures import published
from src.training.reporting.progress import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 1000  # of a curve at most: more can't be seen
STEP_COLOUR, MEAN_COLOUR, VAL_COLOUR, RATE_COLOUR, PUBLISHED_COLOUR = (
    "#a9c1de",
    "#1f4e8c",
    "#c0392b",
    "#c77d2e",
    "#2e8b57",
)
RUN_COLOURS = ("#1f4e8c", "#c77d2e", "#2e8b57", "#c0392b", "#7d3c98", "#117a8b", "#6d6d6d", "#b7950b")


def loss_picture(run: Path, picture: Path) -> Path:
    """Loss, held-out loss and learning rate of one run against tokens and time, as a PNG."""
    _write(draw_run(read_curves(run)), picture)
    return picture


def draw_run(curves: Curves) -> Figure:
    """Loss (each step, running mean, held-out, and the published run's where this is that run) above the learning rate, against tokens
    and training time."""
    figure = _figure(width=11, height=6)
    (loss_by_tokens, loss_by_time), (lr_by_tokens, lr_by_time) = figure.subplots(
        2, 2, sharex="col", sharey="row", gridspec_kw={"height_ratios": [3, 1]}
    )
    tokens, token_unit = _token_unit(curves.tokens)
    times, time_unit = _time_unit(curves.seconds)
    smoothed, width = curves.smoothed()
    for axes, x, scale in ((loss_by_tokens, curves.tokens, tokens), (loss_by_time, curves.seconds, times)):
        if curves.by_step:
            _band(axes, x / scale, curves.loss)
            _line(axes, x / scale, smoothed, MEAN_COLOUR, f"mean of {width} steps", linewidth=1.6)
        else:
            axes.plot(x / scale, curves.loss, ".-", color=MEAN_COLOUR, label="mean of each mini-epoch")
    if len(curves.val_loss):
        for axes, x in (
            (loss_by_tokens, curves.val_tokens / tokens),
            (loss_by_time, curves.seconds_at(curves.val_tokens) / times),
        ):
            axes.plot(x, curves.val_loss, "o-", color=VAL_COLOUR, markersize=4, linewidth=1.2, label="held-out")
    if not published.differences(curves.settings):
        _published(loss_by_tokens, curves, tokens)
    _line(lr_by_tokens, curves.tokens / tokens, curves.lr, RATE_COLOUR, "learning rate")
    _line(lr_by_time, curves.seconds / times, curves.lr, RATE_COLOUR, "learning rate")
    loss_by_tokens.set_ylabel("loss (nats per token)")
    loss_by_tokens.set_ylim(*_loss_limits(curves, smoothed))
    lr_by_tokens.set_ylabel("learning rate")
    lr_by_tokens.set_ylim(bottom=0)
    lr_by_tokens.set_xlabel(token_unit)
    lr_by_time.set_xlabel(f"training time ({time_unit})")
    for axes in figure.axes:
        axes.grid(alpha=0.25)
    loss_by_tokens.legend(loc="upper right", frameon=False)
    figure.suptitle(f"{curves.name}: {_in_short(curves)}", fontsize=11)
    return figure


def draw_comparison(runs: list[Curves]) -> Figure:
    """The running mean of each run's loss and its held-out loss, against tokens and training time."""
    figure = _figure(width=11, height=5)
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    longest = max(runs, key=lambda run: run.tokens[-1])
    tokens, token_unit = _token_unit(longest.tokens)
    slowest = max(runs, key=lambda run: np.nanmax(run.seconds, initial=0.0))
    times, time_unit = _time_unit(slowest.seconds)
    for i, curves in enumerate(runs):
        colour, (smoothed, _) = RUN_COLOURS[i % len(RUN_COLOURS)], curves.smoothed()
        style: dict[str, Any] = {} if curves.by_step else {"marker": "."}
        _line(by_tokens, curves.tokens / tokens, smoothed, colour, curves.name, **style)
        _line(by_time, curves.seconds / times, smoothed, colour, curves.name, **style)
        if len(curves.val_loss):
            label = f"{curves.name}, held-out"
            by_tokens.plot(curves.val_tokens / tokens, curves.val_loss, "o:", color=colour, markersize=4, label=label)
            x = curves.seconds_at(curves.val_tokens) / times
            by_time.plot(x, curves.val_loss, "o:", color=colour, markersize=4)
    limits = [_loss_limits(curves, curves.smoothed()[0]) for curves in runs]
    by_tokens.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    by_tokens.set_ylabel("loss (nats per token), running mean")
    by_tokens.set_xlabel(token_unit)
    by_time.set_xlabel(f"training time ({time_unit})")
    for axes in figure.axes:
        axes.grid(alpha=0.25)
    by_tokens.legend(loc="upper right", frameon=False)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # without pyplot, which keeps figures in a place shared by all threads

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _write(figure: Figure, picture: Path) -> None:
    with atomic_write(picture) as file:
        figure.savefig(file, format=picture.suffix[1:].lower() or "png")


def _line(axes: Axes, x: Numbers, y: Numbers, colour: str, label: str, **style: Any) -> None:
    """A curve thinned out to what can be seen."""
    keep = np.unique(np.linspace(0, max(0, len(x) - 1), min(len(x), POINTS)).astype(int))
    axes.plot(x[keep], y[keep], color=colour, label=label, **{"linewidth": 1.4, **style})


def _band(axes: Axes, x: Numbers, loss: Numbers) -> None:
    """The loss of each step; where there are too many to be seen, lowest and highest of each stretch."""
    if len(x) <= POINTS:
        axes.plot(x, loss, color=STEP_COLOUR, linewidth=0.7, label="each step")
        return
    stretches = np.array_split(np.arange(len(x)), POINTS // 2)
    with np.errstate(all="ignore"):
        low = [np.nanmin(loss[part], initial=np.inf) for part in stretches]
        high = [np.nanmax(loss[part], initial=-np.inf) for part in stretches]
    middle = [x[part].mean() for part in stretches]
    axes.fill_between(middle, low, high, color=STEP_COLOUR, linewidth=0, label="each step, lowest to highest")


def _published(axes: Axes, curves: Curves, scale: float) -> None:
    middle = (np.arange(len(published.MINI_EPOCHS)) + 0.5) * curves.mini_epoch_tokens / scale
    losses = [loss for loss, _ in published.MINI_EPOCHS]
    axes.plot(middle, losses, "D", color=PUBLISHED_COLOUR, markersize=5, label="published, mean of a mini-epoch")
    own = np.array([[line.number + 0.5, line.loss] for line in curves.mini_epochs])
    if len(own):
        x = own[:, 0] * curves.mini_epoch_tokens / scale
        axes.plot(x, own[:, 1], "+", color="black", markersize=9, label="this run, mean of a mini-epoch")


def _loss_limits(curves: Curves, smoothed: Numbers) -> tuple[float, float]:
    """What is worth seeing: from the lowest value to where the running mean was after its first few percent."""
    known = smoothed[np.isfinite(smoothed)]
    if not len(known):
        return 0.0, 1.0
    finite = curves.loss[np.isfinite(curves.loss)]
    low = min(known.min(), np.quantile(finite, 0.002), *curves.val_loss)
    high = known[int(len(known) * 0.01)] if curves.by_step else known.max()
    high = max(high, np.quantile(finite, 0.95), *curves.val_loss[1:])
    margin = 0.06 * max(high - low, 0.02)
    return float(low - margin), float(high + margin)


def _token_unit(tokens: Numbers) -> tuple[float, str]:
    most = float(tokens[-1]) if len(tokens) else 0.0
    sizes = ((1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens"), (1.0, "tokens"))
    return next((size, words) for size, words in sizes if most >= size or size == 1)


def _time_unit(seconds: Numbers) -> tuple[float, str]:
    most = float(np.nanmax(seconds, initial=0.0))
    return (3600.0, "hours") if most >= 2 * 3600 else (60.0, "minutes") if most >= 120 else (1.0, "seconds")


def _in_short(curves: Curves) -> str:
    smoothed, _ = curves.smoothed()
    words = [f"loss {smoothed[-1]:.4f}"]
    if len(curves.val_loss):
        words.append(f"held-out {curves.val_loss[-1]:.4f} (lowest {curves.val_loss.min():.4f})")
    words.append(f"{curves.tokens[-1]:,.0f} tokens")
    if np.isfinite(curves.seconds[-1]):
        words.append(f"in {duration(curves.seconds[-1])}")
    return ", ".join(words)


def table(runs: list[Curves]) -> str:
    """The end of each run in a line."""
    rows = [("run", "tokens", "loss", "held-out", "lowest", "tokens/s", "time")]
    for curves in runs:
        val = curves.val_loss
        speed = np.median(curves.speed[np.isfinite(curves.speed)]) if np.isfinite(curves.speed).any() else np.nan
        rows.append(
            (
                curves.name,
                f"{curves.tokens[-1]:,.0f}",
                f"{curves.smoothed()[0][-1]:.4f}",
                f"{val[-1]:.4f}" if len(val) else "",
                f"{val.min():.4f}" if len(val) else "",
                f"{speed:,.0f}" if np.isfinite(speed) else "",
                duration(curves.seconds[-1]) if np.isfinite(curves.seconds[-1]) else "",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m src.training.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument(
        "--out", default="", help=f"the picture (.png, .svg) [{FIGURE} of a single run, else compare.png]"
    )
    options = parser.parse_args(argv)
    try:
        runs = [read_curves(run) for run in options.runs]
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    single = len(runs) == 1
    place = Path(options.runs[0]) / FIGURE if single and Path(options.runs[0]).is_dir() else Path("compare.png")
    picture = Path(options.out) if options.out else place
    _write(draw_run(runs[0]) if single else draw_comparison(runs), picture)
    print(table(runs))
    print(f"\nwrote {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

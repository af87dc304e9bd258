"""Draws the loss and the learning rate of one run, or the losses of several runs, with Matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src.files import atomic_write
from src.run_log import Curves, Numbers, read_curves
from src.terminal import printable
from src.training.figures import published
from src.training.reporting.progress import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The panels are about 550 pixels wide: more points than this are indistinguishable and only make the SVG of the report
# larger.
MAX_POINTS = 1000
STEP_COLOUR = "#a9c1de"
MEAN_COLOUR = "#1f4e8c"
VALIDATION_COLOUR = "#c0392b"
RATE_COLOUR = "#c77d2e"
PUBLISHED_COLOUR = "#2e8b57"
RUN_COLOURS = ("#1f4e8c", "#c77d2e", "#2e8b57", "#c0392b", "#7d3c98", "#117a8b", "#6d6d6d", "#b7950b")


def write_loss_figure(run: Path, path: Path) -> Path:
    """Draw the run in the folder `run` (see `draw_run`) as PNG or SVG, by the suffix of `path`, and return `path`.

    Raises UserError when the folder has no logs, and OSError when `path` cannot be written.
    """
    write_figure(draw_run(read_curves(run)), path)
    return path


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the suffix of `path` (PNG where it has none)."""
    # A viewer may have loss.png open, and the run may be killed during the write: the file is replaced only when it
    # is complete.
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower() or "png")


def draw_run(curves: Curves) -> Figure:
    """Four panels: loss above learning rate, against tokens on the left and against training time on the right.

    The loss panels show each step, the running mean, the held-out loss and, where the settings are those of the
    published run, its mean loss per mini-epoch.
    """
    figure = _new_figure(width=11, height=6)
    (loss_by_tokens, loss_by_time), (lr_by_tokens, lr_by_time) = figure.subplots(
        2, 2, sharex="col", sharey="row", gridspec_kw={"height_ratios": [3, 1]}
    )
    token_scale, token_unit = _token_unit(curves.tokens)
    time_scale, time_unit = _time_unit(curves.seconds)
    tokens, times = curves.tokens / token_scale, curves.seconds / time_scale
    smoothed, width = curves.smoothed()
    for axes, x in ((loss_by_tokens, tokens), (loss_by_time, times)):
        if curves.by_step:
            _plot_steps(axes, x, curves.loss)
            _plot_line(axes, x, smoothed, MEAN_COLOUR, f"mean of {width} steps", linewidth=1.6)
        else:
            axes.plot(x, curves.loss, ".-", color=MEAN_COLOUR, label="mean of each mini-epoch")
    if len(curves.val_loss):
        val_tokens, val_times = curves.val_tokens / token_scale, curves.seconds_at(curves.val_tokens) / time_scale
        for axes, x in ((loss_by_tokens, val_tokens), (loss_by_time, val_times)):
            axes.plot(x, curves.val_loss, "o-", color=VALIDATION_COLOUR, markersize=4, linewidth=1.2, label="held-out")
    # Another batch size or schedule has another curve, next to which the published losses would mislead.
    if not published.differences(curves.settings):
        _plot_published(loss_by_tokens, curves, token_scale)
    _plot_line(lr_by_tokens, tokens, curves.lr, RATE_COLOUR, "learning rate")
    _plot_line(lr_by_time, times, curves.lr, RATE_COLOUR, "learning rate")
    loss_by_tokens.set_ylabel("loss (nats per token)")
    loss_by_tokens.set_ylim(*_loss_limits(curves, smoothed))
    lr_by_tokens.set_ylabel("learning rate")
    # Not the automatic limit, which follows the range of the values: a constant rate would lie on the frame.
    lr_by_tokens.set_ylim(0, 1.05 * np.nanmax(curves.lr, initial=1e-12))
    lr_by_tokens.set_xlabel(token_unit)
    lr_by_time.set_xlabel(f"training time ({time_unit})")
    for axes in figure.axes:
        axes.grid(alpha=0.25)
    loss_by_tokens.legend(loc="upper right", frameon=False)
    figure.suptitle(f"{_name(curves)}: {_plain(_summary(curves))}", fontsize=11)
    return figure


def draw_comparison(runs: list[Curves]) -> Figure:
    """Two panels: running mean of the loss and held-out loss of each run, against tokens and against training time."""
    figure = _new_figure(width=11, height=5)
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    # One unit for all runs: that of the longest, as several scales on one axis could not be compared.
    longest = max(runs, key=lambda run: run.tokens[-1])
    token_scale, token_unit = _token_unit(longest.tokens)
    slowest = max(runs, key=lambda run: np.nanmax(run.seconds, initial=0.0))
    time_scale, time_unit = _time_unit(slowest.seconds)
    for i, curves in enumerate(runs):
        colour, (smoothed, _) = RUN_COLOURS[i % len(RUN_COLOURS)], curves.smoothed()
        style: dict[str, Any] = {} if curves.by_step else {"marker": "."}
        _plot_line(by_tokens, curves.tokens / token_scale, smoothed, colour, _name(curves), **style)
        _plot_line(by_time, curves.seconds / time_scale, smoothed, colour, _name(curves), **style)
        if len(curves.val_loss):
            style = {"color": colour, "markersize": 4}
            label = f"{_name(curves)}, held-out"
            by_tokens.plot(curves.val_tokens / token_scale, curves.val_loss, "o:", label=label, **style)
            by_time.plot(curves.seconds_at(curves.val_tokens) / time_scale, curves.val_loss, "o:", **style)
    limits = [_loss_limits(curves, curves.smoothed()[0]) for curves in runs]
    by_tokens.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    by_tokens.set_ylabel("loss (nats per token), running mean")
    by_tokens.set_xlabel(token_unit)
    by_time.set_xlabel(f"training time ({time_unit})")
    for axes in figure.axes:
        axes.grid(alpha=0.25)
    by_tokens.legend(loc="upper right", frameon=False)
    return figure


def _name(curves: Curves) -> str:
    return _plain(curves.name)


def _plain(text: str) -> str:
    """`text` as Matplotlib shows it literally: between two $ it would be a formula, and an invalid one an error."""
    # Lone surrogates, which stand for the bytes of a name that is no valid text, can't be drawn.
    return printable(text).encode("utf-8", "replace").decode().replace("$", r"\$")


def _new_figure(width: float, height: float) -> Figure:
    # Imported here, since Matplotlib takes over half a second to load and a run draws for the first time after minutes.
    # Not through pyplot: its registry of figures is shared by all threads, and a run draws in a thread of its own.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _plot_line(axes: Axes, x: Numbers, y: Numbers, colour: str, label: str, **style: Any) -> None:
    """Plot a curve with at most MAX_POINTS points, evenly spaced, the first and the last among them."""
    points = np.unique(np.linspace(0, max(0, len(x) - 1), min(len(x), MAX_POINTS)).astype(int))
    axes.plot(x[points], y[points], color=colour, label=label, **{"linewidth": 1.4, **style})


def _plot_steps(axes: Axes, x: Numbers, loss: Numbers) -> None:
    """Plot the loss of each step; of more than MAX_POINTS steps, the band from lowest to highest of each interval."""
    if len(x) <= MAX_POINTS:
        axes.plot(x, loss, color=STEP_COLOUR, linewidth=0.7, label="each step")
        return
    # Two edges per interval, so that the band has MAX_POINTS points in all. Thinning as in _plot_line would hide
    # outliers.
    intervals = np.array_split(np.arange(len(x)), MAX_POINTS // 2)
    with np.errstate(all="ignore"):  # an interval of nothing but NaN is left out by fill_between
        low = [np.nanmin(loss[interval], initial=np.inf) for interval in intervals]
        high = [np.nanmax(loss[interval], initial=-np.inf) for interval in intervals]
    centres = [x[interval].mean() for interval in intervals]
    axes.fill_between(centres, low, high, color=STEP_COLOUR, linewidth=0, label="each step, lowest to highest")


def _plot_published(axes: Axes, curves: Curves, token_scale: float) -> None:
    """Plot the mean loss of each mini-epoch of the published run and of this one, at the middle of the mini-epoch."""
    centres = (np.arange(len(published.MINI_EPOCHS)) + 0.5) * curves.mini_epoch_tokens / token_scale
    losses = [loss for loss, _ in published.MINI_EPOCHS]
    axes.plot(centres, losses, "D", color=PUBLISHED_COLOUR, markersize=5, label="published, mean of a mini-epoch")
    means = np.array([[line.number + 0.5, line.loss] for line in curves.mini_epochs])
    if len(means):
        x = means[:, 0] * curves.mini_epoch_tokens / token_scale
        axes.plot(x, means[:, 1], "+", color="black", markersize=9, label="this run, mean of a mini-epoch")


def _loss_limits(curves: Curves, smoothed: Numbers) -> tuple[float, float]:
    """Limits of the loss axis: from the lowest loss to the running mean after 1 % of the run, with a margin.

    A run starts near ln(vocabulary size), far above everything that follows: with those first steps in view, later
    differences of a few hundredths would be lost in a flat line.
    """
    finite_means = smoothed[np.isfinite(smoothed)]
    if not len(finite_means):
        return 0.0, 1.0
    finite = curves.loss[np.isfinite(curves.loss)]
    # Quantiles instead of the extremes: a single outlier should not set the scale. The first held-out loss, which may
    # be measured before the first step, is left out of the upper limit for the same reason as the first steps.
    low = min(finite_means.min(), np.quantile(finite, 0.002), *curves.val_loss)
    high = finite_means[int(len(finite_means) * 0.01)] if curves.by_step else finite_means.max()
    high = max(high, np.quantile(finite, 0.95), *curves.val_loss[1:])
    margin = 0.06 * max(high - low, 0.02)
    return float(low - margin), float(high + margin)


def _token_unit(tokens: Numbers) -> tuple[float, str]:
    """(divisor, axis label) for a number of tokens."""
    total = float(tokens[-1]) if len(tokens) else 0.0
    units = ((1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens"), (1.0, "tokens"))
    return next((scale, label) for scale, label in units if total >= scale or scale == 1)


def _time_unit(seconds: Numbers) -> tuple[float, str]:
    """(divisor, unit) for a training time; a unit is used from two of it on, so that the axis has several marks."""
    total = float(np.nanmax(seconds, initial=0.0))
    return (3600.0, "hours") if total >= 2 * 3600 else (60.0, "minutes") if total >= 120 else (1.0, "seconds")


def _summary(curves: Curves) -> str:
    """The last losses, tokens and training time, for the title."""
    smoothed, _ = curves.smoothed()
    parts = [f"loss {smoothed[-1]:.4f}"]
    if len(curves.val_loss):
        parts.append(f"held-out {curves.val_loss[-1]:.4f} (lowest {curves.val_loss.min():.4f})")
    parts.append(f"{curves.tokens[-1]:,.0f} tokens")
    if np.isfinite(curves.seconds[-1]):
        parts.append(f"in {duration(curves.seconds[-1])}")
    return ", ".join(parts)

"""report.html: curves, speed, samples, settings and environment of a run on one self-contained page."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from src.config import GROUPS, RunConfig
from src.files import atomic_write
from src.run_folder import REPORT, SAMPLES
from src.run_log import Curves, Numbers, read_curves, read_record
from src.training.console import log
from src.training.figures import published
from src.training.figures.loss_figure import draw_run
from src.training.figures.reproduction import command_of, origin_of
from src.training.reporting.progress import duration

# Inline, as are the figures: the page is sent by mail and opened where nothing else of the run is.
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #fff; max-width: 68rem; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #d8dee6; }
p.summary { margin-top: 0; color: #55606e; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; } td:first-child { overflow-wrap: normal; }
th { font-weight: 600; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr + tr td { border-top: 1px solid #eef1f5; }
.facts { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.facts div { background: #f3f6fa; border-radius: .5rem; padding: .6rem 1rem; min-width: 8rem; }
.facts b { display: block; font-size: 1.25rem; } .facts span { color: #55606e; font-size: .85rem; }
pre { background: #f3f6fa; border-radius: .5rem; padding: .8rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
pre img { image-rendering: pixelated; min-height: 4rem; max-width: 100%; }
.prompt { color: #55606e; } .completion { color: #1f4e8c; }
.columns { columns: 2 26rem; } .columns table { break-inside: avoid; margin-bottom: 1rem; }
"""
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{style}</style>
<h1>{title}</h1>
{body}
</html>
"""


def write_report(folder: Path) -> Path:
    """Write report.html into a run's folder, from what can be read of the files there, and return its path.

    A section without data is left out; what is damaged is named on the page and in the terminal. Raises UserError when
    the folder has no logs, OSError when the page cannot be written.
    """
    curves = read_curves(folder)
    run = read_record(folder, [])  # `curves` has its warning
    samples = _read_samples(folder / SAMPLES, curves.warnings)
    # The order in which a reader asks: how good, how it went, how fast, what it can do; then what a repetition needs.
    sections = [
        ("", _headline(curves)),
        ("", _warnings(curves.warnings)),
        ("Curves", _svg(curves)),
        ("Speed", _speed(curves)),
        ("Mini-epochs", _mini_epochs(curves)),
        ("Samples", _samples(samples)),
        ("How to reproduce it", _reproduction(curves.settings, run)),
        ("Environment", _key_value_table(run.get("environment", {}))),
        ("Settings", _settings(curves.settings)),
    ]
    body = "\n".join(f"<h2>{title}</h2>\n{content}" if title else content for title, content in sections if content)
    # The page of an earlier part of the run stays until the new one is complete.
    with atomic_write(folder / REPORT, "w") as file:
        file.write(PAGE.format(title=_escape(curves.name), style=STYLE, body=body))
    for warning in curves.warnings:
        log(f"WARNING: {warning}")
    return folder / REPORT


def _headline(curves: Curves) -> str:
    """Model and data in a sentence, the most important numbers in boxes."""
    settings = curves.settings
    smoothed, width = curves.smoothed()
    # The mean, as the loss of a single step depends on its samples more than on the progress of training.
    interval = f"{width} steps" if curves.by_step else "mini-epoch"
    facts = [(f"{smoothed[-1]:.4f}", f"training loss, mean of the last {interval}")]
    if len(curves.val_loss):
        facts.append((f"{curves.val_loss[-1]:.4f}", "held-out loss at the end"))
        facts.append((f"{curves.val_loss.min():.4f}", "lowest held-out loss"))
    tokens = curves.tokens[-1]
    facts.append((f"{tokens / 1e6:,.1f} M" if tokens >= 1e6 else f"{tokens:,.0f}", "tokens"))
    if np.isfinite(curves.seconds[-1]):
        facts.append((duration(curves.seconds[-1]), "training time"))
    # Logs of other programs have some of these settings only.
    formats = {"n_layer": "{} layers", "n_embd": "width {:,}", "vocab_size": "vocabulary {:,}"}
    sizes = [text.format(settings[name]) for name, text in formats.items() if name in settings]
    data = f" Data: {settings['data_file']}." if settings.get("data_file") else ""
    summary = ", ".join(["RWKV-7", *sizes]) + "." + data
    boxes = "".join(f"<div><b>{_escape(value)}</b><span>{_escape(label)}</span></div>" for value, label in facts)
    return f'<p class="summary">{_escape(summary)}</p>\n<div class="facts">{boxes}</div>'


def _svg(curves: Curves) -> str:
    """The figure of the run as an <svg> element."""
    import matplotlib

    file = io.StringIO()
    # A fixed salt for the ids and no date: the same run gives the same page, which a test and a diff can compare.
    # Text stays text, so that it can be searched and copied.
    with matplotlib.rc_context({"svg.hashsalt": "rwkv", "svg.fonttype": "none"}):
        draw_run(curves).savefig(file, format="svg", metadata={"Date": None})
    # Without the XML declaration, which is only valid at the start of a document.
    return file.getvalue()[file.getvalue().index("<svg") :]


def _speed(curves: Curves) -> str:
    speed = curves.speed[np.isfinite(curves.speed)]
    if not len(speed):
        return ""
    # The median, as compilation and the first steps would lower a mean; both ends show whether the speed was steady.
    rows = {
        "tokens/s, median": f"{np.median(speed):,.0f}",
        "tokens/s, lowest to highest": f"{speed.min():,.0f} to {speed.max():,.0f}",
    }
    mfu, memory = (_finite(curves.columns.get(column, np.empty(0))) for column in ("mfu", "memory_gib"))
    if len(mfu):
        rows["model FLOPs utilization (MFU), median"] = f"{np.median(mfu):.1%}"
    if len(memory):
        # The peak, unlike the others: it decides whether a larger batch would fit.
        rows["peak memory of rank 0, GiB"] = f"{memory.max():.2f}"
    return _key_value_table(rows)


def _finite(values: Numbers) -> Numbers:
    return values[np.isfinite(values)]


def _mini_epochs(curves: Curves) -> str:
    """Mean loss and learning rate of each mini-epoch, next to the published run's where the settings are the same."""
    if not curves.mini_epochs:
        return ""
    reference = published.MINI_EPOCHS if not published.differences(curves.settings) else ()
    head = ["mini-epoch", "mean loss", "learning rate", *["published loss"] * bool(reference)]
    rows = []
    for line in curves.mini_epochs:
        row = [str(line.number), f"{line.loss:.6f}", line.lr]
        if reference:  # which ends earlier than the run
            row.append(f"{reference[line.number][0]:.6f}" if line.number < len(reference) else "")
        rows.append(row)
    cells = "\n".join(
        "<tr>" + "".join(f'<td class="number">{_escape(cell)}</td>' for cell in row) + "</tr>" for row in rows
    )
    return "<table><tr>" + "".join(f'<th class="number">{name}</th>' for name in head) + f"</tr>\n{cells}</table>"


def _warnings(warnings: list[str]) -> str:
    lines = "<br>".join(map(_escape, warnings))
    return f'<p class="summary">Not everything could be read:<br>{lines}</p>' if warnings else ""


def _read_samples(path: Path, warnings: list[str]) -> list[dict[str, str]]:
    """The generated samples; [] where the run wrote none, or with a warning where they can't be read."""
    if not path.is_file():
        return []
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(sample[name], str) for sample in samples for name in ("prompt", "answer")):
            raise ValueError("a sample is no text")
        return samples
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        warnings.append(f"{path}: unreadable ({type(error).__name__}: {error})")
        return []


def _samples(samples: list[dict[str, str]]) -> str:
    return "\n".join(
        f'<pre>{_pictures(sample.get("media", []))}<span class="prompt">{_escape(sample["prompt"])}</span>'
        f'<span class="completion">{_escape(sample["answer"])}</span></pre>'
        for sample in samples
    )


def _pictures(media: Any) -> str:
    """The pictures of a prompt; of a sound its name."""
    items = [item for item in media if isinstance(item, str)] if isinstance(media, list) else []
    is_picture = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]+")
    return "".join(
        f'<img src="{item}" alt="picture">\n' if is_picture.fullmatch(item) else f"[{_escape(item)}]\n"
        for item in items
    )


def _reproduction(settings: dict[str, Any], run: dict[str, Any]) -> str:
    """The command, and what it needs besides."""
    # A log without a header has no settings, and a command without flags would be wrong.
    if not settings:
        return ""
    requirements = {
        "program": run.get("environment", {}).get("git commit", ""),
        "data": settings.get("data", ""),
        "initial weights": origin_of(settings, run),
    }
    return f"<pre>{_escape(command_of(settings, run))}</pre>\n{_key_value_table(requirements)}"


def _settings(settings: dict[str, Any]) -> str:
    """Every setting by topic, as train.py --help orders them; those that are no flag come last."""
    fields = {field.name: field.metadata["group"] for field in dataclasses.fields(RunConfig)}
    tables = []
    for group, title in GROUPS.items():
        rows = {f"--{name}": settings[name] for name in fields if fields[name] == group and name in settings}
        if rows:
            tables.append(f'<table><tr><th colspan="2">{_escape(title)}</th></tr>{_rows(rows)}</table>')
    # Sizes by formula, the global batch size, checksums: needed to compare two runs, but not given by anyone.
    derived = {name: value for name, value in settings.items() if name not in fields}
    if derived:
        tables.append(f'<table><tr><th colspan="2">derived</th></tr>{_rows(derived)}</table>')
    return f'<div class="columns">{"".join(tables)}</div>' if tables else ""


def _key_value_table(rows: dict[str, Any]) -> str:
    """A table of names and values, without those that are empty; "" where all are."""
    known = {name: value for name, value in rows.items() if value != ""}
    return f"<table>{_rows(known)}</table>" if known else ""


def _rows(rows: dict[str, Any]) -> str:
    return "\n".join(f"<tr><td>{_escape(name)}</td><td>{_escape(value)}</td></tr>" for name, value in rows.items())


def _escape(value: Any) -> str:
    # Everything that comes from a file goes through here: a sample or a path may well contain <script>.
    return html.escape(str(value))

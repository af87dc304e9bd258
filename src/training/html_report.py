"""report.html: a run on one page that needs nothing beside it, for someone who wasn't there.

python -m src.training.html_report RUN      writes it again
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from src.config import GROUPS, ModelConfig, RunConfig
from src.files import atomic_write
from src.run_folder import REPORT, RUN, SAMPLES
from src.run_log import Curves, read_curves
from src.training.figures import published
from src.training.plot import draw_run
from src.training.reporting.progress import duration

LINE_WIDTH = 96
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #fff; max-width: 68rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #d8dee6; }
p.short { margin-top: 0; color: #55606e; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; } td:first-child { overflow-wrap: normal; }
th { font-weight: 600; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr + tr td { border-top: 1px solid #eef1f5; }
.facts { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.facts div { background: #f3f6fa; border-radius: .5rem; padding: .6rem 1rem; min-width: 8rem; }
.facts b { display: block; font-size: 1.25rem; } .facts span { color: #55606e; font-size: .85rem; }
pre { background: #f3f6fa; border-radius: .5rem; padding: .8rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { color: #55606e; } .answer { color: #1f4e8c; }
.columns { columns: 2 26rem; } .columns table { break-inside: avoid; margin-bottom: 1rem; }
"""


def write_report(run: Path) -> Path:
    """Makes RUN/report.html from the files of the run; its path. ValueError when there are none."""
    curves = read_curves(run)
    remembered = json.loads((run / RUN).read_text(encoding="utf-8")) if (run / RUN).is_file() else {}
    samples = json.loads((run / SAMPLES).read_text(encoding="utf-8")) if (run / SAMPLES).is_file() else []
    sections = [
        ("", _headline(curves)),
        ("Curves", _svg(curves)),
        ("Speed", _speed(curves)),
        ("Mini-epochs", _mini_epochs(curves)),
        ("What it writes", _samples(samples)),
        ("How to do it again", _again(curves.settings, remembered)),
        ("Where it ran", _pairs(remembered.get("environment", {}))),
        ("Settings", _settings(curves.settings)),
    ]
    body = "\n".join(f"<h2>{title}</h2>\n{text}" if title else text for title, text in sections if text)
    with atomic_write(run / REPORT, "w") as file:
        file.write(
            f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
            f"<title>{_text(curves.name)}</title>\n<style>{STYLE}</style>\n<h1>{_text(curves.name)}</h1>\n{body}\n</html>\n"
        )
    return run / REPORT


def _headline(curves: Curves) -> str:
    s = curves.settings
    smoothed, width = curves.smoothed()
    facts = [(f"{smoothed[-1]:.4f}", f"training loss, mean of the last {width} steps")]
    if len(curves.val_loss):
        facts.append((f"{curves.val_loss[-1]:.4f}", "held-out loss at the end"))
        facts.append((f"{curves.val_loss.min():.4f}", "lowest held-out loss"))
    tokens = curves.tokens[-1]
    facts.append((f"{tokens / 1e6:,.1f} M" if tokens >= 1e6 else f"{tokens:,.0f}", "tokens"))
    if np.isfinite(curves.seconds[-1]):
        facts.append((duration(curves.seconds[-1]), "of training"))
    sizes = {"n_layer": "layers", "n_embd": "width", "vocab_size": "vocabulary"}
    what = ", ".join(["RWKV-7", *(f"{words} {s[name]:,}" for name, words in sizes.items() if name in s)]) + ". "
    data = f"Data: {s['data_file']}." if s.get("data_file") else ""
    boxes = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in facts)
    return f'<p class="short">{_text(what + data)}</p>\n<div class="facts">{boxes}</div>'


def _svg(curves: Curves) -> str:
    """The picture as an element of the page. Its ids and date are fixed, so that the same run gives the same page."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "rwkv", "svg.fonttype": "none"}):
        draw_run(curves).savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()[file.getvalue().index("<svg") :]


def _speed(curves: Curves) -> str:
    speed = curves.speed[np.isfinite(curves.speed)]
    if not len(speed):
        return ""
    rows = {
        "tokens/s, median": f"{np.median(speed):,.0f}",
        "tokens/s, lowest to highest": f"{speed.min():,.0f} to {speed.max():,.0f}",
    }
    for column, name, form in (
        ("mfu", "share of the devices' peak (MFU), median", "{:.1%}"),
        ("memory_gib", "memory of the first process, GiB", "{:.2f}"),
    ):
        values = curves.columns.get(column, np.empty(0))
        values = values[np.isfinite(values)]
        if len(values):
            rows[name] = form.format(np.median(values) if column == "mfu" else values.max())
    return _pairs(rows)


def _mini_epochs(curves: Curves) -> str:
    if not curves.mini_epochs:
        return ""
    reference = published.MINI_EPOCHS if not published.differences(curves.settings) else ()
    head = ["mini-epoch", "mean loss", "learning rate", *["published loss"] * bool(reference)]
    rows = []
    for line in curves.mini_epochs:
        known = [f"{reference[line.number][0]:.6f}" if line.number < len(reference) else ""] * bool(reference)
        rows.append([str(line.number), f"{line.loss:.6f}", line.lr, *known])
    cells = "\n".join("<tr>" + "".join(f'<td class="number">{cell}</td>' for cell in row) + "</tr>" for row in rows)
    return "<table><tr>" + "".join(f'<th class="number">{name}</th>' for name in head) + f"</tr>\n{cells}</table>"


def _samples(samples: list[dict[str, str]]) -> str:
    return "\n".join(
        f'<pre><span class="prompt">{_text(sample["prompt"])}</span><span class="answer">{_text(sample["answer"])}</span></pre>'
        for sample in samples
    )


def _again(settings: dict[str, Any], remembered: dict[str, Any]) -> str:
    if not settings:
        return ""
    start = remembered.get("origin", {})
    settings, weights = _with_first_seed(settings, start)
    words = ["python train.py"]
    for flag in dataclasses.fields(RunConfig):
        value = remembered.get("tokenizer", "") if flag.name == "tokenizer" else settings.get(flag.name, flag.default)
        if value not in (flag.default, _worked_out(settings).get(flag.name)) and flag.name not in (
            "restart",
            "plan",
            "epochs",
        ):
            words.append(f"--{flag.name} {_quoted(value)}")
    known = {
        "program": remembered.get("environment", {}).get("git commit", ""),
        "data": settings.get("data", ""),
        "initial weights": weights,
    }
    return f"<pre>{_text(_command(words))}</pre>\n{_pairs(known)}"


def _with_first_seed(settings: dict[str, Any], start: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The settings with the seed that gives the same run again, and where its initial weights come from.

    Without --random_seed each start draws one: the first one's made the weights. Conversations are then in the order of seed 0.
    """
    drawn = start.get("seed", settings.get("random_seed"))
    seed, weights = drawn, "drawn from the seed"
    if (order := re.search(r" order (\d+)$", settings.get("data", ""))) and settings.get("data_type") == "sft":
        seed = int(order[1])
        if seed != drawn:
            weights = f"drawn from seed {drawn}: by this command with --train_stage 1 --random_seed {drawn}; then this one with --train_stage 3"
    if start.get("sha256"):
        weights = f"{start['path']}, SHA-256 {start['sha256']}"
    return {**settings, "random_seed": seed} if "random_seed" in settings else settings, weights


def _command(words: list[str]) -> str:
    """In lines that a shell reads as one."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) < LINE_WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}")
    return " \\\n".join(lines)


def _worked_out(settings: dict[str, Any]) -> dict[str, int]:
    """The sizes that nobody needs to give."""
    given = {name: settings.get(name) for name in ("n_layer", "n_embd", "vocab_size", "head_size")}
    if not all(given.values()):
        return {}
    sizes = dataclasses.asdict(ModelConfig(**given))  # type: ignore[arg-type]
    return {name: size for name, size in sizes.items() if name not in given}


def _quoted(value: Any) -> str:
    text = str(value)
    return text if re.fullmatch(r"[\w./:@+-]+", text) else "'" + text.replace("'", "'\\''") + "'"


def _settings(settings: dict[str, Any]) -> str:
    fields = {flag.name: flag.metadata["group"] for flag in dataclasses.fields(RunConfig)}
    tables = []
    for group, title in GROUPS.items():
        rows = {f"--{name}": settings[name] for name in fields if fields[name] == group and name in settings}
        if rows:
            tables.append(f'<table><tr><th colspan="2">{_text(title)}</th></tr>{_rows(rows)}</table>')
    others = {name: value for name, value in settings.items() if name not in fields}
    if others:
        tables.append(f'<table><tr><th colspan="2">worked out</th></tr>{_rows(others)}</table>')
    return f'<div class="columns">{"".join(tables)}</div>' if tables else ""


def _pairs(rows: dict[str, Any]) -> str:
    known = {name: value for name, value in rows.items() if value != ""}
    return f"<table>{_rows(known)}</table>" if known else ""


def _rows(rows: dict[str, Any]) -> str:
    return "\n".join(f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in rows.items())


def _text(value: Any) -> str:
    return html.escape(str(value))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m src.training.html_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN")
    options = parser.parse_args(argv)
    try:
        print(f"wrote {write_report(Path(options.run))}")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

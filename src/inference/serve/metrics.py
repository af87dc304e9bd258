"""GET /metrics: the engines' statistics in Prometheus's text format."""

from __future__ import annotations

from dataclasses import fields

from src.inference.serve.registry import Registry
from src.inference.serve.request import Statistics

DESCRIPTIONS = {
    "requests": "Requests that were begun",
    "failures": "Requests that failed",
    "cancellations": "Requests whose client went away, or that were stopped",
    "prompt_tokens": "Tokens of prompts",
    "cached_tokens": "Tokens of prompts that were known and not computed again",
    "generated_tokens": "Tokens of answers",
    "decode_steps": "Decoding steps, each for all answers in the batch",
    "waiting": "Requests that wait for a place",
    "running": "Requests that are processed",
    "cached_states": "States that are kept",
    "cache_bytes": "Memory of the states that are kept",
}
GAUGES = ("waiting", "running", "cached_states", "cache_bytes")


def metrics_text(registry: Registry) -> str:
    """One family per field of Statistics, with the model as label."""
    statistics = {model.name: model.engine.statistics for model in registry.models}
    lines = []
    for column in fields(Statistics):
        kind = "gauge" if column.name in GAUGES else "counter"
        name = f"rwkv_{column.name}" + ("_total" if kind == "counter" else "")
        lines += [f"# HELP {name} {DESCRIPTIONS[column.name]}", f"# TYPE {name} {kind}"]
        for model, values in statistics.items():
            label = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
            lines.append(f'{name}{{model="{label}"}} {getattr(values, column.name)}')
    return "\n".join(lines) + "\n"

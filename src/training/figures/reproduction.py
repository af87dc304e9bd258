"""The command that repeats a run, from its recorded settings, and the origin of its initial weights."""

from __future__ import annotations

import dataclasses
import re
import shlex
from typing import Any

from src.config import ModelConfig, RunConfig

LINE_WIDTH = 96  # of the command, so that the report shows it without a scroll bar
# Not part of the run that is repeated: --restart and --plan are about one start, and --epochs is in my_exit_tokens
# already.
OMITTED_FLAGS = ("restart", "plan", "epochs")


def command_of(settings: dict[str, Any], run: dict[str, Any]) -> str:
    """The train.py command of a run, in lines that a shell reads as one.

    Only flags that differ from their default and from what ModelConfig derives are in it. `settings` are those of the
    last start, `run` is the content of run.json.
    """
    settings = {**settings, "random_seed": _seeds(settings, run)[0]} if "random_seed" in settings else settings
    derived = _derived_sizes(settings)
    flags = []
    for field in dataclasses.fields(RunConfig):
        # The settings have a checksum of the tokenizer, which identifies it; the flag takes the path.
        value = run.get("tokenizer", "") if field.name == "tokenizer" else settings.get(field.name, field.default)
        if field.name not in OMITTED_FLAGS and value not in (field.default, derived.get(field.name)):
            flags.append(f"--{field.name} {shlex.quote(str(value))}")
    return _wrap("python train.py", flags)


def origin_of(settings: dict[str, Any], run: dict[str, Any]) -> str:
    """Where the initial weights come from: a file with its SHA-256, or a seed; "" where unknown."""
    origin = run.get("origin", {})
    if origin.get("path"):  # drawn weights have a SHA-256 too, that of the rwkv-init.pth written from them
        return f"{origin['path']}, SHA-256 {origin['sha256']}"
    seed, weights_seed = _seeds(settings, run)
    if weights_seed is None:  # the log of another program
        return ""
    if seed == weights_seed:
        return "drawn from the seed"
    return (
        f"drawn from seed {weights_seed}: run the command with --train_stage 1 --random_seed {weights_seed} first, "
        "then with --train_stage 3 and its own seed"
    )


def _seeds(settings: dict[str, Any], run: dict[str, Any]) -> tuple[Any, Any]:
    """(value of --random_seed that repeats the run, seed of its initial weights).

    Without --random_seed every start draws a seed, and the first one made the weights: `settings` have that of the
    last start. The rows of conversations are then ordered by seed 0, so that continued runs agree, and the two seeds
    of a fine-tuning run differ.
    """
    weights_seed = run.get("origin", {}).get("seed", settings.get("random_seed"))
    if settings.get("data_type") != "sft":
        return weights_seed, weights_seed
    return settings.get("order_seed", _order_seed_of_old_run(settings, default=weights_seed)), weights_seed


def _order_seed_of_old_run(settings: dict[str, Any], default: Any) -> Any:
    # Runs before version 0.3 have it only at the end of the data's identity, "12 conversations 0123abcd order 7".
    match = re.search(r" order (\d+)$", settings.get("data", ""))
    return int(match[1]) if match else default


def _derived_sizes(settings: dict[str, Any]) -> dict[str, int]:
    """The sizes that ModelConfig derives from the required four: a flag with such a value is not needed."""
    required = {name: settings.get(name) for name in ("n_layer", "n_embd", "vocab_size", "head_size")}
    if not all(required.values()):
        return {}
    sizes = dataclasses.asdict(ModelConfig(**required))  # type: ignore[arg-type]
    return {name: size for name, size in sizes.items() if name not in required}


def _wrap(program: str, flags: list[str]) -> str:
    lines = [program]
    for flag in flags:
        # A flag and its value stay on one line, which is easier to edit.
        if len(lines[-1]) + len(flag) < LINE_WIDTH:
            lines[-1] += f" {flag}"
        else:
            lines.append(f"    {flag}")
    return " \\\n".join(lines)

"""The length of a run with --train_minutes: as many tokens as the time allows at the speed measured at its start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from src import run_folder
from src.config import RunConfig
from src.training.checkpoint.resume import starts_new_run
from src.training.console import log
from src.training.hardware.selection import Hardware
from src.training.model_setup import find_vocab_size
from src.training.preflight.speed import timed_steps

# Of the time, the share that is spent on steps; reading data, held-out losses, saving and figures take the rest.
STEPS_SHARE = 0.9


def timed_length(tokens_per_second: float, minutes: float, fewest: int, most: int) -> int:
    """Tokens of `minutes` at this speed, within [fewest, most]; `fewest` wins where the two contradict."""
    return max(fewest, min(most, round(STEPS_SHARE * tokens_per_second * minutes * 60)))


def with_timed_length(config: RunConfig, hardware: Hardware, tokens_per_epoch: int, proj_dir: Path) -> RunConfig:
    """`config` with the length that --train_minutes gives in place of --my_exit_tokens, its fewest.

    The cosine ends at that length, so it is decided once: a run that is resumed keeps the one that run.json records.
    """
    if not config.train_minutes:
        return config
    if not starts_new_run(config, proj_dir):
        before = run_folder.read_run(proj_dir).get("settings", {})
        if before.get("train_minutes") == config.train_minutes and before.get("my_exit_tokens"):
            return replace(config, my_exit_tokens=before["my_exit_tokens"])
    model = config.model_config(find_vocab_size(config, None))
    speed = timed_steps(config, replace(model, grad_cp=bool(config.grad_cp)), hardware)
    together = speed.tokens_per_second * hardware.world_size
    most = max(1, round(config.epochs * tokens_per_epoch))
    tokens = timed_length(together, config.train_minutes, config.my_exit_tokens, most)
    reason = {config.my_exit_tokens: ", the fewest (--my_exit_tokens)", most: ", all of the data"}.get(tokens, "")
    planned = f"{tokens:,} tokens for --train_minutes {config.train_minutes:g}{reason}"
    log(f"{together:,.0f} tokens/s, {speed.detail}: {planned}")
    return replace(config, my_exit_tokens=tokens)

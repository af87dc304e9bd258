"""A run in words: its settings with their real values, what is about to happen, what to do when it is over."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from pathlib import Path
from typing import Any

from src.config import ModelConfig, RunConfig
from src.files import sha256_of
from src.model import RWKV7
from src.model.cost import parameter_count
from src.ops.recurrence import describe_kernel
from src.run_folder import FINAL
from src.training.checkpoint.resume import Start
from src.training.data import Samples
from src.training.hardware.selection import Hardware
from src.training.schedule import RunLength


def settings_of(
    config: RunConfig,
    model_config: ModelConfig,
    hardware: Hardware,
    length: RunLength,
    samples: Samples,
    seed: int,
) -> dict[str, Any]:
    """Every setting with its real value: what the log's header, run.json and the saved states hold."""
    return {
        **dataclasses.asdict(config),
        **dataclasses.asdict(model_config),
        "grad_cp": config.grad_cp,
        "magic_prime": samples.prime,
        "my_exit_tokens": length.exit_tokens,
        "precision": hardware.precision,
        "accelerator": hardware.accelerator,
        "random_seed": seed,
        "global_batch": length.global_batch,
        "tokenizer": _tokenizer_identity(config.tokenizer),
        "data": samples.identity,
    }


def _tokenizer_identity(tokenizer: str) -> str:
    """The same for the same tokenizer, wherever its folder lies."""
    file = Path(tokenizer) / "tokenizer.json"
    return sha256_of(file)[:16] if tokenizer and file.is_file() else tokenizer


def summary(
    config: RunConfig,
    model: RWKV7,
    hardware: Hardware,
    samples: Samples,
    start: Start,
) -> str:
    """What is about to happen, a line for each thing."""
    length, step = start.length, start.position.step
    begins = "new weights" if start.weights is None else str(start.weights)
    if start.loaded is not None:
        saved = datetime.fromtimestamp(start.loaded.saved_at)
        begins = f"{start.loaded.folder}, saved {saved:%Y-%m-%d %H:%M:%S}: step {step:,}, {length.tokens(step):,} tokens, as if never stopped"
    elif step:
        begins += f", at step {step:,}, {length.tokens(step):,} tokens, with a fresh optimizer"
    rows = {
        "model": f"{model.config.title}, {parameter_count(model.config):,} parameters, vocabulary {model.config.vocab_size:,}",
        "data": samples.words,
        "run": f"{length.steps:,} steps of {length.global_batch} x {config.ctx_len} tokens, {length.exit_tokens:,} in all",
        "lr": f"{config.lr_init:g} to {config.lr_final:g}",
        "where": f"{hardware.device_in_words}, {hardware.in_words}, {hardware.precision}",
        "wkv7": describe_kernel(hardware.device_type, hardware.dtype, model.config.head_size, model.config.kernel),
        "starts from": begins,
        "folder": config.proj_dir,
    }
    return "\n".join(f"{name:>12}  {text}" for name, text in rows.items())


def words_for_complete(proj_dir: Path) -> str:
    """What to do with a run that has ended."""
    final = proj_dir / FINAL
    return (
        f"the run in {proj_dir} is complete: {final}\n"
        f'  use it:      python -m src.inference.generate {proj_dir} --prompt "..."\n'
        f"  go on:       a new folder that starts from it: --proj_dir NEW --train_stage 0 --load_model {final}\n"
        f"  start over:  --restart 1; what is there moves to {proj_dir}/previous-1/"
    )

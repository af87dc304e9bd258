"""What a folder remembers of its run in run.json: what the run began from, its settings, its held-out data, where it ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from src import run_folder
from src.config import RunConfig
from src.dataset.tokenizer import copy_tokenizer
from src.run_folder import BEST, TOKENIZER, VALIDATION
from src.training.checkpoint.resume import FIXED_SETTINGS, Start, compare_settings, find_vocab_size
from src.training.console import is_rank_zero, log
from src.training.data import Samples
from src.training.hardware.selection import Hardware
from src.training.reporting.environment import environment
from src.training.schedule import RunLength
from src.training.settings import settings_of


def remember(config: RunConfig, hardware: Hardware, proj_dir: Path, settings: dict[str, Any], start: Start) -> None:
    """Written at every start, before the first step; the tokenizer beside it. Raises OSError."""
    if not is_rank_zero():
        return
    remembered = run_folder.read_run(proj_dir)
    # at step 0 anew: a start that was cut before its first save may have drawn another seed
    if "origin" not in remembered or start.position.step == 0:
        origin = run_folder.origin_weights(proj_dir, config.train_stage, config.load_model)
        remembered["origin"] = {**run_folder.fingerprint(origin), "seed": settings["random_seed"]}
    if config.val_data_file:
        _begin_held_out(remembered, {name: settings[name] for name in ("val_data_file", "val_windows")}, proj_dir)
    remembered["settings"] = settings
    remembered["environment"] = environment(hardware)
    remembered["mini_epoch_samples"] = start.length.unit
    remembered["tokenizer"] = config.tokenizer or remembered.get("tokenizer", "")
    folder = Path(config.tokenizer)
    if (
        config.tokenizer not in ("", "world") and folder.is_dir()
    ):  # a model that is moved elsewhere still knows its words
        copy_tokenizer(folder, proj_dir / TOKENIZER)
    run_folder.write_run(proj_dir, remembered)


def _begin_held_out(remembered: dict[str, Any], now: dict[str, Any], proj_dir: Path) -> None:
    """val.csv holds losses on the same samples only: those of other ones are put aside, with the best weights by them, and run.json
    remembers whose they are."""
    before = remembered.get("held_out") or {name: remembered.get("settings", {}).get(name) for name in now}
    remembered["held_out"] = now
    if before != now and (aside := run_folder.archive_file(proj_dir / VALIDATION)):
        what = ", ".join(f"--{name} {before[name]}" for name in now if before[name] != now[name])
        best = run_folder.archive_file(proj_dir / BEST)
        weights = f", the best weights by them {best}" if best else ""
        log(
            f"note: the held-out losses so far are of {what}: they are now in {aside}{weights}; a new {VALIDATION} begins"
        )


def refuse_another_run(
    config: RunConfig, hardware: Hardware, proj_dir: Path, length: RunLength, samples: Samples
) -> None:
    """A complete run answers only for its own settings. ValueError where another model, data or order is asked for."""
    known = run_folder.read_run(proj_dir).get("settings", {})
    vocab_size = config.vocab_size or known.get("vocab_size") or find_vocab_size(config, None)
    now = settings_of(config, config.model_config(vocab_size), hardware, length, samples, known.get("random_seed", 0))
    compare_settings(known, {name: now[name] for name in FIXED_SETTINGS}, proj_dir)

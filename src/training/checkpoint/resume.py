"""What a run starts from: whose folder it is, where it continues, the model with its weights and vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from src import run_folder
from src.config import ModelConfig, RunConfig
from src.dataset.tokenizer import copy_tokenizer, load_tokenizer
from src.errors import UserError
from src.model import RWKV7
from src.model.weights import IDLE_IN_LAYER_0, Weights, config_from_weights, fit_weights, read_weights
from src.run_folder import BEST, FINAL, TOKENIZER
from src.training.checkpoint.storage import LoadedState, Position, newest_good, states
from src.training.console import log
from src.training.data import open_samples
from src.training.distributed.process_group import ProcessGroup
from src.training.distributed.sharded_init import Values, fresh_values
from src.training.hardware.selection import Hardware
from src.training.schedule import RunLength

# settings that can't change within a run without changing its meaning: another model, other data, another order
SIZES = ("n_layer", "n_embd", "head_size", "dim_ffn", "d_decay_lora", "d_aaa_lora", "d_mv_lora", "d_gate_lora")
FIXED_SETTINGS = (
    *(*SIZES, "vocab_size"),
    *("data_type", "data", "tokenizer", "ctx_len", "magic_prime", "sft_loss", "packing", "truncate"),
)
SPOKEN = {"data": "the data (--data_file; for sft its order, --random_seed, too)", "tokenizer": "the tokenizer"}
# settings that say how and where to compute, or are worked out, and need no word when they change
FREE_SETTINGS = (
    *("proj_dir", "train_stage", "load_model", "load_partial", "restart", "random_seed", "data_file"),
    *("devices", "num_nodes", "accelerator", "strategy", "ds_bucket_mb", "global_batch"),
    *("kernel", "compile", "grad_cp", "head_chunk"),
    *("epoch_begin", "epoch_count", "epochs", "save_minutes", "keep_resume", "time_limit", "val_every"),
    *("enable_progress_bar", "wandb", "logger"),
    *("plan", "check", "dry_run", "profile"),
)


@dataclass(frozen=True)
class Start:
    """What a start continues from: the full state `loaded`, else `weights` (None: draw new ones), at `position`."""

    position: Position
    length: RunLength
    weights: Path | None = None
    loaded: LoadedState | None = None

    @property
    def first_mini_epoch(self) -> int:
        return self.length.mini_epoch(self.position.step) if self.position.step else 0


def archive_other_run(config: RunConfig, proj_dir: Path) -> None:
    """Begin anew where that is meant: with --restart, or when the initial weights are other ones than the run in the folder
    started from (the swap that people do by hand). The earlier run is put aside, nothing is deleted."""
    _, reason = _starts_new_run(config, proj_dir)
    tokenizer = proj_dir / TOKENIZER
    names_its_copy = tokenizer.is_dir() and Path(config.tokenizer or "world").resolve() == tokenizer.resolve()
    if reason and (aside := run_folder.archive_run(proj_dir)):
        log(f"{reason}; the earlier run is now in {aside}")
        if names_its_copy:
            copy_tokenizer(aside / TOKENIZER, tokenizer)


def _starts_new_run(config: RunConfig, proj_dir: Path) -> tuple[Path | None, str]:
    """The weights that a run here starts from at step 0, and why a new run begins although there is one ('' when none does).

    Raises ValueError when the weights are not there, or belong to the run itself.
    """
    origin = run_folder.origin_weights(proj_dir, config.train_stage, config.load_model)
    going_on = run_folder.numbered_weights(proj_dir) or states(proj_dir) or (proj_dir / FINAL).exists()
    if origin is not None and not origin.is_file():
        if going_on and not config.restart:
            return None, ""  # the run goes on from its own files
        what = "a folder; name a weights file in it" if origin.is_dir() else "no such file"
        raise UserError(f"--load_model {origin}: {what}")
    inside = [*run_folder.numbered_weights(proj_dir).values(), proj_dir / FINAL, proj_dir / BEST]
    if config.load_model and origin is not None and any(path.exists() and path.samefile(origin) for path in inside):
        raise UserError(
            f"--load_model {origin}: belongs to the run in --proj_dir {proj_dir} itself. To go on with that run, leave the flag out; to "
            "start another one from these weights, give it a folder of its own (--proj_dir)"
        )
    if config.restart:
        return origin, "--restart: a new run begins (to continue it later, leave the flag out)"
    if not run_folder.is_swapped(proj_dir, origin):
        return origin, ""
    return origin, f"{origin} is not what the run in {proj_dir} started from: a new run begins"


def length_of_run(config: RunConfig, once: int, processes: int) -> RunLength:
    """Of a run from its beginning, on data of `once` positions."""
    global_batch = config.micro_bsz * config.accumulate_grad_batches * processes
    exit_tokens = config.my_exit_tokens or max(1, round(config.epochs * once))
    return RunLength.of(exit_tokens, config.ctx_len, global_batch, config.epoch_steps)


def peek_resume_point(config: RunConfig, proj_dir: Path, length: RunLength) -> Start:
    """Where a run would start, without moving a file. Errors as of `archive_other_run` and `find_resume_point`."""
    origin, reason = _starts_new_run(config, proj_dir)
    if reason:
        return Start(_renewed(length, 0), length, weights=origin)
    return find_resume_point(config, proj_dir, length, only_look=True)


def find_resume_point(config: RunConfig, proj_dir: Path, length: RunLength, only_look: bool = False) -> Start:
    """In this order: the newest whole state; the highest rwkv-N.pth; rwkv-init.pth or --load_model; new weights (stage 0).

    `length` is that of a run from its beginning with these settings. Raises ValueError when a stage that continues finds nothing,
    and when the weights were removed but a state is there (nobody can know what is meant).
    """
    loaded, complaints = newest_good(proj_dir, only_look)
    for complaint in complaints:
        log(f"WARNING: {complaint}")
    numbered = run_folder.numbered_weights(proj_dir)
    if loaded is not None:
        position = loaded.position
        if position.weights_written and not numbered:
            raise UserError(
                f"the weights rwkv-N.pth of the run in {proj_dir} were removed, but its full state at step {position.step} is there "
                "and would go on. To begin again from the initial weights, add --restart 1 (the state moves to previous-1/); to "
                "go on, put the newest rwkv-N.pth back"
            )
        return Start(position, _continued(length, position), loaded=loaded)
    if numbered:
        n, path = list(numbered.items())[-1]
        # in the batches, mini-epochs and length of the start that saved them, where that is known
        known = run_folder.read_run(proj_dir)
        before = known.get("settings", {})
        then = replace(
            length,
            exit_tokens=before.get("my_exit_tokens", length.exit_tokens),
            global_batch=before.get("global_batch", length.global_batch),
            unit=known.get("mini_epoch_samples", length.unit),
        )
        position = _renewed(then, then.step_after(n))
        return Start(position, _continued(length, position), weights=path)
    origin = run_folder.origin_weights(proj_dir, config.train_stage, config.load_model)
    if origin is None and config.train_stage >= 2:
        raise UserError(
            f"--train_stage {config.train_stage} continues what is in --proj_dir, but {proj_dir} holds no rwkv-init.pth and no "
            "rwkv-N.pth; write the initial weights first (--train_stage 1), or start from a file with --load_model"
        )
    step = length.step_after(config.epoch_begin - 1) if config.epoch_begin else 0
    if step >= length.steps:
        raise UserError(
            f"--epoch_begin {config.epoch_begin}: the run has only {length.mini_epoch(length.steps - 1) + 1} mini-epochs, so nothing would "
            "be trained; expected fewer, or a larger --my_exit_tokens"
        )
    return Start(_renewed(length, step), length, weights=origin)


def _renewed(length: RunLength, step: int) -> Position:
    """At `step` with a fresh optimizer."""
    samples = length.samples(step)
    return Position(step, samples, length.unit, restarted_at_sample=samples)


def _continued(length: RunLength, position: Position) -> RunLength:
    """The rest of a run with this length's batch; its mini-epochs stay what they were."""
    return RunLength(
        length.exit_tokens, length.ctx_len, length.global_batch, position.unit, position.step, position.samples
    )


def compare_settings(before: dict[str, Any], now: dict[str, Any], proj_dir: Path) -> None:
    """Say what changed since the last start. Raises ValueError when that would make it another run."""
    changed = {name: (before[name], now[name]) for name in now if name in before and before[name] != now[name]}
    fixed = [
        f"{SPOKEN.get(name, '--' + name)} was {old}, is {new}"
        for name, (old, new) in changed.items()
        if name in FIXED_SETTINGS
    ]
    if fixed:
        raise UserError(
            f"{'; '.join(fixed)}: that would be another run than the one in {proj_dir}. Give it a folder of its own (--proj_dir), "
            "with --load_model if it should start from these weights; or put the setting back"
        )
    for name, (old, new) in changed.items():
        if name == "epoch_steps":
            log(f"note: --epoch_steps {new}: this run's mini-epochs stay as they began, with {old}")
        elif name not in FREE_SETTINGS:
            log(f"note: --{name} was {old} at the last start, is {new} now")


def refuse_end_in_the_past(before: dict[str, Any], start: Start) -> None:
    """ValueError where a run that was to be longer by its settings `before` has passed its end of now."""
    length, planned = start.length, before.get("my_exit_tokens", 0)
    passed = start.position.samples * length.ctx_len
    if length.exit_tokens < min(passed, planned):
        raise UserError(
            f"--my_exit_tokens (or --epochs times the data) {length.exit_tokens}: the run is at {passed} tokens already, and was to have "
            f"{planned}; give at least the tokens that it is at, or take the weights that are saved"
        )


def build_model(
    config: RunConfig, hardware: Hardware, start: Start, process_group: ProcessGroup
) -> tuple[RWKV7, Callable[[], Values]]:
    """The model in the run's precision and the values to start from. Raises ValueError when a file doesn't fit.

    Rank 0's model holds them already; other ranks' numbers are left open, they come from rank 0 when the strategy is set up. A model
    that no process holds whole is on the meta device, and rank 0's values build it.
    """
    weights = None
    if start.weights is not None and process_group.rank == 0:
        weights = read_weights(start.weights)
    before = start.loaded.settings if start.loaded is not None else {}
    known = (
        0 if config.vocab_size else before.get("vocab_size", 0)
    )  # a state knows its vocabulary, whatever the data needs
    sizes = process_group.broadcast_from_rank_zero(
        lambda: config.model_config(known or find_vocab_size(config, weights))
    )
    _refuse_other_sizes(before, sizes)
    with torch.device("meta"):
        model = RWKV7(sizes)
    if process_group.rank == 0 and weights is not None:
        weights = fit_weights(weights, model, str(start.weights), partial=bool(config.load_partial))

    def values() -> Values:
        if start.loaded is not None:
            yield from _values_of_state(start.loaded)
        elif weights is None:
            yield from fresh_values(sizes)
        else:
            yield from ((name, tensor) for name, tensor in weights.items() if not tensor.is_meta)
            if any(tensor.is_meta for tensor in weights.values()):  # --load_partial: what the file lacks
                yield from ((name, tensor) for name, tensor in fresh_values(sizes) if weights[name].is_meta)

    if not hardware.model_in_parts:
        if process_group.rank == 0:
            # copied: a file is mapped into memory, and the run must not depend on it staying there
            placed = {name: tensor.to(hardware.dtype, copy=True) for name, tensor in values()}
            model.load_state_dict(placed, assign=True)
        else:
            model = model.to(hardware.dtype).to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in IDLE_IN_LAYER_0)
    return model, values


def _refuse_other_sizes(before: dict[str, Any], sizes: ModelConfig) -> None:
    now = {name: getattr(sizes, name) for name in (*SIZES, "vocab_size")}
    changed = [
        f"--{name} was {before[name]}, is {now[name]}" for name in now if before.get(name, now[name]) != now[name]
    ]
    if changed:
        raise UserError(
            f"{'; '.join(changed)}: the saved state is that of another model. Give the new one a folder of its own (--proj_dir), or "
            "put the setting back"
        )


def _values_of_state(loaded: LoadedState) -> Values:
    for shard in loaded.tensors():
        for key, tensor in shard.items():
            name, kind = key.rsplit("/", 1)
            if kind in ("master", "idle"):
                yield name, tensor


def find_vocab_size(config: RunConfig, weights: Weights | None) -> int:
    """--vocab_size, else the tokenizer's, else that of the weights, else what the data needs."""
    tokenizer = (
        load_tokenizer(config.tokenizer) if config.tokenizer else None
    )  # a mistake in it is found now, not when samples are shown
    if config.vocab_size:
        return config.vocab_size
    if tokenizer:
        return tokenizer.vocab_size
    if weights is not None:
        return config_from_weights(weights, source="the weights").vocab_size
    if not config.data_file:
        raise UserError("--vocab_size 0: can't be worked out without --tokenizer or --data_file; give one of the three")
    largest = open_samples(config).largest_id()
    log(f"note: --vocab_size {largest + 1}: the largest id in {config.data_file} is {largest}")
    return largest + 1

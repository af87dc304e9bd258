"""The settings of a run with their resolved values: what the log, run.json and saved states record, and what may change
within a run."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from pathlib import Path
from typing import Any

from src import run_folder
from src.adapt.adapter import adapter_parameter_count
from src.adapt.config import adapter_of
from src.config import ModelConfig, RunConfig, adapter_kind, settings_with, trained_parts
from src.dataset.tokenizer_files import copy_tokenizer
from src.errors import UserError
from src.files import sha256_of
from src.model.cost import parameter_count
from src.multimodal.config import media_of
from src.multimodal.files import CHANGED
from src.ops.recurrence import describe_kernel
from src.run_folder import FINAL, TOKENIZER, VALIDATION
from src.training.checkpoint.resume import ResumePoint
from src.training.console import log
from src.training.data import Samples
from src.training.distributed.ranks import launch_id
from src.training.hardware.selection import Hardware
from src.training.model_setup import find_vocab_size
from src.training.objectives.front_end import frozen_sha256, loaded_encoder_sha256
from src.training.reporting.environment import environment
from src.training.schedule import RunLength

# Flags declare in src/config/flags.py whether they may change within a run; these are derived settings, which no flag
# sets directly.
FIXED = {*settings_with("fixed"), "data", "base_sha256", "front_end_sha256", "encoder_sha256", "encoder_version"}
FREE = {*settings_with("free"), "global_batch", "order_seed"}
# the flags that derived settings come from, for messages
FLAGS = {
    "data": "data_file",
    "base_sha256": "load_model",
    "front_end_sha256": "load_projector",
    "encoder_version": "encoder",
    "encoder_sha256": "encoder",
}


def resolve_settings(
    config: RunConfig,
    sizes: ModelConfig,
    hardware: Hardware,
    length: RunLength,
    samples: Samples,
    seed: int,
    base_sha256: str = "",
) -> dict[str, Any]:
    """Every setting with its resolved value. `base_sha256`: of the weights that an adapter changes."""
    return {
        **config.as_settings(),
        **{name: value for name, value in dataclasses.asdict(sizes).items() if name != "blocks"},  # not by a flag
        "grad_cp": int(config.grad_cp),  # a field of both; recorded as 0 or 1, as the flag is given
        "magic_prime": samples.prime,
        "my_exit_tokens": length.exit_tokens,
        "precision": hardware.precision,
        "accelerator": hardware.accelerator,
        "random_seed": seed,
        "order_seed": samples.order_seed,
        "global_batch": length.global_batch,
        "tokenizer": _tokenizer_identity(config.tokenizer),
        "encoder": _encoder_identity(config.encoder),
        **({"encoder_version": f"of version {version}"} if (version := CHANGED.get(config.encoder)) else {}),
        "train_parts": ",".join(trained_parts(config)),
        "data": samples.identity,
        **({"base_sha256": base_sha256} if base_sha256 else {}),
        **({"front_end_sha256": front_end} if (front_end := frozen_sha256(config)) else {}),
        **({"encoder_sha256": encoder} if (encoder := loaded_encoder_sha256(config)) else {}),
    }


def _tokenizer_identity(tokenizer: str) -> str:
    """Equal for equal tokenizers, wherever their folders lie."""
    # by content, so that a run whose tokenizer folder was moved is still the same run
    file = Path(tokenizer) / "tokenizer.json"
    return sha256_of(file)[:16] if tokenizer and file.is_file() else tokenizer


def _encoder_identity(encoder: str) -> str:
    """Equal for equal encoders, wherever their folders lie."""
    file = Path(encoder.removeprefix("hf:")) / "config.json"
    return f"hf:{sha256_of(file)[:16]}" if encoder.startswith("hf:") and file.is_file() else encoder


# ---- what changed since the last start -------------------------------------------------------------------------------


def compare_settings(before: dict[str, Any], now: dict[str, Any], proj_dir: Path) -> None:
    """Log what changed since the last start. Raises UserError when that would make it another run."""
    before = {"encoder_version": "of an earlier version", **before}
    # any other setting that an earlier version did not record has not changed
    changed = {name: (before[name], now[name]) for name in now if name in before and before[name] != now[name]}
    if fixed := [name for name in changed if name in FIXED]:
        first, *others = fixed
        problem = f"was {changed[first][0]} in the run of {proj_dir}"
        problem += "".join(f", --{FLAGS.get(name, name)} was {changed[name][0]}" for name in others)
        if first == "data" and before.get("order_seed") != now.get("order_seed"):
            problem += f" (--random_seed {before.get('order_seed')} fixes the order of conversations)"
        raise UserError(
            problem,
            flag=FLAGS.get(first, first),
            given=changed[first][1],
            advice="restore the setting, or start another run (with --load_model from these weights) in a "
            "--proj_dir of its own",
        )
    for name, (old, new) in changed.items():
        if name == "epoch_steps":
            log(f"note: --epoch_steps {new}: the mini-epochs of this run stay as they began, with {old}")
        elif name not in FREE:
            log(f"note: --{name} was {old} at the last start, is {new} now")


def refuse_past_end(before: dict[str, Any], resume: ResumePoint) -> None:
    """Raises UserError when --my_exit_tokens is below what the run has already trained on, and was to be longer by its
    settings `before`."""
    length, planned = resume.length, before.get("my_exit_tokens", 0)
    passed = resume.position.samples * length.ctx_len
    # less than planned is no mistake as long as it isn't reached: a run may be cut short on purpose
    if length.exit_tokens < min(passed, planned):
        raise UserError(
            f"the run is at {passed} tokens already, and was to have {planned}",
            flag="my_exit_tokens",
            given=length.exit_tokens,
            expected=f"at least {passed} (or --epochs for as many), or use the weights that are saved",
        )


def refuse_other_settings(
    config: RunConfig, hardware: Hardware, proj_dir: Path, length: RunLength, samples: Samples
) -> None:
    """A complete run answers only for its own settings. UserError where another model, data or order is asked for."""
    before = run_folder.read_run(proj_dir).get("settings", {})
    # the recorded size first: the tokenizer of the run may be gone, and reading all data for its largest id takes
    # minutes
    vocab_size = config.vocab_size or before.get("vocab_size") or find_vocab_size(config, None)
    sizes = config.model_config(vocab_size)
    now = resolve_settings(config, sizes, hardware, length, samples, before.get("random_seed", 0))
    compare_settings(before, {name: now[name] for name in now if name in FIXED}, proj_dir)


# ---- what run.json records -------------------------------------------------------------------------------------------


def record_start(
    config: RunConfig, hardware: Hardware, proj_dir: Path, settings: dict[str, Any], resume: ResumePoint
) -> None:
    """Write run.json and copy the tokenizer; on rank 0 only, at every start, before the first step. Raises OSError."""
    run = run_folder.read_run(proj_dir)
    # at step 0 again: a start that was cut before its first save may have drawn another seed
    if "origin" not in run or resume.position.step == 0:
        origin = run_folder.origin_weights(proj_dir, config.train_stage, config.load_model)
        # a rwkv-init.pth of the run's own stays recorded as such until it is replaced by what this start draws
        is_drawn = origin is None and run_folder.has_drawn_init(proj_dir)
        fingerprint = run["origin"] if is_drawn else run_folder.fingerprint(origin)
        run["origin"] = {**fingerprint, "seed": settings["random_seed"]}
    if config.val_data_file:
        _record_held_out(run, {name: settings[name] for name in ("val_data_file", "val_windows")}, proj_dir)
    run["settings"] = settings
    run["launch"] = launch_id()  # a later attempt of this command must not carry out --restart again
    run["environment"] = environment(hardware)
    run["mini_epoch_samples"] = resume.length.mini_epoch_samples
    # chat and generation find it here; a start that leaves the flag out doesn't forget it
    run["tokenizer"] = config.tokenizer or run.get("tokenizer", "")
    folder = Path(config.tokenizer)
    if config.tokenizer not in ("", "world") and folder.is_dir():  # a model that is moved elsewhere keeps its tokenizer
        copy_tokenizer(folder, proj_dir / TOKENIZER)
    run_folder.write_run(proj_dir, run)


def _record_held_out(run: dict[str, Any], now: dict[str, Any], proj_dir: Path) -> None:
    """val.csv holds losses on one set of samples only: when it changes, val.csv and the best weights by it are
    archived."""
    before = run.get("held_out") or {name: run.get("settings", {}).get(name) for name in now}
    run["held_out"] = now
    if before != now and (archived := run_folder.archive_file(proj_dir / VALIDATION)):
        old = ", ".join(f"--{name} {before[name]}" for name in now if before[name] != now[name])
        best = next(filter(None, (run_folder.archive_file(proj_dir / n.best) for n in run_folder.ALL_RESULTS)), None)
        weights = f", the best weights by them {best}" if best else ""
        log(f"note: the held-out losses of {old} are archived as {archived}{weights}; a new {VALIDATION} begins")


# ---- summaries -------------------------------------------------------------------------------------------------------


def describe_start(resume: ResumePoint) -> str:
    """What a run starts or resumes from."""
    length, step = resume.length, resume.position.step
    reached = f"step {step:,}, {length.tokens(step):,} tokens"
    if resume.state is not None and resume.reader is not None:
        saved_at = datetime.fromtimestamp(resume.state.saved_at)
        return f"{resume.reader.folder}, saved {saved_at:%Y-%m-%d %H:%M:%S}: {reached}, full state"
    weights = "new weights" if resume.weights is None else str(resume.weights)
    return f"{weights}, at {reached}, with a fresh optimizer" if step else weights


def summary(config: RunConfig, sizes: ModelConfig, hardware: Hardware, samples: Samples, resume: ResumePoint) -> str:
    """What is about to be trained, a line each."""
    length = resume.length
    steps = f"{length.steps:,} steps of {length.global_batch} x {config.ctx_len} tokens"
    rows = {
        "model": f"{sizes.title}, {parameter_count(sizes):,} parameters, vocabulary {sizes.vocab_size:,}",
        **({"trains": describe_adapter(config, sizes)} if adapter_kind(config) else {}),
        **({"encoder": describe_encoder(config)} if config.encoder else {}),
        "data": samples.summary,
        "run": f"{steps}, {length.exit_tokens:,} in all",
        "lr": f"{config.lr_init:g} to {config.lr_final:g}",
        "device": f"{hardware.device_name}, {hardware.description}, {hardware.precision}",
        "wkv7": describe_kernel(hardware.device_type, hardware.dtype, sizes.head_size, sizes.kernel),
        "starts from": describe_start(resume),
        "folder": config.proj_dir,
    }
    return "\n".join(f"{name:>12}  {text}" for name, text in rows.items())


def describe_adapter(config: RunConfig, sizes: ModelConfig) -> str:
    """What is trained beside a frozen base, in a line."""
    adapter = adapter_of(config)
    assert adapter is not None
    count = f"{adapter_parameter_count(sizes, adapter):,} parameters"
    base = "frozen weights" if config.quant == "none" else f"frozen weights in {config.quant}"
    if adapter.kind == "state":
        return f"the initial state of each block, {count}, beside {base}"
    alpha = f", alpha {adapter.lora_alpha:g}" if adapter.kind in ("lora", "dora") else ""
    parts = "".join(f", {part}" for part in adapter.train)
    return f"{adapter.kind} of rank {adapter.r}{alpha} on {', '.join(adapter.targets)}{parts}: {count}, beside {base}"


def describe_encoder(config: RunConfig) -> str:
    """The front end of a run and what is trained, in a line."""
    media = media_of(config)
    assert media is not None
    tokens = f", {media.tokens} tokens each" if media.tokens else ""
    cached = ", from cached features" if config.cache_features else ""
    return (
        f"{config.encoder}, {media.spec.kind}s{tokens}, width {media.spec.width}{cached}; "
        f"projector {config.projector}; trained: {', '.join(trained_parts(config))}"
    )


def complete_message(proj_dir: Path, final: Path) -> str:
    """What to do with a run that is complete, whose last result is `final`."""
    merged = "" if final.name == FINAL else f"  merge:        python -m src.inference.export {proj_dir} MERGED.pth\n"
    more = final if not merged else "MERGED.pth"
    return (
        f"the run in {proj_dir} is complete: {final}\n"
        f'  generate:     python -m src.inference.generate {proj_dir} --prompt "..."\n{merged}'
        f"  train more:   a new folder that starts from it: --proj_dir NEW --train_stage 0 --load_model {more}\n"
        f"  start over:   --restart 1; the files of this run move to {proj_dir}/previous-1/"
    )

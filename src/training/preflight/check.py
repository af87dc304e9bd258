"""Will this run fit and work: `train.py --check` looks at everything, each start at what takes no time. Nothing is written."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from src import run_folder
from src.config import ModelConfig, RunConfig
from src.model import RWKV7
from src.model.weights import Weights, fit_weights, read_weights
from src.run_folder import FINAL
from src.training.checkpoint.resume import ResumePoint, length_of_run, peek_resume_point
from src.training.console import log
from src.training.data import Samples, peek_samples
from src.training.hardware.selection import Hardware, choose_hardware
from src.training.model_setup import find_vocab_size
from src.training.preflight import capacity, machine
from src.training.preflight.checklist import Checklist
from src.training.preflight.data_check import check_data, document_ends, look_at_held_out
from src.training.preflight.kernel import check_kernel, kernel_agreement
from src.training.preflight.out_of_memory import advice, estimate
from src.training.preflight.speed import expected_speed


def check(config: RunConfig, notes: list[str]) -> int:
    """`train.py --check`. Exit code 0 when nothing stands in the way, 1 with a list of what to do."""
    checks = Checklist()
    for note in notes:
        log(f"note: {note}")
    checks.take(machine.software())
    checks.take(machine.build_tools())
    checks.take(machine.cuda(config.accelerator != "cpu"))
    if config.wandb and importlib.util.find_spec("wandb") is None:
        checks.to_do.append(f"pip install wandb, or leave --wandb {config.wandb} out")
    hardware = checks.attempt("device", lambda: choose_hardware(config))
    if hardware is None:
        return checks.result()
    checks.found("device", f"{hardware.device_name}, {hardware.description}, {hardware.precision}")
    for note in hardware.notes:
        log(f"note: {note}")
    check_kernel(checks, config, hardware)
    looked = checks.attempt("data", lambda: peek_samples(config))
    weights = _weights(checks, config)
    vocab_size = (
        checks.attempt("vocabulary", lambda: find_vocab_size(config, weights)) if looked or config.vocab_size else None
    )
    if vocab_size is None:
        return checks.result()
    model = config.model_config(vocab_size)
    if looked:
        samples, share = looked
        checks.attempt("data", lambda: check_data(checks, config, samples, share, vocab_size))
    if config.val_data_file:
        checks.attempt("held-out", lambda: checks.found("held-out", look_at_held_out(config, vocab_size)))
    capacity.check_memory(checks, config, hardware, model)
    positions = config.my_exit_tokens or (looked and round(looked[0].tokens_per_epoch / looked[1]))
    if positions:
        about = (
            " (about: the conversations were only looked at)"
            if looked and looked[1] < 1 and not config.my_exit_tokens
            else ""
        )
        _check_run(checks, config, hardware, model, positions, about)
    return checks.result()


def warn_at_start(
    config: RunConfig, hardware: Hardware, model: ModelConfig, samples: Samples, resume: ResumePoint, proj_dir: Path
) -> None:
    """At every start: only what is quick, and only what is wrong is said."""
    findings = [
        machine.software(),
        machine.cuda(config.accelerator != "cpu"),
        kernel_agreement(config, hardware, model.head_size),
        document_ends(samples),
        capacity.disk(config, hardware, model, resume, proj_dir),
    ]
    wrong = [finding.to_do for finding in findings if finding.to_do]
    memory, free = estimate(config, model, hardware), machine.free_memory(hardware.accelerator, hardware.devices)
    if free is not None and memory.total > free:
        wrong.append(advice(config, model, hardware, free))
    for words in wrong:
        log(f"WARNING: {words}")


def _check_run(
    checks: Checklist,
    config: RunConfig,
    hardware: Hardware,
    model: ModelConfig,
    positions: int,
    about: str,
) -> None:
    proj_dir = Path(config.proj_dir)
    fresh = length_of_run(config, positions, hardware.world_size)
    resume = checks.attempt("folder", lambda: peek_resume_point(config, proj_dir, fresh))
    if resume is None:
        return
    there, _ = machine.free_disk(proj_dir)
    if not os.access(there, os.W_OK):
        checks.to_do.append(f"--proj_dir {proj_dir}: {there} can't be written; choose a folder of yours")
    length, step = resume.length, resume.position.step
    begins = resume.reader.folder if resume.reader else resume.weights or "new weights"
    checks.found("folder", f"{proj_dir}, starts from {begins}" + f" at step {step:,}" * (step > 0))
    if (proj_dir / FINAL).exists() and step >= length.steps:
        checks.found("", "the run in it is complete; --restart 1 begins again")
    if (file := resume.weights) is not None:
        checks.attempt("weights", lambda: _fit_weights(config, model, file))
    checks.take(capacity.disk(config, hardware, model, resume, proj_dir))
    left = length.exit_tokens - length.tokens(step)
    checks.found(
        "run",
        f"{length.exit_tokens:,} tokens{about} in {length.steps:,} steps of {length.tokens_per_step:,}, "
        f"{(count := length.mini_epoch(max(0, length.steps - 1)) + 1):,} mini-epoch{'s' * (count > 1)}"
        + f"; {length.steps - step:,} steps to come"
        * (step > 0),
    )
    speed = checks.attempt("time", lambda: expected_speed(checks, config, hardware, model))
    if speed is not None:
        checks.found(
            "time",
            f"{_duration(max(0, left) / speed.tokens_per_second)} at {speed.tokens_per_second:,.0f} tokens/s, {speed.detail}",
        )


def _weights(checks: Checklist, config: RunConfig) -> Weights | None:
    """The weights that the run begins from, where they are a file."""
    origin = run_folder.origin_weights(Path(config.proj_dir), config.train_stage, config.load_model)
    return checks.attempt("weights", lambda: read_weights(origin)) if origin is not None and origin.is_file() else None


def _fit_weights(config: RunConfig, model: ModelConfig, file: Path) -> None:
    with torch.device("meta"):
        like = RWKV7(model)
    fit_weights(read_weights(file), like, str(file), partial=bool(config.load_partial))


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"

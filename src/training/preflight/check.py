"""`train.py --check`: whether a run would work and fit. Every start repeats the quick part. Nothing is written."""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from pathlib import Path

from src import run_folder
from src.config import ModelConfig, RunConfig
from src.inference.load import holds_model, load_weights
from src.model.weights import Weights
from src.training.checkpoint.results import result_names
from src.training.checkpoint.resume import ResumePoint, length_of_run, peek_resume_point
from src.training.console import log
from src.training.data import Samples, peek_samples
from src.training.hardware import memory_limits
from src.training.hardware.selection import Hardware, choose_hardware
from src.training.model_setup import find_vocab_size, fit_to_run
from src.training.preflight import capacity, machine
from src.training.preflight.checklist import Checklist
from src.training.preflight.data_check import check_data, check_document_ends, check_held_out
from src.training.preflight.kernel import check_kernel, kernel_agreement
from src.training.preflight.out_of_memory import estimate, oom_message
from src.training.preflight.piece_memory import describe_pieces
from src.training.preflight.plan import BYTES
from src.training.preflight.speed import expected_speed
from src.training.preflight.timed_length import with_timed_length


def check(config: RunConfig, notes: list[str]) -> int:
    """Print every item and the list of problems with their solutions. Returns exit code 0 without problems, else 1."""
    # Ordered by dependence: software, device, kernel, data, model, run. A part is skipped when one that it needs
    # failed.
    checks = Checklist()
    for note in notes:
        log(f"note: {note}")
    checks.add(machine.software())
    checks.add(machine.build_tools())
    checks.add(machine.cuda(config.accelerator in ("auto", "gpu")))
    if config.wandb and importlib.util.find_spec("wandb") is None:
        checks.problems.append(f"--wandb {config.wandb}: pip install wandb, or leave the flag out")
    hardware = checks.attempt("device", lambda: choose_hardware(config))
    if hardware is None:
        return checks.conclude()  # everything below depends on the device
    checks.report("device", f"{hardware.device_name}, {hardware.description}, {hardware.precision}")
    for note in hardware.notes:
        log(f"note: {note}")
    check_kernel(checks, config, hardware)
    samples, share = checks.attempt("data", lambda: peek_samples(config)) or (None, 1.0)
    # read now, since the vocabulary's size may follow from them
    weights = _initial_weights(checks, config)
    vocab_size = None
    # without data and flag the size is unknown, and the data are a problem on the list already
    if samples is not None or config.vocab_size:
        vocab_size = checks.attempt("vocabulary", lambda: find_vocab_size(config, weights))
    if vocab_size is None:
        return checks.conclude()
    model = config.model_config(vocab_size)
    if samples is not None:
        checks.attempt("data", lambda: check_data(checks, config, samples, share, vocab_size))
    if config.val_data_file:
        checks.attempt("held-out", lambda: checks.report("held-out", check_held_out(config, vocab_size)))
    capacity.check_memory(checks, config, hardware, model)
    for line in describe_pieces(config, model, BYTES[hardware.precision]):
        log(line)
    prime = samples.prime if samples is not None else config.magic_prime
    if samples is not None:
        decide = partial(with_timed_length, config, hardware, samples.tokens_per_epoch, Path(config.proj_dir))
        config = checks.attempt("run", decide) or config
    if config.my_exit_tokens:
        _check_run(checks, config, hardware, model, config.my_exit_tokens, prime)
    elif samples is not None:
        # conversations are only read in part here: the rest is assumed to be alike
        estimated = " (estimated from the conversations read)" if share < 1 else ""
        _check_run(checks, config, hardware, model, round(samples.tokens_per_epoch / share), prime, estimated)
    return checks.conclude()


def warn_at_start(
    config: RunConfig, hardware: Hardware, model: ModelConfig, samples: Samples, resume: ResumePoint, proj_dir: Path
) -> None:
    """The quick checks (well under a second), at every start of a run. Prints only problems, as warnings."""
    findings = [
        machine.software(),
        machine.cuda(config.accelerator in ("auto", "gpu")),
        kernel_agreement(config, hardware, model.head_size),
        check_document_ends(samples),
        capacity.check_disk(config, hardware, model, resume, proj_dir, samples.prime),
    ]
    problems = [finding.problem for finding in findings if finding.problem]
    memory, free = estimate(config, model, hardware), memory_limits.free_memory(hardware.accelerator, hardware.devices)
    # All of the free memory here, not the safe share: a warning at every start of a run that works would be ignored.
    if free is not None and memory.total > free:
        problems.append(oom_message(config, model, hardware, free))
    for problem in problems:
        log(f"WARNING: {problem}")


def _check_run(
    checks: Checklist,
    config: RunConfig,
    hardware: Hardware,
    model: ModelConfig,
    tokens_per_epoch: int,
    prime: int,
    estimated: str = "",
) -> None:
    """Check the folder, the disk and the time of the run; `estimated` qualifies its number of tokens."""
    proj_dir = Path(config.proj_dir)
    full_length = length_of_run(config, tokens_per_epoch, hardware.data_parallel_size)
    resume = checks.attempt("folder", lambda: peek_resume_point(config, proj_dir, full_length))
    if resume is None:
        return
    # The folder may not exist yet, so the nearest one above is asked; creating it would write.
    existing, _ = machine.free_disk(proj_dir)
    if not os.access(existing, os.W_OK):
        checks.problems.append(f"--proj_dir {proj_dir}: no permission to write in {existing}; choose another folder")
    length, step = resume.length, resume.position.step
    origin = resume.reader.folder if resume.reader else resume.weights or "new weights"
    checks.report("folder", f"{proj_dir}, starts from {origin}" + f" at step {step:,}" * (step > 0))
    if (proj_dir / result_names(config).final).exists() and step >= length.steps:
        checks.report("", "the run in it is complete; --restart 1 begins a new one")
    # None where a full state is resumed: its checksums are verified when it is loaded
    if (file := resume.weights) is not None:
        checks.attempt("weights", lambda: _fit_weights(config, model, file))
    checks.add(capacity.check_disk(config, hardware, model, resume, proj_dir, prime))
    mini_epochs = length.mini_epoch(max(0, length.steps - 1)) + 1
    remaining = f"; {length.steps - step:,} steps remain" if step > 0 else ""
    checks.report(
        "run",
        f"{length.exit_tokens:,} tokens{estimated} in {length.steps:,} step{'s' * (length.steps > 1)} of "
        f"{length.tokens_per_step:,}, {mini_epochs:,} mini-epoch{'s' * (mini_epochs > 1)}{remaining}",
    )
    speed = checks.attempt("time", lambda: expected_speed(checks, config, hardware, model))
    if speed is not None:
        seconds = max(0, length.exit_tokens - length.tokens(step)) / speed.tokens_per_second
        checks.report("time", f"{_duration(seconds)} at {speed.tokens_per_second:,.0f} tokens/s, {speed.detail}")


def _initial_weights(checks: Checklist, config: RunConfig) -> Weights | None:
    """The weights that the run begins with at step 0, where they are a file."""
    origin = run_folder.origin_weights(Path(config.proj_dir), config.train_stage, config.load_model)
    # a missing file is reported by `peek_resume_point`, which knows whether it is needed
    if origin is None or not holds_model(origin):
        return None
    return checks.attempt("weights", lambda: load_weights(origin))


def _fit_weights(config: RunConfig, model: ModelConfig, file: Path) -> None:
    fit_to_run(load_weights(file), config, model, str(file))


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"

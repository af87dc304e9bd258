"""A training run in its folder: where it starts or continues, its settings, the fit, what is reported at its end."""

from __future__ import annotations

import math
import secrets
from functools import partial
from pathlib import Path
from typing import Any

from src import run_folder
from src.config import ModelConfig, RunConfig, keeps_base
from src.dataset.binidx import file_prefix
from src.dataset.tokenizer import load_tokenizer
from src.ops.recurrence import describe_kernel
from src.run_folder import FIGURE, LOG, METRICS, REPORT, VALIDATION, ResultNames, RunLock
from src.run_log import read_columns
from src.training.checkpoint.manifest import DamagedStateError
from src.training.checkpoint.results import result_names, results_of
from src.training.checkpoint.resume import (
    ResumePoint,
    archive_damaged_state,
    archive_other_run,
    find_resume_point,
    length_of_run,
    peek_resume_point,
    starts_new_run,
)
from src.training.console import is_rank_zero, log, warn_on_error
from src.training.data import HeldOut, Samples, SftSamples, open_samples
from src.training.distributed.process_group import ProcessGroup
from src.training.figures.loss_figure import write_loss_figure
from src.training.figures.report_page import write_report
from src.training.hardware.selection import Hardware
from src.training.model_setup import check_base, check_tokenizer, resolve_base, resolve_model_config
from src.training.objectives.front_end import cache_features
from src.training.preflight.check import warn_at_start
from src.training.preflight.out_of_memory import with_oom_advice
from src.training.preflight.timed_length import with_timed_length
from src.training.rollback import fit_with_rollback
from src.training.settings import (
    compare_settings,
    complete_message,
    record_start,
    refuse_other_settings,
    refuse_past_end,
    resolve_settings,
    summary,
)
from src.training.trainer import FitResult, RunContext


def train(
    config: RunConfig,
    hardware: Hardware,
    proj_dir: Path,
    lock: RunLock,
    process_group: ProcessGroup,
    ends_at: float,
) -> int:
    """Start the run of `proj_dir` or continue it, on every rank, until `ends_at` (of `time.monotonic`) at most. Returns
    the exit code, 0 also where the run was complete already. Raises UserError where the settings or files don't fit the
    run that is there."""
    on_rank_zero = process_group.broadcast_from_rank_zero
    samples, held_out = _open_data(config)
    cache_features(samples, held_out, hardware, process_group.environment.local_rank())
    config = on_rank_zero(partial(with_timed_length, config, hardware, samples.tokens_per_epoch, proj_dir))
    process_group.refuse_other_values({"training data": samples.identity}, flags=False)
    length = length_of_run(config, samples.tokens_per_epoch, hardware.data_parallel_size)
    final = proj_dir / result_names(config).final
    if config.restart or not final.exists():
        # for its errors: an unavailable kernel is reported before files are moved
        describe_kernel(hardware.device_type, hardware.dtype, config.head_size, config.kernel)
    if on_rank_zero(lambda: starts_new_run(config, proj_dir)):
        # what is wrong with the new run's weights is found before the earlier run is archived
        new = on_rank_zero(lambda: peek_resume_point(config, proj_dir, length))
        _check_ids(samples, held_out, resolve_model_config(config, new, process_group))
        on_rank_zero(lock.check)  # opening the data may have taken a while
        on_rank_zero(lambda: archive_other_run(config, proj_dir))
    if on_rank_zero(final.exists):
        on_rank_zero(lambda: refuse_other_settings(config, hardware, proj_dir, length, samples))
        on_rank_zero(lambda: _refuse_other_base(config, proj_dir))
        log(complete_message(proj_dir, final))
        return 0
    seed = on_rank_zero(lambda: draw_seed(config))  # once: it is among the settings that all ranks have
    recorded = run_folder.read_run(proj_dir)
    while True:
        resume = on_rank_zero(lambda: find_resume_point(config, proj_dir, length))
        sizes = resolve_model_config(config, resume, process_group)
        _check_ids(samples, held_out, sizes)
        base = resolve_base(config, resume, process_group)
        settings = resolve_settings(config, sizes, hardware, length, samples, seed, base)
        log(summary(config, sizes, hardware, samples, resume))
        on_rank_zero(lock.check)
        on_rank_zero(partial(_record_start, config, hardware, proj_dir, settings, resume))
        if is_rank_zero():
            warn_at_start(config, hardware, sizes, samples, resume, proj_dir)
        results = results_of(config, resume.weights, base, lock.check, hardware.dtype)
        context = RunContext(
            config, sizes, hardware, proj_dir, samples, held_out, settings, process_group, ends_at, results, lock.check
        )
        try:
            with with_oom_advice(config, sizes, hardware, process_group):
                result = fit_with_rollback(context, resume)
            break
        except DamagedStateError as error:
            # The state's tensors turned out to be damaged while they were loaded. The state before may be of a start
            # with other settings, and numbered weights are placed by what run.json said before this start.
            on_rank_zero(partial(_archive_damaged, proj_dir, error, recorded))
    if is_rank_zero():
        lock.check()
        _report_end(config, proj_dir, results.names, result, resume.length.steps)
    return result.exit_code


def _refuse_other_base(config: RunConfig, proj_dir: Path) -> None:
    """Of a complete run: its adapter is of no use beside other weights."""
    base = run_folder.origin_weights(proj_dir, config.train_stage, config.load_model)
    if keeps_base(config) and base is not None:
        check_base(base, run_folder.read_run(proj_dir).get("settings", {}))


def _check_ids(samples: Samples, held_out: HeldOut | None, sizes: ModelConfig) -> None:
    samples.check_ids(sizes.vocab_size)
    if held_out:
        held_out.check_ids(sizes.vocab_size)


def _record_start(
    config: RunConfig, hardware: Hardware, proj_dir: Path, settings: dict[str, Any], resume: ResumePoint
) -> None:
    """Refuse settings that would make this another run, then write run.json: before the first step, so that a run that
    is killed at once is recognised as the same run by the next start."""
    if resume.position.step:
        # a state knows the settings of the start that saved it; numbered weights only have run.json
        before = resume.state.settings if resume.state else run_folder.read_run(proj_dir).get("settings", {})
        compare_settings(before, settings, proj_dir)
        refuse_past_end(before, resume)
    record_start(config, hardware, proj_dir, settings, resume)


def _archive_damaged(proj_dir: Path, error: DamagedStateError, recorded: dict[str, Any]) -> None:
    assert error.folder is not None
    archive_damaged_state(error.folder, error)
    if recorded:
        run_folder.write_run(proj_dir, recorded)


def _open_data(config: RunConfig) -> tuple[Samples, HeldOut | None]:
    if config.data_type == "sft" and config.vocab_size:
        # Before the conversations are tokenized, which takes minutes; `find_vocab_size` checks all other runs.
        check_tokenizer(load_tokenizer(config.tokenizer), config.vocab_size)
    samples = open_samples(config)
    if isinstance(samples, SftSamples) and (warning := samples.unusable_warning):
        log(warning)  # at every start, not only at the one that tokenised the file
    if config.data_type == "sft" and config.magic_prime:
        log("note: --magic_prime has no meaning for --data_type sft, whose order is a shuffle for each epoch")
    for warning in samples.warnings:
        log(f"WARNING: {warning}")
    if not config.val_data_file:
        return samples, None
    held_out = HeldOut(config)
    for warning in held_out.warnings:
        log(f"WARNING: {warning}")
    if file_prefix(config.val_data_file).resolve() == file_prefix(config.data_file).resolve():
        log("WARNING: --val_data_file is the training data itself: its loss says nothing about other text")
    return samples, held_out


def _report_end(config: RunConfig, proj_dir: Path, names: ResultNames, result: FitResult, last_step: int) -> None:
    figures = []
    if read_columns(proj_dir / METRICS):  # a run that was stopped in its first step has nothing to draw
        with warn_on_error(FIGURE):
            figures.append(write_loss_figure(proj_dir, proj_dir / FIGURE))
        with warn_on_error(REPORT):
            figures.append(write_report(proj_dir))
    if result.stopped:
        log(f"stopped: {result.stopped}; the state is saved, {how_to_continue(config)} from there")
        return
    log(f"done: {', '.join(map(str, (proj_dir / names.final, proj_dir / LOG, *figures)))}")
    if config.val_data_file and (rows := read_columns(proj_dir / VALIDATION)):
        log(_describe_held_out(rows, proj_dir / names.best, config.val_data_file, last_step))


def _describe_held_out(rows: dict[str, list[float]], best_weights: Path, data: str, last_step: int) -> str:
    steps, losses, counted = rows["steps"], rows["loss"], rows["counted"][-1]
    parts = [f"held-out loss {losses[-1]:.4f}"]
    if steps[-1] != last_step:
        parts[0] += f" after step {steps[-1]:.0f} (stopped before the last measurement)"
    parts[0] += f" over {counted:,.0f} tokens of {data}"
    if steps[0] == 0:
        parts.append(f"before the run {losses[0]:.4f}")
    best = min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
    if math.isfinite(losses[best]):
        parts.append(f"lowest {losses[best]:.4f} after step {steps[best]:.0f}, kept as {best_weights}")
    return "; ".join(parts)


def draw_seed(config: RunConfig) -> int:
    return config.random_seed if config.random_seed >= 0 else secrets.randbelow(2**31)


def how_to_continue(config: RunConfig) -> str:
    return f"the same command{', without --restart,' if config.restart else ''} continues"

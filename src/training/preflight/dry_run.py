"""`train.py --dry_run`: builds everything as for the run, takes two real steps, and writes nothing."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytorch_lightning as pl

from src.config import RunConfig
from src.training.checkpoint.manifest import DamagedStateError
from src.training.checkpoint.results import Results, result_names
from src.training.checkpoint.resume import length_of_run, peek_resume_point
from src.training.console import log
from src.training.control import RunControl
from src.training.data import peek_samples
from src.training.distributed.process_group import ProcessGroup
from src.training.hardware.selection import Hardware
from src.training.model_setup import build_model, resolve_model_config
from src.training.preflight.data_check import check_held_out
from src.training.preflight.out_of_memory import with_oom_advice
from src.training.reporting.non_finite import NonFiniteMonitor
from src.training.reporting.reporter import Reporter
from src.training.reporting.sink import Sink, StepReport
from src.training.settings import complete_message, summary
from src.training.trainer import (
    RunContext,
    SetLearningRate,
    build_module,
    dropout_callbacks,
    learning_rate_schedule,
    restore_callbacks,
    run_trainer,
)

# The first step allocates the optimizer's moments, so only the second one shows the peak of memory.
STEPS = 2


class CollectReports(Sink):
    """Keeps the report of each step."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []

    def step(self, report: StepReport) -> None:
        self.reports.append(report)


def dry_run(config: RunConfig, hardware: Hardware, proj_dir: Path, process_group: ProcessGroup) -> int:
    """Take two steps from where the run would resume. Returns exit code 0 when a loss and its gradient were finite,
    else 1.

    Raises what the run itself would raise. Every rank takes part.
    """
    # `peek`, here and below: nothing may be written or moved, not even the token cache or a damaged state
    samples, _ = peek_samples(config)
    length = length_of_run(config, samples.tokens_per_epoch, hardware.data_parallel_size)
    resume = process_group.broadcast_from_rank_zero(lambda: peek_resume_point(config, proj_dir, length))
    length, position = resume.length, resume.position
    if position.step >= length.steps:
        log(complete_message(proj_dir, proj_dir / result_names(config).final))
        return 0
    if config.random_seed >= 0:
        pl.seed_everything(config.random_seed, verbose=False)
    sizes = resolve_model_config(config, resume, process_group)
    samples.check_ids(sizes.vocab_size)
    if config.val_data_file:
        check_held_out(config, sizes.vocab_size)
    log(summary(config, sizes, hardware, samples, resume))
    steps = min(STEPS, length.steps - position.step)
    control = RunControl(process_group, position.step)
    collected = CollectReports()
    non_finite = NonFiniteMonitor(control, STEPS, scale_loss=hardware.precision == "fp16")
    # Of the run's callbacks (trainer.py) those that decide what a step computes, in the same order, and none that
    # writes.
    callbacks = [
        control,
        *restore_callbacks(resume),
        SetLearningRate(control, learning_rate_schedule(config, resume)),
        *dropout_callbacks(config, process_group, control),
        Reporter(control, length, [collected, non_finite], []),
    ]
    # A temporary folder, since Lightning may write into its root folder.
    with with_oom_advice(config, sizes, hardware, process_group), tempfile.TemporaryDirectory() as folder:
        context = RunContext(
            config, sizes, hardware, Path(folder), samples, None, {}, process_group, math.inf, Results()
        )
        model, values = build_model(config, sizes, hardware, resume)
        try:
            run_trainer(context, resume, steps, callbacks, build_module(context, model, values))
        except DamagedStateError as error:
            assert resume.reader is not None
            log(f"the saved state {resume.reader.folder} is damaged: {error}; a run would use the one before")
            return 1
    for report in collected.reports:
        log(
            f"step {report.step + 1}: loss {report.loss:.4f}, gradient norm {report.grad_norm:.4g}, "
            f"lr {report.lr:.3g}, {report.tokens_per_second:,.0f} tokens/s so far"
        )
    # One skipped step of two is no failure: the run would skip it too and continue.
    if non_finite.skipped == len(collected.reports):
        log("no step had a finite loss and gradient; check the weights (--load_model), or try --precision fp32")
        return 1
    log(f"OK: {steps} of {length.steps:,} steps taken, nothing was kept; the same command without --dry_run trains")
    return 0

"""`train.py --dry_run`: everything is built as for the run, two real steps are taken, nothing is kept."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytorch_lightning as pl

from src.config import RunConfig
from src.training.checkpoint.callbacks import NonFiniteMonitor, RestoreState, SetLearningRate
from src.training.checkpoint.resume import build_model, length_of_run, peek_resume_point
from src.training.console import log
from src.training.data import peek_samples
from src.training.distributed.process_group import ProcessGroup
from src.training.hardware.selection import Hardware
from src.training.preflight.data_check import look_at_held_out
from src.training.preflight.out_of_memory import with_oom_advice
from src.training.reporting.reporter import Reporter
from src.training.reporting.sink import Sink, StepReport
from src.training.settings import summary, words_for_complete
from src.training.trainer import module_for, run_trainer, schedule

STEPS = 2


class Remember(Sink):
    """Keeps the reports of the steps."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []

    def step(self, report: StepReport) -> None:
        self.reports.append(report)


def dry_run(config: RunConfig, hardware: Hardware, proj_dir: Path, process_group: ProcessGroup) -> int:
    """Two steps from where the run would start. Exit code 0 when they gave finite numbers, 1 otherwise; errors as in the run itself."""
    samples, _ = peek_samples(config)
    length = length_of_run(config, samples.once, hardware.world_size)
    start = process_group.broadcast_from_rank_zero(lambda: peek_resume_point(config, proj_dir, length))
    length, position = start.length, start.position
    if position.step >= length.steps:
        log(words_for_complete(proj_dir))
        return 0
    if config.random_seed >= 0:
        pl.seed_everything(config.random_seed, verbose=False)
    model, values = build_model(config, hardware, start, process_group)
    samples.check_ids(model.config.vocab_size)
    if config.val_data_file:
        look_at_held_out(config, model.config.vocab_size)
    log(summary(config, model, hardware, samples, start))
    steps = min(STEPS, length.steps - position.step)
    seen, bad_steps = Remember(), NonFiniteMonitor(STEPS, scale_loss=hardware.precision == "fp16")
    reporter = Reporter(length, position.step, [seen, bad_steps], [], {})
    callbacks: list[pl.Callback] = [SetLearningRate(schedule(config, start), position.step), reporter]
    if start.loaded is not None:
        callbacks.append(RestoreState(start.loaded))
    with with_oom_advice(config, model.config, hardware, process_group), tempfile.TemporaryDirectory() as nowhere:
        module = module_for(config, hardware, samples, model, values, start, steps)
        run_trainer(config, hardware, Path(nowhere), process_group, steps, callbacks, module)
    for report in seen.reports:
        log(
            f"step {report.step + 1}: loss {report.loss:.4f}, gradient norm {report.grad_norm:.4g}, lr {report.lr:.3g}, "
            f"{report.tokens_per_second:,.0f} tokens/s so far"
        )
    if bad_steps.total == len(seen.reports):
        log(
            "not OK: no step gave a finite loss and gradient; look at the weights (--load_model), or try --precision fp32"
        )
        return 1
    log(f"OK: {steps} of {length.steps:,} steps taken, nothing was kept; the same command without --dry_run trains")
    return 0

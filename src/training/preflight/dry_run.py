"""`train.py --dry_run`: everything is built as for the run, two real steps are taken, nothing is kept."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytorch_lightning as pl

from src.config import RunConfig
from src.training.callbacks import RestoreState, SetLearningRate, WatchBadSteps
from src.training.data import look_at_samples
from src.training.describe import summary, words_for_complete
from src.training.fit import module_for, schedule, take_steps
from src.training.preflight.data import look_at_held_out
from src.training.preflight.out_of_memory import explained
from src.training.processes import Company
from src.training.reporting.reporter import Reporter
from src.training.reporting.sink import Sink, StepReport
from src.training.say import say
from src.training.start import build_model, length_of_run, look_at_start
from src.training.strategy import Hardware

STEPS = 2


class Remember(Sink):
    """Keeps the reports of the steps."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []

    def step(self, report: StepReport) -> None:
        self.reports.append(report)


def dry_run(config: RunConfig, hardware: Hardware, proj_dir: Path, company: Company) -> int:
    """Two steps from where the run would start. Exit code 0 when they gave finite numbers, 1 otherwise; errors as in the run itself."""
    samples, _ = look_at_samples(config)
    length = length_of_run(config, samples.once, hardware.world_size)
    start = company.decide(lambda: look_at_start(config, proj_dir, length))
    length, position = start.length, start.position
    if position.step >= length.steps:
        say(words_for_complete(proj_dir))
        return 0
    if config.random_seed >= 0:
        pl.seed_everything(config.random_seed, verbose=False)
    model, values = build_model(config, hardware, start, company)
    samples.check_ids(model.config.vocab_size)
    if config.val_data_file:
        look_at_held_out(config, model.config.vocab_size)
    say(summary(config, model, hardware, samples, start))
    steps = min(STEPS, length.steps - position.step)
    seen, bad_steps = Remember(), WatchBadSteps(STEPS, scale_loss=hardware.precision == "fp16")
    reporter = Reporter(length, position.step, [seen, bad_steps], [], {})
    callbacks: list[pl.Callback] = [SetLearningRate(schedule(config, start), position.step), reporter]
    if start.loaded is not None:
        callbacks.append(RestoreState(start.loaded))
    with explained(config, model.config, hardware, company), tempfile.TemporaryDirectory() as nowhere:
        module = module_for(config, hardware, samples, model, values, start, steps)
        take_steps(config, hardware, Path(nowhere), company, steps, callbacks, module)
    for report in seen.reports:
        say(
            f"step {report.step + 1}: loss {report.loss:.4f}, gradient norm {report.grad_norm:.4g}, lr {report.lr:.3g}, "
            f"{report.tokens_per_second:,.0f} tokens/s so far"
        )
    if bad_steps.total == len(seen.reports):
        say(
            "not OK: no step gave a finite loss and gradient; look at the weights (--load_model), or try --precision fp32"
        )
        return 1
    say(f"OK: {steps} of {length.steps:,} steps taken, nothing was kept; the same command without --dry_run trains")
    return 0

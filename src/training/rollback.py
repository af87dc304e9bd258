"""Fits until the run is done, rolling back when too many steps in a row are not finite."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial

import pytorch_lightning as pl

from src.dataset.sample_order import nth_kept_sample
from src.training.checkpoint.resume import ResumePoint, find_resume_point
from src.training.console import log
from src.training.schedule import RunLength
from src.training.trainer import FitResult, RunContext, fit


def fit_with_rollback(context: RunContext, resume: ResumePoint) -> FitResult:
    """Fit to the end, or until `context.ends_at`. After too many skipped steps in a row, resume once from the last good
    state without their samples.

    Raises FloatingPointError when rolling back doesn't get further; what a strategy, a callback or the data raises
    is not caught.
    """
    rolled_back_to = -1
    while True:
        # a roll-back to step 0 has to draw the same initial weights again
        pl.seed_everything(context.settings["random_seed"], verbose=False)
        try:
            result = fit(context, resume)
        finally:
            # trainer and module refer to each other: their weights and moments go before the next ones come
            gc.collect()
        if result.failed_steps is None:
            return result
        resume = _roll_back(context, resume, result, rolled_back_to)
        rolled_back_to = resume.position.step


def _find_resume_point_again(context: RunContext, resume: ResumePoint) -> ResumePoint:
    # as at the start of the run: find_resume_point continues it from the position that it finds
    length = resume.length
    length = RunLength.of(length.exit_tokens, length.ctx_len, length.global_batch, context.config.epoch_steps)
    return context.process_group.broadcast_from_rank_zero(
        partial(find_resume_point, context.config, context.proj_dir, length)
    )


def _roll_back(context: RunContext, resume: ResumePoint, result: FitResult, rolled_back_to: int) -> ResumePoint:
    """The point before the failed steps of a fit from `resume`, without the samples of these steps."""
    steps, position = result.failed_steps, resume.position
    assert steps is not None
    numbers = range(resume.length.samples(steps.start), resume.length.samples(steps.stop))
    failed = sorted(nth_kept_sample(n, position.skipped_samples) for n in numbers)
    where = (
        f"steps {steps.start + 1} to {steps.stop} (samples {failed[0]} to {failed[-1]}, the first is at "
        f"{context.samples.locate(failed[0])})"
    )
    earlier = _find_resume_point_again(context, resume)
    # the data can't be the cause when other samples failed at once
    is_no_progress = rolled_back_to >= 0 and not result.good_steps
    if earlier.position.step <= rolled_back_to or is_no_progress:
        raise FloatingPointError(
            f"loss or gradient not finite again at {where}, after rolling back to step {rolled_back_to} once. None of "
            "these steps reached the weights. Look at these samples, lower --lr_init, or use "
            "--precision fp32 to find the cause"
        )
    log(
        f"{where} had no finite gradient: rolling back to the state of step {earlier.position.step}, "
        "without these samples"
    )
    # Weights saved among the failed steps have passed some of their samples: skipping those too would shift good
    # samples past them.
    next_sample = nth_kept_sample(earlier.position.samples, earlier.position.skipped_samples)
    skipped = _add_skipped(earlier.position.skipped_samples, [n for n in failed if n >= next_sample])
    return replace(earlier, position=replace(earlier.position, skipped_samples=skipped))


def _add_skipped(skipped: list[tuple[int, int]], samples: list[int]) -> list[tuple[int, int]]:
    """`skipped` and `samples` together, as sorted runs (first, count)."""
    runs: list[tuple[int, int]] = []
    for n in sorted({*samples, *(first + i for first, count in skipped for i in range(count))}):
        if runs and n == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((n, 1))
    return runs

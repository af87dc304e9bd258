"""The fit itself: callbacks and Trainer put together, and what is done when steps go wrong."""

from __future__ import annotations

import gc
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import Dataset

from src.config import ModelConfig, RunConfig
from src.dataset.sample_order import nth_kept_sample
from src.model import RWKV7
from src.model.cost import parameter_count
from src.model.weights import save_weights
from src.run_folder import FINAL, LOG, METRICS, TRACE, VALIDATION
from src.training.checkpoint.callbacks import (
    CheckpointCallback,
    GracefulStop,
    NonFiniteMonitor,
    RestoreState,
    SaveWeights,
    SetLearningRate,
)
from src.training.checkpoint.resume import Start, build_model, find_resume_point
from src.training.checkpoint.storage import STATE_BYTES, StateWriter
from src.training.console import is_rank_zero, log
from src.training.data import Samples
from src.training.distributed.process_group import ProcessGroup
from src.training.distributed.sharded_init import Values
from src.training.figures.background import DrawPictures
from src.training.hardware.peak_flops import peak_tokens_per_second
from src.training.hardware.selection import Hardware, lightning_strategy
from src.training.module import TrainingModule
from src.training.reporting.generations import ShowSamples
from src.training.reporting.health import Warnings, WatchNumbers, WatchPace
from src.training.reporting.log_files import MetricsFile, TrainLog, ValidationFile
from src.training.reporting.loggers import open_loggers
from src.training.reporting.profile import Profile
from src.training.reporting.progress import ProgressLine, has_live_line
from src.training.reporting.reporter import Reporter
from src.training.reporting.sink import Sink
from src.training.schedule import RunLength, learning_rate
from src.training.validation import HeldOut, Validate, best_before, was_left_out

SLOW_DISK = 200e6  # bytes per second: assumed of a disk that nothing is known of yet
TIME_LIMIT_EXIT_CODE = 124  # what `timeout` gives; Ctrl-C and SIGTERM give 128 + the signal's number


@dataclass(frozen=True)
class End:
    """How a fit ended: `stopped` says why before the last step ('' when it is done); `bad_steps` were too many in a row, after
    `good_steps` in all."""

    stopped: str = ""
    exit_code: int = 0
    bad_steps: range | None = None
    good_steps: int = 0


@dataclass(frozen=True)
class Run:
    """What stays the same in a run, however often it goes back. `ends_at` by time.monotonic(): infinity without a limit."""

    config: RunConfig
    hardware: Hardware
    proj_dir: Path
    samples: Samples
    held_out: HeldOut | None
    settings: dict[str, Any]
    process_group: ProcessGroup
    ends_at: float


def fit_with_rollback(run: Run, made: list[tuple[RWKV7, Callable[[], Values]]], start: Start) -> End:
    """Fit to the end, or until `run.ends_at`; after too many bad steps, once more from the last good state without their samples.

    `made` holds the model and its values. It is emptied: a return builds others, and nobody may keep the memory of these.
    Raises FloatingPointError when that doesn't get further; what a strategy, a callback or the data raises passes through.
    """
    config, process_group = run.config, run.process_group
    model, values = made.pop()
    went_back_to = -1
    while True:
        end = _fit(run, model, values, start)
        if end.bad_steps is None:
            return end
        numbers = range(start.length.samples(end.bad_steps.start), start.length.samples(end.bad_steps.stop))
        bad = sorted(nth_kept_sample(n, start.position.skipped_samples) for n in numbers)
        length = RunLength.of(start.length.exit_tokens, config.ctx_len, start.length.global_batch, config.epoch_steps)
        again = process_group.broadcast_from_rank_zero(partial(find_resume_point, config, run.proj_dir, length))
        where = f"steps {end.bad_steps.start + 1} to {end.bad_steps.stop} (samples {bad[0]} to {bad[-1]}, the first is at {run.samples.place(bad[0])})"
        if again.position.step <= went_back_to or (went_back_to >= 0 and not end.good_steps):
            raise FloatingPointError(
                f"the loss or gradient was not finite again, at {where}, after going back to step {went_back_to} once. "
                "Nothing of it reached the weights. Look at these samples, lower --lr_init, or use --precision fp32 to find the cause"
            )
        went_back_to = again.position.step
        log(f"{where} gave no finite gradient: going back to the state of step {went_back_to}, without their samples")
        # weights saved among the bad steps have passed some of their samples: leaving those out would move good ones past them
        here = nth_kept_sample(again.position.samples, again.position.skipped_samples)
        bad = [n for n in bad if n >= here]
        start = replace(
            again, position=replace(again.position, skipped_samples=_add_skipped(again.position.skipped_samples, bad))
        )
        del model, values
        gc.collect()  # trainer and module refer to each other: their weights and moments have to go before the next ones come
        pl.seed_everything(
            run.settings["random_seed"], verbose=False
        )  # a return to step 0 draws the same weights again
        model, values = build_model(config, run.hardware, start, process_group)


def _add_skipped(skipped_samples: list[tuple[int, int]], samples: list[int]) -> list[tuple[int, int]]:
    """`skipped_samples` and `samples` together, as sorted runs (first, count)."""
    runs: list[tuple[int, int]] = []
    for n in sorted({*samples, *(first + i for first, count in skipped_samples for i in range(count))}):
        if runs and n == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((n, 1))
    return runs


def _fit(run: Run, model: RWKV7, values: Callable[[], Values], start: Start) -> End:
    """One Lightning fit from `start` to the end of the run, or until something stops it."""
    config, hardware, steps = run.config, run.hardware, start.length.steps - start.position.step
    if steps <= 0:  # stopped between its last step and its last file
        if is_rank_zero():
            weights_now = {name: tensor.to(hardware.dtype) for name, tensor in values()}
            save_weights(weights_now, run.proj_dir / FINAL)
        return End()
    callbacks = _callbacks(run, model.config, start)
    module = module_for(config, hardware, run.samples, model, values, start, steps)
    run_trainer(config, hardware, run.proj_dir, run.process_group, steps, callbacks.in_order, module)
    return _end(callbacks, start.length.steps, limited=math.isfinite(run.ends_at))


@dataclass(frozen=True)
class _Callbacks:
    """The callbacks of a fit in their order, and those that know how it ended."""

    in_order: list[pl.Callback]
    reporter: Reporter
    stop: GracefulStop
    bad_steps: NonFiniteMonitor


def _callbacks(run: Run, model: ModelConfig, start: Start) -> _Callbacks:
    """Everything that happens around the steps, put together: who hands what to whom, and who comes before whom."""
    config, proj_dir, length, position = run.config, run.proj_dir, start.length, start.position
    bad_steps = NonFiniteMonitor(config.max_bad_steps, scale_loss=run.hardware.precision == "fp16")
    stop = GracefulStop(position.step, run.ends_at)
    warn = Warnings()
    shown = [*_sinks(config, proj_dir, start, run.settings), WatchNumbers(length.steps, warn)] if is_rank_zero() else []
    wishes = {"stop": stop.wish, "rollback": bad_steps.wish}
    peak = peak_tokens_per_second(model, run.hardware)
    reporter = Reporter(length, position.step, [*shown, bad_steps], position.mini_epoch_losses, wishes, peak)
    weights = SaveWeights(length, position.step, config.epoch_save, proj_dir)
    keeper = CheckpointCallback(
        writer=StateWriter(proj_dir, config.keep_resume, first_save_seconds(model, config.time_limit)),
        position=position,
        length=length,
        reporter=reporter,
        weights=weights,
        bad_steps=bad_steps,
        settings=run.settings,
        save_minutes=config.save_minutes,
    )
    wishes["save"] = keeper.due
    stop.reporter, stop.keeper = reporter, keeper
    in_order = [
        *([RestoreState(start.loaded)] if start.loaded is not None else []),
        SetLearningRate(schedule(config, start), position.step),
        reporter,
        weights,
        *([_validation(run, run.held_out, start, reporter, stop)] if run.held_out is not None else []),
        DrawPictures(length, position.step, proj_dir),
        keeper,
        stop,
        ShowSamples(config, reporter, bad_steps, length, proj_dir),  # when everything is saved
        *([Profile(config.profile, proj_dir / TRACE)] if is_rank_zero() and config.profile > 0 else []),
        WatchPace(warn),
    ]
    return _Callbacks(in_order, reporter, stop, bad_steps)


def first_save_seconds(model: ModelConfig, time_limit: float) -> float:
    """What a save of the full state is expected to take before one was seen: as on a SLOW_DISK, but not so long that keeping twice that
    of --time_limit (minutes) leaves too little for training."""
    expected = STATE_BYTES * parameter_count(model) / SLOW_DISK
    return min(expected, time_limit * 60 / 8) if time_limit else expected


def _validation(run: Run, held_out: HeldOut, start: Start, reporter: Reporter, stop: GracefulStop) -> Validate:
    """The callback that measures the held-out loss: before the first step too, where trained weights begin or a stop left it out."""
    config, process_group, length, step = run.config, run.process_group, start.length, start.position.step
    reporter.best_val_loss = process_group.broadcast_from_rank_zero(lambda: best_before(run.proj_dir, step))
    fine_tuned = step == 0 and start.weights is not None and (config.data_type == "sft" or bool(config.load_model))
    at_start = fine_tuned or process_group.broadcast_from_rank_zero(
        lambda: was_left_out(run.proj_dir, config.val_every, length, step)
    )
    validate = Validate(held_out, reporter, length, step, config.val_every, run.proj_dir, at_start, stop.wish_now)
    stop.seconds_coming = validate.seconds_coming
    return validate


def _end(callbacks: _Callbacks, steps: int, limited: bool) -> End:
    """What a fit of a run of `steps` steps came to; `limited`: --time_limit is given."""
    reporter, stop = callbacks.reporter, callbacks.stop
    if "stop" in reporter.agreed and reporter.next_step < steps:
        if stop.out_of_time or (not stop.received and limited):  # or another process's time was over
            return End("--time_limit is near", TIME_LIMIT_EXIT_CODE)
        number = stop.received or signal.SIGTERM
        return End(f"{signal.Signals(number).name} received", 128 + number)
    return End(bad_steps=callbacks.bad_steps.too_many, good_steps=callbacks.bad_steps.good)


def module_for(
    config: RunConfig,
    hardware: Hardware,
    samples: Samples,
    model: RWKV7,
    values: Callable[[], Values],
    start: Start,
    steps: int,
) -> TrainingModule:
    """The LightningModule of `steps` steps from `start` on, its blocks compiled where --compile asks for it."""
    position, vocab_size = start.position, model.config.vocab_size
    count = steps * start.length.global_batch // hardware.world_size  # samples of one rank

    def make_dataset(rank: int, world_size: int) -> Dataset:
        return samples.dataset(position.samples, count, rank, world_size, position.skipped_samples, vocab_size)

    if config.compile:
        model.compile_blocks()
    in_parts = values if hardware.model_in_parts else None
    return TrainingModule(model, config, hardware, make_dataset, samples.collate, in_parts)


def run_trainer(
    config: RunConfig,
    hardware: Hardware,
    proj_dir: Path,
    process_group: ProcessGroup,
    steps: int,
    callbacks: list[pl.Callback],
    module: TrainingModule,
) -> None:
    """Lightning's part of a run of so many steps: devices, strategy and the loop; everything else is ours, in the callbacks."""
    trainer = pl.Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        num_nodes=hardware.num_nodes,
        strategy=lightning_strategy(config, hardware),
        plugins=[process_group.environment],
        precision="32-true",  # ours: parameters have their dtype already, the optimizer keeps fp32 masters
        max_epochs=1,
        max_steps=steps,
        accumulate_grad_batches=config.accumulate_grad_batches,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=proj_dir
        / "lightning",  # which is never made: in a Slurm job Lightning takes up an hpc_ckpt_*.ckpt that it finds there
    )
    try:
        trainer.fit(module)
    except SystemExit:  # Lightning makes this of a KeyboardInterrupt: a second Ctrl-C, or one before the first step
        raise KeyboardInterrupt from None


def schedule(config: RunConfig, start: Start) -> Callable[[int], float]:
    """step -> learning rate, for the rest of the run: a batch that has changed since counts the tokens that it really took."""
    length = start.length

    def at(step: int) -> float:
        return learning_rate(
            length.tokens(step) / length.tokens_per_step,
            lr_init=config.lr_init,
            lr_final=config.lr_final,
            warmup_steps=max(0, config.warmup_steps),
            exit_tokens=length.exit_tokens,
            tokens_per_step=length.tokens_per_step,
            restarted_at=start.position.restarted_at_sample / length.global_batch,
        )

    return at


def _sinks(config: RunConfig, proj_dir: Path, start: Start, settings: dict[str, Any]) -> list[Sink]:
    live = config.enable_progress_bar.lower() in ("true", "1") and has_live_line()
    length, first_step = start.length, start.position.step
    metrics = MetricsFile(proj_dir / METRICS, first_step, length.tokens_per_step)
    if metrics.lost_seconds:
        log(f"{'lost':>12}  {metrics.lost_seconds:.0f} s of training after that are done again")
    return [
        TrainLog(proj_dir / LOG, start.first_mini_epoch, first_step, settings),
        metrics,
        ValidationFile(proj_dir / VALIDATION, first_step),
        *open_loggers(config, proj_dir, settings),
        # the last to begin and the first to end: loggers have words of their own
        ProgressLine(length, first_step, live),
    ]

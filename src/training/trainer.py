"""One fit: callbacks, data loader and Lightning's Trainer put together.

The callbacks of a fit, in the order in which Lightning calls them:

    WatchFiles            stops where the run's folder or its data is changed, before anything is written after a step
    RunControl            counts the step, which all others rely on; combines the requests of all ranks to stop, save,
                          roll back
    GracefulStop          turns signals and the time limit into a request to stop; before RestoreState, since loading a
                          state takes a while, and Lightning's own handler of SIGTERM would end it
    RestoreState          loads the full state, when one is resumed, before anything looks at the weights
    SetLearningRate       the schedule, before each step
    SeedDropout           with dropout: random numbers of a micro step follow from its number, not from those before
    Reporter              reads the results of the step before, and passes them to sinks: logs, progress bar,
                          NonFiniteMonitor
    SaveInitialWeights    rwkv-init.pth, where this start draws the initial weights
    SaveWeights           rwkv-N.pth at mini-epochs
    Validation            held-out loss and rwkv-best.pth; part of the step that a state is saved after
    LossFigureCallback    loss.png, drawn in a thread
    CheckpointCallback    full states; rwkv-final.pth at the end, when everything else is on the disk
    GenerateSamples       samples.json at the end, when everything is saved
    Profile               --profile
    PaceMonitor           what the device waits for between two steps; the last, since it times what all others take
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from src.config import ModelConfig, RunConfig
from src.dataset.loader import train_dataloader
from src.dataset.watched_file import DataFileError
from src.model import RWKV7
from src.run_folder import LOG, METRICS, TRACE, VALIDATION
from src.training.checkpoint.callbacks import (
    CheckpointCallback,
    RestoreState,
    SaveInitialWeights,
    SaveWeights,
    refuse_unusable,
)
from src.training.checkpoint.manifest import DamagedStateError
from src.training.checkpoint.restore import held_of_state, weights_of_state
from src.training.checkpoint.results import Results
from src.training.checkpoint.resume import ResumePoint
from src.training.checkpoint.state import SavedState
from src.training.checkpoint.storage import STATE_BYTES_PER_PARAMETER, StateWriter
from src.training.checkpoint.watch_files import WatchFiles
from src.training.console import is_rank_zero, log
from src.training.control import STOP, TIME_LIMIT_EXIT_CODE, GracefulStop, RunControl
from src.training.data import HeldOut, Samples
from src.training.distributed.context_parallel import data_parallel
from src.training.distributed.process_group import ProcessGroup
from src.training.distributed.sharded_init import NamedTensors
from src.training.figures.background import LossFigureCallback
from src.training.hardware.peak_flops import peak_tokens_per_second
from src.training.hardware.selection import Hardware, lightning_strategy
from src.training.model_setup import build_model, fitted_weights, held_count
from src.training.module import TrainingModule
from src.training.reporting.generations import GenerateSamples
from src.training.reporting.health import NumbersMonitor, OnceWarnings, PaceMonitor
from src.training.reporting.log_files import MetricsFile, TrainLog, ValidationFile
from src.training.reporting.loggers import open_loggers
from src.training.reporting.non_finite import NonFiniteMonitor
from src.training.reporting.profile import Profile
from src.training.reporting.progress import ProgressLine, has_live_line
from src.training.reporting.reporter import Reporter
from src.training.reporting.sink import Sink
from src.training.schedule import learning_rate
from src.training.validation import Validation, best_loss_before, was_omitted

# Bytes per second that are assumed of a disk as long as no save was measured; a guess on the slow side, since a save
# that takes longer than expected would miss --time_limit.
ASSUMED_DISK_SPEED = 200e6


@dataclass(frozen=True)
class RunContext:
    """What stays the same in a run, however often it rolls back. `ends_at` by time.monotonic(): infinity without a
    limit."""

    config: RunConfig
    sizes: ModelConfig
    hardware: Hardware
    proj_dir: Path
    samples: Samples
    held_out: HeldOut | None
    settings: dict[str, Any]
    process_group: ProcessGroup
    ends_at: float
    results: Results
    check_folder: Callable[[], None] = lambda: None  # raises where the folder is another run's; see RunLock.check


@dataclass(frozen=True)
class FitResult:
    """How a fit ended: `stopped` says why before the last step ('' when it is complete); `failed_steps` were too many
    skipped steps in a row, after `good_steps` in all."""

    stopped: str = ""
    exit_code: int = 0
    failed_steps: range | None = None
    good_steps: int = 0


def fit(context: RunContext, resume: ResumePoint) -> FitResult:
    """One Lightning fit from `resume` to the end of the run, or until something stops it. Raises DamagedStateError when
    the tensors of the state turn out to be damaged."""
    steps = resume.length.steps - resume.position.step
    try:
        if steps <= 0:  # stopped between its last step and rwkv-final.pth
            _write_final_weights(context, resume)
            return FitResult()
        # built here and held by nobody else: a roll-back builds another one, and there may be no memory for two
        model, values = build_model(context.config, context.sizes, context.hardware, resume)
        callbacks = build_callbacks(context, resume)
        watch_files = callbacks.watch_files
        try:
            run_trainer(context, resume, steps, callbacks.in_order, build_module(context, model, values))
        except DataFileError as error:
            watch_files.check_data()  # for its own sentence: that of a loader's worker has a traceback in it
            raise watch_files.data_error or error from None
        if callbacks.control.is_agreed(STOP):
            watch_files.check_data()  # on every rank: it may have stopped since another one noticed
        if watch_files.data_error is not None and callbacks.control.step < resume.length.steps:
            raise watch_files.data_error
        return _result(callbacks, resume.length.steps)
    except DamagedStateError as error:
        error.folder = resume.reader.folder if resume.reader is not None else None
        raise


def _write_final_weights(context: RunContext, resume: ResumePoint) -> None:
    final = context.proj_dir / context.results.names.final

    def write() -> None:
        if resume.reader is not None:
            if not context.results.are_weights:
                weights = held_of_state(resume.reader)
            else:
                weights = weights_of_state(resume.reader, context.sizes, context.hardware.dtype, context.proj_dir)
            assert resume.state is not None
            refuse_unusable(weights, resume.state.counters, resume.position.restarted_at_sample, final.name)
        else:
            assert context.results.are_weights, "an adapter is resumed from a full state only"
            stored = fitted_weights(context.config, context.sizes, resume)
            weights = {name: tensor.to(context.hardware.dtype) for name, tensor in stored.items()}
        context.results.write_tensors(weights, final)

    context.process_group.broadcast_from_rank_zero(write)


@dataclass(frozen=True)
class Callbacks:
    """The callbacks of a fit in their order, and those that know how it ended."""

    in_order: list[pl.Callback]
    control: RunControl
    graceful_stop: GracefulStop
    non_finite: NonFiniteMonitor
    watch_files: WatchFiles


def build_callbacks(context: RunContext, resume: ResumePoint) -> Callbacks:
    """All callbacks of a fit; the module's docstring says what each does and why they stand in this order."""
    config, proj_dir, length, position = context.config, context.proj_dir, resume.length, resume.position
    control = RunControl(context.process_group, position.step)
    graceful_stop = GracefulStop(control, context.ends_at)
    non_finite = NonFiniteMonitor(control, config.max_bad_steps, scale_loss=context.hardware.precision == "fp16")
    warn = OnceWarnings()
    # only rank 0 writes; non-finite steps are watched on every rank, so that all stop at the same one
    sinks = [*_sinks(context, resume), NumbersMonitor(length.steps, warn)] if is_rank_zero() else []
    peak = peak_tokens_per_second(context.sizes, context.hardware)
    reporter = Reporter(control, length, [*sinks, non_finite], position.mini_epoch_losses, peak)
    check_folder = context.check_folder
    expected_seconds = expected_save_seconds(held_count(config, context.sizes), config.time_limit)
    context.process_group.any_rank([False]).wait()  # all have come: in the writer's own group, they wait for long
    writer = StateWriter(
        proj_dir, config.keep_resume, expected_seconds, check_folder, context.hardware.devices,
        config.dist_timeout,
    )  # fmt: skip
    weights = SaveWeights(
        control, length, config.epoch_save, proj_dir, non_finite, context.samples.prime, context.results
    )
    checkpoint = CheckpointCallback(
        control,
        writer=writer,
        position=position,
        length=length,
        reporter=reporter,
        weights=weights,
        non_finite=non_finite,
        settings=context.settings,
        save_minutes=config.save_minutes,
        has_state=resume.state is not None,
    )
    watch_files = WatchFiles(
        control, context.samples, context.held_out, check_folder, save=checkpoint.save_between_steps
    )
    in_order: list[pl.Callback] = [
        watch_files,
        control,
        graceful_stop,
        *restore_callbacks(resume),
        SetLearningRate(control, learning_rate_schedule(config, resume)),
        *dropout_callbacks(config, context.process_group, control),
        reporter,
        *_initial_weights_callbacks(context, resume),
        weights,
        *_validation_callbacks(context, resume, control, reporter, graceful_stop),
        LossFigureCallback(control, length, proj_dir, check_folder),
        checkpoint,
        GenerateSamples(config, control, reporter, non_finite, length, proj_dir),
        *([Profile(config.profile, proj_dir / TRACE)] if is_rank_zero() and config.profile > 0 else []),
        PaceMonitor(warn),
    ]
    return Callbacks(in_order, control, graceful_stop, non_finite, watch_files)


def restore_callbacks(resume: ResumePoint) -> list[pl.Callback]:
    """The callback that loads the full state, where one is resumed."""
    if resume.state is None:
        return []
    assert resume.reader is not None
    return [RestoreState(resume.state, resume.reader)]


def _initial_weights_callbacks(context: RunContext, resume: ResumePoint) -> list[pl.Callback]:
    """The callback that writes rwkv-init.pth, where neither a state nor a file gives the initial weights."""
    if resume.state is not None or resume.weights is not None:
        return []
    return [SaveInitialWeights(context.proj_dir, context.check_folder)]


def _validation_callbacks(
    context: RunContext, resume: ResumePoint, control: RunControl, reporter: Reporter, graceful_stop: GracefulStop
) -> list[pl.Callback]:
    """The callback that measures the held-out loss, where held-out data are given. It measures before the first step
    too, where trained weights begin, or where a stop cut the measurement off."""
    if context.held_out is None:
        return []
    config, length, step = context.config, resume.length, resume.position.step
    # trained weights are measured before the first step: what fine-tuning gained is the difference
    is_fine_tuning = step == 0 and resume.weights is not None and (config.data_type == "sft" or bool(config.load_model))
    best_loss, omitted = context.process_group.broadcast_from_rank_zero(
        lambda: (
            best_loss_before(context.proj_dir, _last_validation(resume)),
            was_omitted(context.proj_dir, config.val_every, length, step),
        )
    )
    return [
        Validation(
            control,
            held_out=context.held_out,
            reporter=reporter,
            graceful_stop=graceful_stop,
            process_group=context.process_group,
            length=length,
            val_every=config.val_every,
            proj_dir=context.proj_dir,
            best_loss=best_loss,
            at_start=is_fine_tuning or omitted,
            results=context.results,
        )
    ]


def _last_validation(resume: ResumePoint) -> int:
    """The step up to which validations are not measured again. A state is saved after the validation of its step, and
    with it rwkv-best.pth; numbered weights are saved before."""
    return resume.position.step if resume.state is not None else resume.position.step - 1


def expected_save_seconds(held: int, time_limit: float) -> float:
    """What a save of the full state, of `held` parameters, is expected to take before one was measured, on a disk of
    ASSUMED_DISK_SPEED; but not so long that keeping twice that of --time_limit (minutes) leaves too little for
    training."""
    expected = STATE_BYTES_PER_PARAMETER * held / ASSUMED_DISK_SPEED
    return min(expected, time_limit * 60 / 8) if time_limit else expected


def _result(callbacks: Callbacks, steps: int) -> FitResult:
    """How a fit of a run of `steps` steps ended."""
    control, stop, non_finite = callbacks.control, callbacks.graceful_stop, callbacks.non_finite
    if control.is_agreed(STOP) and control.step < steps:
        # without a signal of its own, this rank stops since another one received one or ran out of time
        if stop.ran_out_of_time or (not stop.received and stop.has_time_limit):
            return FitResult("--time_limit is near", TIME_LIMIT_EXIT_CODE)
        number = stop.received or signal.SIGTERM
        return FitResult(f"{signal.Signals(number).name} received", 128 + number)
    return FitResult(failed_steps=non_finite.failed_steps, good_steps=non_finite.good)


def build_module(context: RunContext, model: RWKV7, values: Callable[[], NamedTensors] | None) -> TrainingModule:
    """The LightningModule, its blocks compiled as --compile asks."""
    if context.config.compiles(context.hardware.device_type):
        model.compile_blocks()
    return TrainingModule(model, context.config, context.hardware, values)


def _build_dataloader(context: RunContext, resume: ResumePoint, steps: int) -> DataLoader:
    """What this rank reads in `steps` steps from `resume` on."""
    samples, process_group = context.samples, context.process_group
    rank, world_size = data_parallel(process_group.rank, process_group.world_size, context.config.context_parallel)
    dataset = samples.dataset(
        first=resume.position.samples,
        count=steps * resume.length.global_batch // world_size,
        rank=rank,
        world_size=world_size,
        skipped_samples=resume.position.skipped_samples,
        vocab_size=context.sizes.vocab_size,
    )
    on_gpu = context.hardware.accelerator == "gpu"
    return train_dataloader(context.config, dataset, samples.collate, on_gpu)


def run_trainer(
    context: RunContext, resume: ResumePoint, steps: int, callbacks: list[pl.Callback], module: TrainingModule
) -> None:
    """Lightning's part of `steps` steps from `resume` on: devices, strategy and the loop. Everything else is in the
    callbacks."""
    config, hardware = context.config, context.hardware
    trainer = pl.Trainer(
        # the strategy of a device that Lightning does not know has its accelerator
        accelerator=hardware.accelerator if hardware.accelerator in ("cpu", "gpu") else "auto",
        devices=hardware.devices,
        num_nodes=hardware.num_nodes,
        strategy=lightning_strategy(config, hardware),
        plugins=[context.process_group.environment],
        # Lightning's bf16-true has no fp32 masters and bf16-mixed is autocast: here parameters have their dtype
        # already, and the optimizer keeps the masters
        precision="32-true",
        max_epochs=1,  # a mini-epoch is our own unit of bookkeeping; to Lightning a run is one epoch
        max_steps=steps,
        accumulate_grad_batches=config.accumulate_grad_batches,
        callbacks=callbacks,
        logger=False,  # loggers are sinks of the Reporter: they get the run's step, not that of this start
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # it would shuffle; the data set yields this rank's samples in the run's order
        num_sanity_val_steps=0,
        # never created: in a Slurm job Lightning resumes from an hpc_ckpt_*.ckpt that it finds there
        default_root_dir=context.proj_dir / "lightning",
    )
    _disable_sigterm_broadcast(trainer)
    try:
        trainer.fit(module, _build_dataloader(context, resume, steps))
    except SystemExit as error:
        # Lightning makes one of a KeyboardInterrupt: a second Ctrl-C, or one before the first step
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise SystemExit(128 + signal.SIGTERM) from None  # and of a SIGTERM before GracefulStop's handler is installed


def _disable_sigterm_broadcast(trainer: pl.Trainer) -> None:
    """With several ranks Lightning broadcasts before every batch whether a SIGTERM came, on the device, and waits for
    it. RunControl does that on the CPU, a step late."""
    loop = trainer.fit_loop.epoch_loop
    assert hasattr(loop, "_broadcast_sigterm_tensor"), "another Lightning: see whether it still waits for the device"
    loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


class SetLearningRate(pl.Callback):
    """Before each step, every group's lr = learning_rate_at(step) * its lr_scale."""

    def __init__(self, control: RunControl, learning_rate_at: Callable[[int], float]) -> None:
        self.control, self.learning_rate_at = control, learning_rate_at

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        lr = self.learning_rate_at(self.control.step)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = lr * group["lr_scale"]


class SeedDropout(pl.Callback):
    """Before each micro step, seeds the generators from the run's seed, the step, the micro step and the rank: a
    resumed run draws what it would have drawn."""

    def __init__(self, control: RunControl, seed: int, rank: int, micro_steps: int) -> None:
        self.control, self.seed, self.rank, self.micro_steps = control, seed, rank, micro_steps

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        key = f"{self.seed} {self.control.step} {batch_idx % self.micro_steps} {self.rank}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)


def dropout_callbacks(config: RunConfig, process_group: ProcessGroup, control: RunControl) -> list[pl.Callback]:
    """The callback that makes dropout a function of the step, where there is any."""
    if not config.lora_dropout:
        return []
    # Without --random_seed each start draws another one; a resumed run must not.
    seed = max(0, config.random_seed)
    return [SeedDropout(control, seed, process_group.rank, config.accumulate_grad_batches)]


def learning_rate_schedule(config: RunConfig, resume: ResumePoint) -> Callable[[int], float]:
    """step -> learning rate, for the rest of the run. By tokens: where the batch has changed since the run began, a
    step counts for the tokens that it really took."""
    length = resume.length

    def learning_rate_at(step: int) -> float:
        return learning_rate(
            length.tokens(step) / length.tokens_per_step,
            lr_init=config.lr_init,
            lr_final=config.lr_final,
            warmup_steps=config.warmup_steps,
            exit_tokens=length.exit_tokens,
            tokens_per_step=length.tokens_per_step,
            restarted_at=resume.position.restarted_at_sample / length.global_batch,
        )

    return learning_rate_at


def _lines_of_state(settings: dict[str, Any], state: SavedState) -> dict[str, list[str]]:
    """The lines of logs that a state keeps; not those of val.csv where they are losses on other held-out data, whose
    file was archived at this start."""
    is_same = all(settings.get(name) == state.settings.get(name) for name in ("val_data_file", "val_windows"))
    return {name: lines for name, lines in state.logs.items() if is_same or name != VALIDATION}


def _sinks(context: RunContext, resume: ResumePoint) -> list[Sink]:
    config, proj_dir, settings = context.config, context.proj_dir, context.settings
    live = config.enable_progress_bar.lower() in ("true", "1") and has_live_line()
    length, first_step, last_validation = resume.length, resume.position.step, _last_validation(resume)
    # rows and lines of steps that are trained again, because they are newer than the state, are dropped first
    metrics = MetricsFile(proj_dir / METRICS, first_step, length.tokens_per_step)
    if metrics.lost_seconds:
        log(f"{'repeated':>12}  {metrics.lost_seconds:.0f} s of training since that state")
    if metrics.missing_steps and resume.state is not None:
        log(f"note: {METRICS} has no rows of {metrics.missing_steps:,} of the {first_step:,} steps before this start")
    lines = _lines_of_state(settings, resume.state) if resume.state is not None else {}
    return [
        TrainLog(proj_dir / LOG, resume.first_mini_epoch, last_validation, settings, lines, context.check_folder),
        metrics,
        ValidationFile(proj_dir / VALIDATION, last_validation, lines, context.check_folder),
        *open_loggers(config, proj_dir, settings),
        # the last to open and the first to close: loggers print
        ProgressLine(length, first_step, live),
    ]

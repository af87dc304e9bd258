"""One run from settings to trained weights: check everything, say what will happen, fit, show the result."""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only

from src import run_folder
from src.config import RunConfig
from src.dataset.binidx import file_prefix
from src.dataset.lock import only_one
from src.errors import UserError
from src.model import RWKV7
from src.model.cost import parameter_count
from src.model.weights import fit_weights, read_weights, save_weights
from src.ops.build import BuildError
from src.ops.recurrence import describe_kernel
from src.run_folder import BEST, FIGURE, FINAL, INIT, LOG, METRICS, REPORT, VALIDATION
from src.run_log import read_columns
from src.training.checkpoint.resume import (
    archive_other_run,
    build_model,
    compare_settings,
    find_resume_point,
    find_vocab_size,
    length_of_run,
    refuse_end_in_the_past,
)
from src.training.console import is_rank_zero, log, log_error, warn_on_error
from src.training.data import open_samples
from src.training.distributed.launch import rank_from_launcher
from src.training.distributed.process_group import ProcessGroup, join
from src.training.hardware.allocator import set_up_malloc
from src.training.hardware.selection import Hardware, choose_hardware
from src.training.html_report import write_report
from src.training.plot import loss_picture
from src.training.preflight import plan
from src.training.preflight.check import check, warn_at_start
from src.training.preflight.dry_run import dry_run
from src.training.preflight.out_of_memory import OutOfMemory, is_out_of_memory, with_oom_advice
from src.training.remember import refuse_another_run, remember
from src.training.settings import settings_of, summary, words_for_complete
from src.training.trainer import Run, fit_with_rollback
from src.training.validation import HeldOut

INTERRUPTED_EXIT_CODE = 130  # what shells report for Ctrl-C


def run(config: RunConfig, notes: list[str]) -> int:
    """Carry out `train.py` with these settings. The exit code: 0 done, 1 a failure, 2 a mistake in the call, 130 stopped."""
    ends_at = time.monotonic() + config.time_limit * 60 if config.time_limit else math.inf
    _quiet_libraries()
    process_group = ProcessGroup()
    try:
        if place := rank_from_launcher(
            os.environ
        ):  # who speaks and writes: Lightning doesn't know every launcher's ranks
            rank_zero_only.rank = place.rank  # type: ignore[attr-defined]
        if config.plan >= 0:
            return _plan(config)
        if config.accelerator == "cpu" or not torch.cuda.is_available():
            set_up_malloc(lean=bool(config.grad_cp))
        if config.check:
            return check(config, notes) if is_rank_zero() else 0
        hardware = choose_hardware(config)
        if config.train_stage == 1:
            hardware = replace(hardware, devices=1, num_nodes=1)  # one process writes; of a launcher's, the first
            if not is_rank_zero():
                return 0
        else:
            if config.data_type == "binidx":
                open_samples(config)  # a mistake in the data is said before other processes are started
            process_group = join(hardware.devices, hardware.num_nodes, hardware.accelerator)
        for note in (*notes, *hardware.notes):
            log(f"note: {note}")
        if config.dry_run:
            code = dry_run(config, hardware, Path(config.proj_dir), process_group)
            process_group.leave()
            return code
        proj_dir = process_group.broadcast_from_rank_zero(lambda: _writable_folder(config.proj_dir))
        with _alone_in(proj_dir):
            if config.train_stage == 1:
                return _write_init(config, proj_dir)
            code = _train(config, hardware, proj_dir, process_group, ends_at)
        process_group.leave()
        return code
    except ValueError as error:
        if not _is_for_users(error):
            process_group.explain(error)
            raise
        return _fail(process_group, str(error), 2)
    except BuildError as error:
        return _fail(process_group, f"--kernel {config.kernel}: {error}", 2)
    except OSError as error:
        return _fail(process_group, _in_words(error, config), 1)
    except (FloatingPointError, OutOfMemory) as error:
        return _fail(process_group, str(error), 1)
    except KeyboardInterrupt:
        if process_group.rank == 0:
            log_error(f"stopped at once; {_what_continues(config)} from the newest saved state or weights")
        return INTERRUPTED_EXIT_CODE
    except Exception as error:
        if is_out_of_memory(error):
            return _fail(
                process_group,
                f"the memory doesn't suffice ({str(error).splitlines()[0]}); --check says what would fit",
                1,
            )
        process_group.explain(error)
        raise


def _what_continues(config: RunConfig) -> str:
    return f"the same command{', without --restart,' if config.restart else ''} continues"


def _in_words(error: OSError, config: RunConfig) -> str:
    """Our own OSErrors explain themselves; the system's name a file at best."""
    if error.errno is None:
        return str(error)
    where = error.filename or f"--proj_dir {config.proj_dir}"
    return f"{where}: {error.strerror}; mend that (space, permission, connection), and {_what_continues(config)} from what was saved last"


def _fail(process_group: ProcessGroup, message: str, code: int) -> int:
    if process_group.should_report(message):
        log_error(message)
        process_group.abort(message)
    return code


def _is_for_users(error: ValueError) -> bool:
    """Our own ValueErrors explain themselves; one that a library raised in the middle of training needs its traceback."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(Path(__file__).parents[1]) in frame.tb_frame.f_code.co_filename


def _plan(config: RunConfig) -> int:
    """Needs no machine like the one that is planned for: everything comes from the flags (and the data, for what they leave out)."""
    if not config.my_exit_tokens and not config.data_file:
        raise UserError("--plan: how many tokens? Give --my_exit_tokens or --data_file")
    if config.devices == "auto":
        raise UserError("--devices auto: expected a number of processes per machine with --plan")
    model = config.model_config(find_vocab_size(config, None))
    exit_tokens = config.my_exit_tokens or max(1, round(config.epochs * open_samples(config).once))
    precision = config.precision or ("fp32" if config.accelerator == "cpu" else "bf16")
    log(plan.describe(config, model, exit_tokens, int(config.devices) * config.num_nodes, precision))
    return 0


# ---- stage 1 ----------------------------------------------------------------------------------------------------------------


def _write_init(config: RunConfig, proj_dir: Path) -> int:
    target = proj_dir / INIT
    model_config = config.model_config(find_vocab_size(config, None))
    if target.exists():
        with torch.device("meta"):
            like = RWKV7(model_config)
        fit_weights(read_weights(target), like, source=str(target))
        log(f"{target} is there already and fits; delete it to draw other initial weights")
        return 0
    seed = _seed(config)
    model = RWKV7(model_config).to(_init_dtype(config))
    save_weights(model.state_dict(), target)
    log(f"wrote {target}: {model_config.title}, {parameter_count(model_config):,} parameters, seed {seed}")
    return 0


def _init_dtype(config: RunConfig) -> torch.dtype:
    return torch.float32 if config.precision in ("fp32", "tf32") else torch.bfloat16


# ---- training ---------------------------------------------------------------------------------------------------------------


def _train(config: RunConfig, hardware: Hardware, proj_dir: Path, process_group: ProcessGroup, ends_at: float) -> int:
    samples = open_samples(config)
    if config.data_type == "sft" and config.magic_prime:
        log("note: --magic_prime has no meaning for --data_type sft, whose order is a shuffle for each epoch")
    length = length_of_run(config, samples.once, hardware.world_size)
    held_out = HeldOut(config) if config.val_data_file else None
    if config.val_data_file and file_prefix(config.val_data_file).resolve() == file_prefix(config.data_file).resolve():
        log("WARNING: --val_data_file is the training data itself: its loss tells nothing of other text")
    if held_out and config.vocab_size:  # a mistake must not be found when files have been moved
        held_out.check_ids(config.vocab_size)
    if config.restart or not (proj_dir / FINAL).exists():  # a kernel that can't be had is said before files move
        describe_kernel(hardware.device_type, hardware.dtype, config.head_size, config.kernel)
    process_group.broadcast_from_rank_zero(lambda: archive_other_run(config, proj_dir))
    if process_group.broadcast_from_rank_zero((proj_dir / FINAL).exists):
        process_group.broadcast_from_rank_zero(lambda: refuse_another_run(config, hardware, proj_dir, length, samples))
        log(words_for_complete(proj_dir))
        return 0
    seed = process_group.broadcast_from_rank_zero(lambda: _seed(config))
    start = process_group.broadcast_from_rank_zero(lambda: find_resume_point(config, proj_dir, length))
    model, values = build_model(config, hardware, start, process_group)
    samples.check_ids(model.config.vocab_size)
    if held_out:
        held_out.check_ids(model.config.vocab_size)
    settings = settings_of(config, model.config, hardware, length, samples, seed)
    if start.position.step:
        known = start.loaded.settings if start.loaded else run_folder.read_run(proj_dir).get("settings", {})
        process_group.broadcast_from_rank_zero(lambda: compare_settings(known, settings, proj_dir))
        process_group.broadcast_from_rank_zero(lambda: refuse_end_in_the_past(known, start))
    log(summary(config, model, hardware, samples, start))
    remember(config, hardware, proj_dir, settings, start)
    if process_group.rank == 0:
        warn_at_start(config, hardware, model.config, samples, start, proj_dir)
    sizes, made = model.config, [(model, values)]
    del model, values
    with with_oom_advice(config, sizes, hardware, process_group):
        ingredients = Run(config, hardware, proj_dir, samples, held_out, settings, process_group, ends_at)
        end = fit_with_rollback(ingredients, made, start)
    if process_group.rank != 0:
        return end.exit_code
    drawn = []
    if read_columns(proj_dir / METRICS):
        with warn_on_error(FIGURE):
            drawn.append(loss_picture(proj_dir, proj_dir / FIGURE))
        with warn_on_error(REPORT):
            drawn.append(write_report(proj_dir))
    if end.stopped:
        log(f"stopped: {end.stopped}; its state is saved, {_what_continues(config)} from there")
        return end.exit_code
    log(f"done: {', '.join(map(str, (proj_dir / FINAL, proj_dir / LOG, *drawn)))}")
    if config.val_data_file and (rows := read_columns(proj_dir / VALIDATION)):
        log(_held_out_in_words(rows, proj_dir, config.val_data_file, start.length.steps))
    return 0


def _held_out_in_words(rows: dict[str, list[float]], proj_dir: Path, data: str, last_step: int) -> str:
    steps, losses = rows["steps"], rows["loss"]
    before = f"; before the run {losses[0]:.4f}" if steps[0] == 0 else ""
    best = min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
    lowest = f"; lowest {losses[best]:.4f} after step {steps[best]:.0f}, kept as {proj_dir / BEST}" * math.isfinite(
        losses[best]
    )
    when = (
        "" if steps[-1] == last_step else f" after step {steps[-1]:.0f} (stopped before that of the end was measured)"
    )
    return f"held-out loss {losses[-1]:.4f}{when} over {rows['counted'][-1]:,.0f} tokens of {data}{before}{lowest}"


def _seed(config: RunConfig) -> int:
    seed = config.random_seed if config.random_seed >= 0 else secrets.randbelow(2**31)
    pl.seed_everything(seed, verbose=False)
    return seed


def _writable_folder(name: str) -> Path:
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--proj_dir {name}: can't be written ({error.strerror or error}); choose a folder of yours"
        ) from error
    return folder


@contextmanager
def _alone_in(proj_dir: Path) -> Iterator[None]:
    """Two runs in one folder would overwrite each other's weights: the second is refused."""
    if not is_rank_zero():
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(only_one(proj_dir / ".lock", wait=False))
        except BlockingIOError:
            raise UserError(
                f"--proj_dir {proj_dir}: another run is at work in this folder; wait for it or stop it, or choose another folder"
            ) from None
        run_folder.remove_leftovers(proj_dir)
        yield


def _quiet_libraries() -> None:
    """Lightning's banners say nothing about a run that the summary doesn't say better."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", module="lightning_fabric")

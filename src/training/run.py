"""`train.py`'s modes and exit codes: plan, check, dry run, initial weights (stage 1), training."""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only

from src import run_folder
from src.config import RunConfig
from src.errors import UserError
from src.files import make_folder
from src.inference.load import load_weights
from src.model import RWKV7
from src.model.cost import parameter_count
from src.model.weights import fit_weights, read_weights, save_weights
from src.ops.build import BuildError
from src.run_folder import INIT, RunLock
from src.training.checkpoint.resume import resolve_load_model
from src.training.checkpoint.storage import state_folders
from src.training.console import is_rank_zero, log, log_error
from src.training.data import open_samples
from src.training.distributed.agreement import refuse_other_starts
from src.training.distributed.failure import USER_ERROR, record_failure
from src.training.distributed.process_group import ProcessGroup, join
from src.training.distributed.ranks import cluster_environment, is_restarted, is_supervised, launch_id, launched_at
from src.training.distributed.restarts import RestartPolicy
from src.training.hardware.allocator import set_up_malloc
from src.training.hardware.selection import (
    Hardware,
    choose_hardware,
    count_processes,
    meeting_point,
    with_global_batch,
    with_length,
)
from src.training.model_setup import find_vocab_size, with_known_sizes
from src.training.preflight import plan
from src.training.preflight.check import check
from src.training.preflight.dry_run import dry_run
from src.training.preflight.out_of_memory import OutOfMemory, is_out_of_memory
from src.training.training_run import draw_seed, how_to_continue, train

FAILURE, INTERRUPTED = 1, 130  # exit codes, beside USER_ERROR; 130 is what shells report for Ctrl-C


def run(config: RunConfig, notes: list[str]) -> int:
    """Carry out `train.py` with these settings; `notes` are logged. Returns the exit code: 0 done, else as above, or
    128 + the number of the signal that stopped the run, or 124 at --time_limit."""
    ends_at = launched_at() + config.time_limit * 60 if config.time_limit else math.inf
    _silence_libraries()
    process_group = ProcessGroup()  # of one process, until the others are there: errors before that are reported too
    try:
        # Lightning reads ranks from single variables such as RANK, which other programs leave behind, and doesn't know
        # every launcher's.
        environment = cluster_environment()
        rank_zero_only.rank = environment.global_rank() if environment else 0  # type: ignore[attr-defined]
        batches = config.batches
        config = with_length(with_known_sizes(resolve_load_model(config), config.given), batches)
        if config.plan >= 0:
            return _plan(config)
        if config.accelerator == "cpu" or not torch.cuda.is_available():
            set_up_malloc(lean=bool(config.grad_cp or config.chunk_ctx))
        if config.check:
            return check(config, notes) if is_rank_zero() else 0  # started by a launcher, each process would repeat it
        trains = config.train_stage != 1
        if trains and config.data_type == "binidx" and not is_supervised(os.environ):
            open_samples(config)  # a mistake in the data is reported before other processes are started
        if trains and environment is None and math.prod(count_processes(config)) > 1:
            return _launch(config)
        hardware = choose_hardware(config)
        if config.train_stage == 1:
            hardware = replace(hardware, devices=1, num_nodes=1)  # one process writes; of a launcher's, the first
            if not is_rank_zero():
                return 0
        else:
            process_group = join(hardware.accelerator, config.dist_timeout)
            refuse_other_starts(process_group, config)
            config, batch_notes = with_global_batch(config, hardware)
            notes = [*notes, *batch_notes]
            if config.restart and process_group.any_rank([_has_restarted(config)]).wait()[0]:
                config = replace(config, restart=False)
        for note in (*notes, *hardware.notes):
            log(f"note: {note}")
        code = _run_mode(config, hardware, process_group, ends_at)
        # only here: a rank that fails has to end the others by `abort`, not to leave as if its part were done
        process_group.shutdown()
        return code
    except UserError as error:
        return _fail(process_group, error, str(error), USER_ERROR)
    except BuildError as error:
        return _fail(process_group, error, str(error), USER_ERROR)
    except OSError as error:
        return _fail(process_group, error, _describe_os_error(error, config), FAILURE)
    except (FloatingPointError, OutOfMemory) as error:
        return _fail(process_group, error, str(error), FAILURE, can_restart=False)
    except KeyboardInterrupt:
        if is_rank_zero():
            trains = config.train_stage != 1 and config.plan < 0 and not (config.check or config.dry_run)
            advice = f"; {how_to_continue(config)} from the newest saved state or weights" if trains else ""
            log_error(f"interrupted{advice}")
        return INTERRUPTED
    except Exception as error:
        if is_out_of_memory(error):  # outside of the fit, where nobody could say more
            first_line = (str(error).splitlines() or [""])[0]
            message = f"out of memory ({first_line}); see --check"
            return _fail(process_group, error, message, FAILURE, can_restart=False)
        message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        record_failure(error, message, FAILURE, step=process_group.step, can_restart=True, is_expected=False)
        process_group.abort()
        if is_supervised(os.environ):
            return FAILURE  # the agent shows the traceback, of the rank whose error was the first
        raise


def _has_restarted(config: RunConfig) -> bool:
    """Whether the ranks were started again after an attempt that had begun the new run of --restart."""
    if not is_restarted():
        return False
    if not is_supervised(os.environ):  # torchrun's attempts have nothing in common that run.json could record
        return True
    try:
        return run_folder.read_run(Path(config.proj_dir)).get("launch") == launch_id()
    except UserError:  # the earlier run's, damaged: it isn't archived yet
        return False


def _fail(
    process_group: ProcessGroup, error: Exception, message: str, code: int, can_restart: bool | None = None
) -> int:
    can_restart = code != USER_ERROR if can_restart is None else can_restart
    record_failure(error, message, code, step=process_group.step, can_restart=can_restart, is_expected=True)
    # the agent shows the error of the rank that failed first
    if not is_supervised(os.environ) and process_group.should_report(error):
        log_error(message)
    process_group.abort()
    return code


def _launch(config: RunConfig) -> int:
    from src.training.distributed.launch import (
        HERE,
        launch,
    )  # torch's agent, which a single process does without

    devices, nodes = count_processes(config)
    policy = RestartPolicy(
        max_restarts=0 if config.dry_run else config.max_restarts,
        is_elastic=config.fewest_nodes < nodes,
        where_it_continues=partial(_where_it_continues, Path(config.proj_dir)),
    )
    endpoint = config.rdzv_endpoint or (meeting_point(os.environ, nodes) if nodes > 1 else HERE)
    return launch(devices, policy, (config.fewest_nodes, nodes), endpoint)


def _where_it_continues(proj_dir: Path, step: int) -> str:
    """Where the ranks continue that failed in a step, and what is lost. `step`: steps taken, -1 if that isn't known."""
    newest = next((int(folder.name.removeprefix("step-")) for folder in state_folders(proj_dir)), 0)
    if not newest and (weights := run_folder.numbered_weights(proj_dir)):
        return f"from {next(reversed(weights.values())).name}, with a fresh optimizer"
    where = f"from the state of step {newest:,}" if newest else "from the beginning"
    return where + (f" ({step - newest:,} steps are repeated)" if step > newest else "")


def _describe_os_error(error: OSError, config: RunConfig) -> str:
    """An OSError without a number is one of ours, with a whole message; the system's names a file at best."""
    if error.errno is None:
        return str(error)
    path = error.filename or f"--proj_dir {config.proj_dir}"
    advice = f"fix that (space, permissions, connection), and {how_to_continue(config)} from the last save"
    return f"{path}: {error.strerror}; {advice}"


def _run_mode(config: RunConfig, hardware: Hardware, process_group: ProcessGroup, ends_at: float) -> int:
    if config.dry_run:
        return dry_run(config, hardware, Path(config.proj_dir), process_group)
    proj_dir = process_group.broadcast_from_rank_zero(lambda: _writable_folder(config.proj_dir))
    lock = RunLock(proj_dir)  # held by rank 0: one run has one lock, however many processes
    try:
        process_group.broadcast_from_rank_zero(
            partial(_acquire_folder, proj_dir, lock, config.dist_timeout / 2 if is_restarted() else 0)
        )
        _refuse_other_folder(lock)
        if config.train_stage == 1:
            return _write_initial_weights(config, proj_dir, lock)
        return train(config, hardware, proj_dir, lock, process_group, ends_at)
    finally:
        lock.release()


def _plan(config: RunConfig) -> int:
    """Needs no machine like the planned one: everything follows from the flags, and the data for what they leave
    out."""
    if not config.my_exit_tokens and not config.data_file:
        raise UserError("the number of tokens is not known", flag="plan", advice="give --my_exit_tokens or --data_file")
    if config.devices == "auto":
        raise UserError(flag="devices", given="auto", expected="a number of processes per machine with --plan")
    weights = load_weights(Path(config.load_model)) if config.load_model else None
    sizes = config.model_config(find_vocab_size(config, weights))
    exit_tokens = config.my_exit_tokens or max(1, round(config.epochs * open_samples(config).tokens_per_epoch))
    precision = config.precision or ("fp32" if config.accelerator == "cpu" else "bf16")
    log(plan.describe(config, sizes, exit_tokens, int(config.devices) * config.most_nodes, precision))
    return 0


# ---- stage 1 ---------------------------------------------------------------------------------------------------------


def _write_initial_weights(config: RunConfig, proj_dir: Path, lock: RunLock) -> int:
    target = proj_dir / INIT
    sizes = config.model_config(find_vocab_size(config, None))
    if target.exists():
        # never overwritten: a run may have started from these weights
        with torch.device("meta"):
            model = RWKV7(sizes)
        fit_weights(read_weights(target), model, source=str(target))
        log(f"{target} exists and fits; delete it to draw other initial weights")
        return 0
    seed = draw_seed(config)
    pl.seed_everything(seed, verbose=False)
    # bf16 even on a CPU, unless asked for otherwise: the official trainer writes it so
    model = RWKV7(sizes).to(torch.float32 if config.precision in ("fp32", "tf32") else torch.bfloat16)
    save_weights(model.state_dict(), target, lock.check)
    log(f"wrote {target}: {sizes.title}, {parameter_count(sizes):,} parameters, seed {seed}")
    return 0


def _writable_folder(name: str) -> Path:
    folder = Path(name)
    try:
        make_folder(folder)
        probe = folder / ".write-test"  # permissions alone don't tell: read-only mounts, quotas, network file systems
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        problem = f"can't be written ({error.strerror or error})"
        raise UserError(problem, flag="proj_dir", given=name, advice="choose a folder of yours") from error
    return folder


def _acquire_folder(proj_dir: Path, lock: RunLock, seconds: float) -> None:
    """`seconds`: how long to wait for a rank of the attempt before, on a machine that was cut off."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            lock.acquire()
            break
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
    run_folder.remove_leftovers(proj_dir)


def _refuse_other_folder(lock: RunLock) -> None:
    """Raises UserError on a machine whose folder of this name is another one than rank 0's, which holds the lock."""
    if not lock.path.exists():
        raise UserError(
            "is not the folder that rank 0 uses",
            flag="proj_dir",
            given=lock.folder,
            expected="one folder, shared by all machines: every process writes its part of the saved states",
        )


def _silence_libraries() -> None:
    """Lightning's banners and advice repeat what the summary shows, or don't apply."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", module="lightning_fabric")

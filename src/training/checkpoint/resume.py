"""Finds the point that a run resumes from: a full state, else numbered weights, else initial weights."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

from src.config import RunConfig, keeps_base
from src.dataset.tokenizer_files import copy_tokenizer
from src.errors import UserError
from src.inference.adaptation import multimodal_folder
from src.inference.load import find_weights, holds_model
from src.model.file_kind import file_kind
from src.model.weights import read_weights
from src.run_folder import (
    ALL_RESULTS,
    BEST,
    FINAL,
    MULTIMODAL,
    TOKENIZER,
    WEIGHTS,
    archive_run,
    is_swapped,
    numbered_results,
    numbered_weights,
    origin_weights,
    read_run,
    rename_damaged,
)
from src.training.checkpoint.manifest import DamagedStateError
from src.training.checkpoint.reader import StateReader
from src.training.checkpoint.results import result_names
from src.training.checkpoint.state import Position, SavedState
from src.training.checkpoint.storage import state_folders
from src.training.console import log
from src.training.schedule import RunLength


@dataclass(frozen=True)
class ResumePoint:
    """Where a run continues: at `position`, from the full `state`, else from `weights` (None: new ones). A run that
    trains an adapter has both: the weights are its base.

    `reader` gives the tensors of the full state. Its manifest and state.json are read already, by rank 0: no byte of
    these is read twice.
    """

    position: Position
    length: RunLength
    weights: Path | None = None
    state: SavedState | None = None
    reader: StateReader | None = None

    @property
    def first_mini_epoch(self) -> int:
        return self.length.mini_epoch(self.position.step) if self.position.step else 0


def length_of_run(config: RunConfig, tokens_per_epoch: int, processes: int) -> RunLength:
    """Of a run from its beginning, on data of `tokens_per_epoch` positions."""
    global_batch = config.micro_bsz * config.accumulate_grad_batches * processes
    exit_tokens = config.my_exit_tokens or max(1, round(config.epochs * tokens_per_epoch))
    return RunLength.of(exit_tokens, config.ctx_len, global_batch, config.epoch_steps)


def resolve_load_model(config: RunConfig) -> RunConfig:
    """`config` with the path of the weights file in place of a run's folder in --load_model.

    A Hugging Face folder stays, as it is read as a whole. So does a folder without weights: whether they are needed is
    known once the run's own files are looked for.
    """
    folder = Path(config.load_model)
    if not config.load_model or not folder.is_dir():
        return config
    # A base that was trained further since must not make this another run, as long as the file it began with is there.
    # With --restart run.json isn't read: it may be damaged.
    recorded = "" if config.restart else read_run(Path(config.proj_dir)).get("origin", {}).get("path", "")
    if recorded and Path(recorded).parent == folder and Path(recorded).is_file():
        return replace(config, load_model=recorded)
    try:
        media = multimodal_folder(folder)
        if config.encoder and media is not None and not config.load_projector:
            config = replace(config, load_projector=str(media))
        return replace(config, load_model=str(find_weights(folder)))
    except UserError:
        return config


def archive_other_run(config: RunConfig, proj_dir: Path) -> None:
    """Archive the folder's run when this command starts another one: with --restart, or when the initial weights are
    not those that it started from (the swap of rwkv-init.pth that people do by hand). Nothing is deleted."""
    origin, reason = _origin_and_reason(config, proj_dir)
    tokenizer = proj_dir / TOKENIZER
    # compared before the folder is moved
    uses_copy = tokenizer.is_dir() and Path(config.tokenizer or "world").resolve() == tokenizer.resolve()
    if reason and (archive := archive_run(proj_dir, new_origin=origin)):
        log(f"{reason}; the earlier run is archived in {archive}")
        if uses_copy:  # --tokenizer names the folder that was just moved
            copy_tokenizer(archive / TOKENIZER, tokenizer)


def starts_new_run(config: RunConfig, proj_dir: Path) -> bool:
    """Whether this command starts another run than the one in the folder, if any. Errors as of `_origin_and_reason`."""
    return bool(_origin_and_reason(config, proj_dir)[1])


def _origin_and_reason(config: RunConfig, proj_dir: Path) -> tuple[Path | None, str]:
    """(weights at step 0, reason to start a new run or '').

    Raises UserError when the weights are not there, or belong to the run itself.
    """
    origin = origin_weights(proj_dir, config.train_stage, config.load_model)
    names = result_names(config)
    has_run = bool(
        numbered_results(proj_dir, names) or state_folders(proj_dir) or any(map(Path.exists, _finals(proj_dir)))
    )
    if has_run and not config.restart:
        _refuse_other_kind(config, proj_dir)
    if origin is not None and not holds_model(origin):
        if has_run and not config.restart and not keeps_base(config):
            return None, ""  # the run continues from its own files
        if origin.is_dir():
            try:
                find_weights(origin)  # for its error: `resolve_load_model` found no weights in this folder
            except UserError as error:
                error.flag = "load_model"
                raise
        raise UserError("no such file", flag="load_model", given=origin)
    if config.load_model and origin is not None and _belongs_to_run(origin, proj_dir):
        raise UserError(
            f"belongs to the run in --proj_dir {proj_dir} itself",
            flag="load_model",
            given=origin,
            advice="leave the flag out to continue that run, or start another one from them in a --proj_dir of its own",
        )
    if config.restart:  # before the comparison of hashes, which reads the whole file
        return origin, "--restart: a new run begins (leave the flag out to continue it later)"
    # of an adapter's run, the base is compared by its numbers (`resolve_base`), and another one is refused
    if (has_run and keeps_base(config)) or not is_swapped(proj_dir, origin):
        return origin, ""
    return origin, f"{origin} is not what the run in {proj_dir} started from: a new run begins"


def _finals(proj_dir: Path) -> list[Path]:
    return [proj_dir / names.final for names in ALL_RESULTS]


def _refuse_other_kind(config: RunConfig, proj_dir: Path) -> None:
    """Raises UserError when the run in the folder trains something else than this command does."""
    before = {"peft": "none", "train_type": "none", "encoder": "", **read_run(proj_dir).get("settings", {})}
    for flag in ("peft", "train_type", "encoder"):
        if flag == "encoder" and all(kind.startswith("hf:") for kind in (before[flag], config.encoder)):
            continue  # folders are compared by their content, with the other settings
        if before[flag] != getattr(config, flag):
            raise UserError(
                f"was {before[flag]} in the run of {proj_dir}",
                flag=flag,
                given=getattr(config, flag),
                advice="give another run a --proj_dir of its own, or add --restart 1 (the earlier one is archived)",
            )


def _belongs_to_run(weights: Path, proj_dir: Path) -> bool:
    own = [*numbered_weights(proj_dir).values(), proj_dir / FINAL, proj_dir / BEST]
    return any(path.exists() and path.samefile(weights) for path in own)


def peek_resume_point(config: RunConfig, proj_dir: Path, length: RunLength) -> ResumePoint:
    """Where a run would resume, without moving a file. Errors as of `archive_other_run` and `find_resume_point`."""
    origin, reason = _origin_and_reason(config, proj_dir)
    if reason:
        return ResumePoint(_with_fresh_optimizer(length, 0), length, weights=origin)
    return find_resume_point(config, proj_dir, length, peek=True)


def find_resume_point(config: RunConfig, proj_dir: Path, length: RunLength, peek: bool = False) -> ResumePoint:
    """In this order: the newest full state; the highest rwkv-N.pth; rwkv-init.pth or --load_model; new weights (stage
    0).

    `length` is that of a run from its beginning with these settings. States whose manifest or state.json is damaged,
    and damaged rwkv-N.pth, are archived (`peek`: passed over); damaged tensors of a state are found when they are
    loaded. Raises UserError when a stage that continues finds nothing, and when the weights were removed but a state is
    there: what is meant can't be known.
    """
    saved = _newest_state(proj_dir, peek)
    names = result_names(config)
    numbered = numbered_results(proj_dir, names)
    base = origin_weights(proj_dir, config.train_stage, config.load_model) if keeps_base(config) else None
    if saved is not None:
        reader, state = saved
        position = state.position
        # People start over by deleting *.pth. The state alone would continue, silently, the run that they meant to
        # delete.
        if position.weights_written and not numbered:
            removed = f"{names.prefix}N{names.suffix}"
            raise UserError(
                f"the run's {removed} were removed, but its full state at step {position.step} is there",
                flag="proj_dir",
                given=proj_dir,
                advice="put the newest back to continue, or add --restart 1 to start again from the initial "
                "weights (the state is archived)",
            )
        return ResumePoint(position, _rest_of_run(length, position), base, state, reader)
    if numbered and names is not WEIGHTS:
        start = "merge it into its base (python -m src.inference.export --adapter) and start from that"
        if names is MULTIMODAL:
            start = "name it as --load_model and --load_projector of another run"
        raise UserError(
            f"the run's full states are gone: {next(reversed(numbered.values()))} alone can't be continued",
            flag="proj_dir",
            given=proj_dir,
            advice=f"{start}, or add --restart 1 to start again",
        )
    if (newest := _newest_readable(numbered, peek)) is not None:
        return _after_numbered_weights(proj_dir, length, newest, numbered[newest])
    origin = origin_weights(proj_dir, config.train_stage, config.load_model)
    if origin is None and config.train_stage >= 2:
        raise UserError(
            f"continues what is in --proj_dir, but {proj_dir} holds no rwkv-init.pth and no rwkv-N.pth",
            flag="train_stage",
            given=config.train_stage,
            advice="write initial weights first (--train_stage 1), or start from a file with --load_model",
        )
    # --epoch_begin N: as in the official trainer, with weights of mini-epoch N - 1 from elsewhere
    step = length.step_after(config.epoch_begin - 1) if config.epoch_begin else 0
    if step >= length.steps:
        raise UserError(
            f"the run has only {length.mini_epoch(length.steps - 1) + 1} mini-epochs, so nothing would be trained",
            flag="epoch_begin",
            given=config.epoch_begin,
            expected="fewer, or a larger --my_exit_tokens",
        )
    return ResumePoint(_with_fresh_optimizer(length, step), length, weights=origin)


def archive_damaged_state(folder: Path, error: DamagedStateError) -> None:
    """Rename a damaged state and warn, so that the next search finds the one before."""
    archived = rename_damaged(folder).name
    log(f"WARNING: the saved state {folder} is damaged: {error}; renamed to {archived}, using the one before")


def _newest_state(proj_dir: Path, peek: bool) -> tuple[StateReader, SavedState] | None:
    for folder in state_folders(proj_dir):
        try:
            reader = StateReader(folder)
            return reader, SavedState.from_payload(reader.payload)
        except DamagedStateError as error:
            if peek:
                log(f"WARNING: the saved state {folder} is damaged: {error}; the one before would be used")
            else:
                archive_damaged_state(folder, error)
    return None


def _newest_readable(numbered: dict[int, Path], peek: bool) -> int | None:
    """The highest N of the rwkv-N.pth that are not damaged; damaged ones above it are archived (`peek`: passed
    over)."""
    for mini_epoch, path in reversed(numbered.items()):
        problem = _damage(path)
        if not problem:
            return mini_epoch
        if peek:
            log(f"WARNING: {path} is damaged: {problem}; the one before would be used")
        else:
            log(f"WARNING: {path} is damaged: {problem}; renamed to {rename_damaged(path).name}, using the one before")
    return None


def _damage(path: Path) -> str:
    """What is wrong with a weights file whose bytes are not those that were written; "" for all others."""
    try:
        read_weights(path)  # maps the file: nothing is read twice
        return ""
    except UserError as error:
        # A file that is whole, but not a state dict, was put there by the user. Where the run has to start from it,
        # reading it raises this error again: to go on without it would hide the mistake.
        return "" if _is_whole(path) else error.problem


def _is_whole(path: Path) -> bool:
    """Whether a file is a zip archive, as torch.save writes them, whose checksums agree. True also for a file of
    another kind, which no damage makes of an archive, and where there is no file to read."""
    try:
        if file_kind(path) in ("pickle", "safetensors"):
            return True
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except UserError:  # of file_kind: a file of another program
        return True
    except (PermissionError, IsADirectoryError, FileNotFoundError):  # the last: a link to a disk that isn't mounted
        return True
    except Exception:  # zipfile raises half a dozen types for a damaged file
        return False


def _after_numbered_weights(proj_dir: Path, length: RunLength, mini_epoch: int, path: Path) -> ResumePoint:
    # in the batches, mini-epochs and length of the start that saved them, where these are recorded
    run = read_run(proj_dir)
    settings = run.get("settings", {})
    previous = replace(
        length,
        exit_tokens=settings.get("my_exit_tokens", length.exit_tokens),
        global_batch=settings.get("global_batch", length.global_batch),
        mini_epoch_samples=run.get("mini_epoch_samples", length.mini_epoch_samples),
    )
    position = _with_fresh_optimizer(previous, previous.step_after(mini_epoch))
    return ResumePoint(position, _rest_of_run(length, position), weights=path)


def _with_fresh_optimizer(length: RunLength, step: int) -> Position:
    samples = length.samples(step)
    # the schedule renews its warm-up from there: Adam's moments are zero, its first steps would be too large
    return Position(step, samples, length.mini_epoch_samples, restarted_at_sample=samples)


def _rest_of_run(length: RunLength, position: Position) -> RunLength:
    """The rest of a run with this length's batch; its mini-epochs stay what they were."""
    return RunLength(
        length.exit_tokens,
        length.ctx_len,
        length.global_batch,
        position.mini_epoch_samples,
        position.step,
        position.samples,
    )

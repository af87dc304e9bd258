"""A run's folder (--proj_dir): the names of its files, run.json, numbered weights, archiving of an earlier run.

    rwkv-init.pth  rwkv-N.pth  rwkv-final.pth  rwkv-best.pth    plain state dicts
    adapter-N/  adapter/  adapter-best/                         an adapter, in place of the weights
    state-N.pth  state.pth  state-best.pth                      tuned initial states, in place of the weights
    multimodal-N/  multimodal/  multimodal-best/                with an encoder: all that was trained, as one folder
    run.json                                                    what the run recorded about itself (`read_run`)
    train_log.txt  metrics.csv  val.csv  samples.json           logs
    loss.png  report.html  profile.json.gz                      figures
    resume/                                                     full states (training/checkpoint)
    previous-K/                                                 an earlier run's files

The only module that knows these names and opens run.json: training writes and inference reads through it. What a run
records in it is decided in src/training/settings.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import UserError
from src.files import atomic_write, file_lock, sha256_of, sync_folder

INIT, FINAL, BEST = "rwkv-init.pth", "rwkv-final.pth", "rwkv-best.pth"
LOG, METRICS, VALIDATION, SAMPLES, RUN = "train_log.txt", "metrics.csv", "val.csv", "samples.json", "run.json"
FIGURE, REPORT, TRACE, TOKENIZER = "loss.png", "report.html", "profile.json.gz", "tokenizer"
STATES, LOCK = "resume", ".lock"
MODEL_CONFIG = "config.json"  # of folders in a Hugging Face layout; a run has none
# What belongs to one run, besides its weights. RUN comes last: a process that dies while moving them finds on its next
# start that there is something left to move.
BELONGS_TO_RUN = (
    *(LOG, METRICS, VALIDATION, SAMPLES, FIGURE, REPORT, TRACE, TOKENIZER),
    *(STATES, "wandb", "tensorboard", "csv", RUN),
)
# Of run.json. 1 (and files without a number): up to November 2026. 2: the number itself.
FORMAT_VERSION = 2
COUNTS_OF_SETTINGS = ("ctx_len", "vocab_size", "my_exit_tokens", "global_batch", "epoch_steps")  # computed with


@dataclass(frozen=True)
class ResultNames:
    """Names of what a run trains, in its folder: after the last step, with the lowest held-out loss, and
    {prefix}N{suffix} after mini-epoch N."""

    final: str
    best: str
    prefix: str
    suffix: str

    def numbered(self, mini_epoch: int) -> str:
        return f"{self.prefix}{mini_epoch}{self.suffix}"

    def matches(self, name: str) -> bool:
        """Whether a file of this name is one of these."""
        number = rf"{re.escape(self.prefix)}\d+{re.escape(self.suffix)}"
        return name in (self.final, self.best) or re.fullmatch(number, name) is not None


WEIGHTS = ResultNames(FINAL, BEST, "rwkv-", ".pth")
ADAPTER = ResultNames("adapter", "adapter-best", "adapter-", "")
TUNED_STATE = ResultNames("state.pth", "state-best.pth", "state-", ".pth")
MULTIMODAL = ResultNames("multimodal", "multimodal-best", "multimodal-", "")
ALL_RESULTS = (WEIGHTS, ADAPTER, TUNED_STATE, MULTIMODAL)


def numbered_results(folder: Path, names: ResultNames) -> dict[int, Path]:
    """What was written after mini-epochs, by N, in ascending order."""
    # as `numbered` writes them, up to a number that a run can reach: rwkv-99999999999999999999.pth is none
    pattern = re.compile(rf"{re.escape(names.prefix)}(0|[1-9][0-9]{{0,8}}){re.escape(names.suffix)}")
    matches = ((pattern.fullmatch(path.name), path) for path in folder.glob(f"{names.prefix}*{names.suffix}"))
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def numbered_weights(folder: Path) -> dict[int, Path]:
    """The rwkv-N.pth files by N, in ascending order."""
    return numbered_results(folder, WEIGHTS)


def newest_weights(folder: Path) -> Path | None:
    """The weights that are trained furthest: rwkv-final.pth, else the highest rwkv-N.pth, else rwkv-init.pth; None
    where there are none."""
    candidates = [folder / FINAL, *reversed(numbered_weights(folder).values()), folder / INIT]
    return next((path for path in candidates if path.is_file()), None)


def newest_result(folder: Path, names: ResultNames) -> Path | None:
    """What is trained furthest: the final result, else the one with the highest number; None where there are none."""
    candidates = [folder / names.final, *reversed(numbered_results(folder, names).values())]
    return next((path for path in candidates if path.exists()), None)


def read_run(folder: Path) -> dict[str, Any]:
    """The content of run.json; {} where there is none. Raises UserError when it can't be read or is of a later
    format."""
    path = folder / RUN
    if not path.exists():
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        _check_record(run)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"unreadable ({error})", given=path, advice="delete it to continue without what it records"
        ) from error
    version = run.get("version", 1)
    if version > FORMAT_VERSION:
        raise UserError(
            f"format version {version}", given=path, expected=f"at most {FORMAT_VERSION}", advice="update this program"
        )
    return run


def _check_record(run: Any) -> None:
    """Raises ValueError when what is read from run.json has not the types that a run writes."""
    if not isinstance(run, dict):
        raise ValueError("no object")
    settings, origin = run.get("settings", {}), run.get("origin", {})
    values: list[tuple[str, Any, type]] = [
        ("version", run.get("version", 1), int),
        ("settings", settings, dict),
        ("origin", origin, dict),
    ]
    values += [(name, run.get(name, {}), dict) for name in ("environment", "held_out")]
    values += [(name, run.get(name, ""), str) for name in ("tokenizer", "wandb_id", "launch")]
    if isinstance(settings, dict) and isinstance(origin, dict):
        values += [(f"origin {name}", origin.get(name, ""), str) for name in ("sha256", "path")]
        values += [(name, settings.get(name, 1), int) for name in COUNTS_OF_SETTINGS]
        values += [(name, settings.get(name, ""), str) for name in ("precision", "accelerator", "data_type")]
    values.append(("mini_epoch_samples", run.get("mini_epoch_samples", 1), int))
    for name, value, kind in values:
        is_right = type(value) is kind and (not isinstance(value, int) or 0 <= value < 1 << 63)
        if not is_right:
            raise ValueError(f"{name} is {str(value)[:40]!r}")


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Write run.json, whole or not at all. Raises OSError."""
    with atomic_write(folder / RUN, "w") as file:
        json.dump({**run, "version": FORMAT_VERSION}, file, indent=1)
        file.write("\n")


def origin_weights(folder: Path, stage: int, load_model: str) -> Path | None:
    """The weights that a run in this folder starts from at step 0; None: new ones are drawn."""
    if load_model:
        return Path(load_model)
    init = folder / INIT
    return init if stage >= 2 and init.exists() else None


def fingerprint(weights: Path | None) -> dict[str, Any]:
    """What tells initial weights apart: the SHA-256 of the file, or of the list of a Hugging Face folder's files with
    theirs. Empty for None, weights that are drawn: `replace_drawn_init` records their SHA-256, without a path."""
    if weights is None:
        return {"sha256": "", "path": ""}
    if not weights.is_dir():
        return {"sha256": sha256_of(weights), "path": str(weights)}
    files = sorted(path for path in weights.iterdir() if path.suffix in (".safetensors", ".bin"))
    contents = "".join(f"{sha256_of(path)}  {path.name}\n" for path in (weights / MODEL_CONFIG, *files))
    return {"sha256": hashlib.sha256(contents.encode()).hexdigest(), "path": str(weights)}


def is_swapped(folder: Path, origin: Path | None) -> bool:
    """Whether `origin` is another file than the one that the run in the folder started from, so that a new run
    starts."""
    recorded = read_run(folder).get("origin")
    if recorded is None or origin is None or not (origin.is_file() or (origin / MODEL_CONFIG).is_file()):
        return False
    return fingerprint(origin)["sha256"] != recorded.get("sha256")


def has_drawn_init(folder: Path) -> bool:
    """Whether rwkv-init.pth is the file that the run in the folder wrote when it drew its initial weights; not one of
    stage 1 or of the user. False where run.json can't be read."""
    init = folder / INIT
    try:
        origin = read_run(folder).get("origin", {})
    except UserError:  # --restart archives a run.json that is damaged
        return False
    # without a path: weights that were read from rwkv-init.pth are recorded with it
    is_drawn = bool(origin.get("sha256")) and not origin.get("path")
    return is_drawn and init.is_file() and sha256_of(init) == origin["sha256"]


def replace_drawn_init(folder: Path, save: Callable[[Path], None]) -> None:
    """Write rwkv-init.pth by `save(path)`, and its SHA-256 to run.json, unless there is such a file that the run did
    not write itself. Raises OSError."""
    init = folder / INIT
    # a start that is cut before its first save is drawn anew by the next, maybe from another seed: its file is replaced
    if init.exists() and not has_drawn_init(folder):
        return
    temporary = init.with_name(f".{INIT}.{os.getpid()}.tmp")  # a name that `remove_leftovers` recognizes
    try:
        save(temporary)
        run = read_run(folder)
        run["origin"] = {**run.get("origin", {}), "sha256": sha256_of(temporary), "path": ""}
        # In this order, since a kill may come in between: a record without its file does no harm, but a file without
        # its record would be taken for the user's, and stage 3 would start another run from it.
        init.unlink(missing_ok=True)
        write_run(folder, run)
        os.replace(temporary, init)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(folder)


def archive_run(folder: Path, new_origin: Path | None = None) -> Path | None:
    """Move the files of an earlier run to `previous-K/`; nothing is deleted. None when there was nothing to move.

    rwkv-init.pth moves along when the run wrote it itself, unless the new run starts from it (`new_origin`).
    """
    members = [*_archived(folder / VALIDATION)]
    for names in ALL_RESULTS:
        members += [*numbered_results(folder, names).values(), *_archived(folder / names.best)]
        members += [folder / name for name in (names.final, names.best) if (folder / name).exists()]
    members += folder.glob("damaged-*")
    init = folder / INIT
    is_new_origin = new_origin is not None and init.exists() and new_origin.samefile(init)
    if not is_new_origin and has_drawn_init(folder):
        members.append(init)
    members += [folder / name for name in BELONGS_TO_RUN if (folder / name).exists()]
    if not members:
        return None
    k = 1
    while (folder / f"previous-{k}").exists():
        k += 1
    archive = folder / f"previous-{k}"
    archive.mkdir()
    for member in members:
        member.rename(archive / member.name)
    sync_folder(archive)
    sync_folder(folder)
    return archive


def rename_damaged(path: Path) -> Path:
    """Rename a damaged file or state to damaged-NAME, so that it doesn't count among those that are kept."""
    archived, k = path.with_name(f"damaged-{path.name}"), 1
    while archived.exists():
        k += 1
        archived = path.with_name(f"damaged-{path.name}-{k}")
    return path.rename(archived)


def archive_file(path: Path) -> Path | None:
    """Rename a file to NAME-{k}.SUFFIX, after those that are there. None when there is no such file."""
    if not path.exists():
        return None
    k = max((int(other.stem.rpartition("-")[2]) for other in _archived(path)), default=0) + 1
    archived = path.with_stem(f"{path.stem}-{k}")
    path.rename(archived)
    return archived


def _archived(path: Path) -> list[Path]:
    """What `archive_file` made of earlier files of this name."""
    return [other for other in path.parent.glob(f"{path.stem}-*{path.suffix}") if re.fullmatch(r".*-\d+", other.stem)]


class RunLock:
    """The lock of a run's folder. Two runs in one folder would overwrite each other's weights."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LOCK
        self._held = ExitStack()
        self._identity: tuple[int, int] | None = None

    def acquire(self) -> None:
        """Hold the lock until `release` or the process ends. Raises UserError when another run has it."""
        try:
            is_held = self._held.enter_context(file_lock(self.path, wait=False))
        except BlockingIOError:
            raise UserError(
                "another run is using this folder",
                flag="proj_dir",
                given=self.folder,
                advice="wait for it, stop it, or choose another folder",
            ) from None
        # Where the file system has no locks, an inode number may not last either.
        self._identity = self._identity_now() if is_held else None

    def release(self) -> None:
        self._held.close()
        self._identity = None

    def check(self) -> None:
        """Raises UserError when the file of the lock's name is another one: the folder was moved, or the lock removed,
        and another run may have the folder now. To be called before anything is written under its final name; does
        nothing in a process that doesn't hold the lock."""
        if self._identity is not None and self._identity_now() != self._identity:
            raise UserError(
                f"the folder was moved, or its {LOCK} removed, while the run was using it",
                flag="proj_dir",
                given=self.folder,
                advice="nothing was overwritten; where the folder is now, the same command continues from the last "
                "save: one run at a time",
            )

    def _identity_now(self) -> tuple[int, int] | None:
        try:
            stat = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return stat.st_dev, stat.st_ino


def remove_leftovers(folder: Path) -> None:
    """Remove what a process left behind that was killed while it wrote. Only for the process that holds the folder's
    lock."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name) and path.is_file():  # as `atomic_write` names them
            path.unlink(missing_ok=True)
    for trace in folder.glob(f".{TRACE}.*"):
        shutil.rmtree(trace, ignore_errors=True)
    results = [part for names in (ADAPTER, MULTIMODAL) for part in folder.glob(f".{names.final}*.tmp")]
    for part in [*(folder / STATES).glob(".step-*.tmp"), *results]:  # folders
        name, replaced = part.name[1:].split(".")[0], part.name.endswith(".replaced.tmp")
        if replaced and not (part.parent / name).exists():  # killed before the new one took its place
            part.rename(part.parent / name)
        else:
            shutil.rmtree(part, ignore_errors=True)

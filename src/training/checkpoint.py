"""The files of a run in --proj_dir, and what a start continues from.

`rwkv-init.pth`, `rwkv-N.pth` and `rwkv-final.pth` are plain state dicts. `run.json` remembers the settings and the hash of
the weights that the run started from: other weights there mean another run, and the old one is put aside.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.files import sha256_of, write_whole
from src.training.folder import BEST, FINAL, INIT, KEPT, RUN, TRACE, VALIDATION


def numbered(proj_dir: Path) -> dict[int, Path]:
    """The rwkv-N.pth files by N."""
    found = {
        int(m.group(1)): path
        for path in proj_dir.glob("rwkv-*.pth")
        if (m := re.fullmatch(r"rwkv-(\d+)\.pth", path.name))
    }
    return dict(sorted(found.items()))


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """A state dict under `path`, whole or not at all.

    Tried twice; then OSError (disk full, folder gone, no permission) with the path and what still stands, so that the run
    fails visibly instead of training on without being saved.
    """
    weights = {name: tensor.detach().to("cpu").contiguous() for name, tensor in weights.items()}
    for last_try in (False, True):
        try:
            with write_whole(path) as file:
                torch.save(weights, file)
            return
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            if last_try:
                raise OSError(
                    f"{path} could not be written ({str(error).splitlines()[0]}). The weights saved before are whole; "
                    "free some space or mend the folder and run the same command again: it continues from them"
                ) from error


def origin_weights(proj_dir: Path, stage: int, load_model: str) -> Path | None:
    """The weights that a run in this folder starts from at step 0; None: new ones are drawn."""
    if load_model:
        return Path(load_model)
    init = proj_dir / INIT
    return init if stage >= 2 and init.exists() else None


def read_run(proj_dir: Path) -> dict[str, Any]:
    """What run.json remembers; empty when there is none. Raises ValueError when it can't be read."""
    path = proj_dir / RUN
    if not path.exists():
        return {}
    try:
        remembered = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(remembered, dict) or not all(
            isinstance(remembered.get(name, {}), dict) for name in ("origin", "settings")
        ):
            raise ValueError("not what a run wrote")
        return remembered
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: can't be read ({error}); delete it to go on without what it remembers") from error


def write_run(proj_dir: Path, remembered: dict[str, Any]) -> None:
    """Writes run.json, whole or not at all. Raises OSError."""
    with write_whole(proj_dir / RUN, "w") as file:
        json.dump(remembered, file, indent=1)
        file.write("\n")


def fingerprint(path: Path | None) -> dict[str, Any]:
    """What tells weights apart: SHA-256 of the file (None: drawn anew)."""
    if path is None:
        return {"sha256": "", "path": ""}
    return {"sha256": sha256_of(path), "path": str(path)}


def is_swapped(proj_dir: Path, origin: Path | None) -> bool:
    """Whether `origin` is a file other than the one that the run in the folder started from: a new run begins then."""
    before = read_run(proj_dir).get("origin")
    return (
        before is not None
        and origin is not None
        and origin.is_file()
        and fingerprint(origin)["sha256"] != before["sha256"]
    )


def sweep(proj_dir: Path) -> None:
    """Removes what processes left that were killed while they wrote. Only for who holds the folder."""
    for path in proj_dir.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name) and path.is_file():  # as `write_whole` names them
            path.unlink(missing_ok=True)
    for folder in proj_dir.glob(f".{TRACE}.*"):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (proj_dir / "resume").glob(".step-*.tmp"):
        step, replaced = folder.name[1:].split(".")[0], folder.name.endswith(".replaced.tmp")
        if replaced and not (folder.parent / step).exists():  # killed before the new one took its place
            folder.rename(folder.parent / step)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def put_aside(proj_dir: Path) -> Path | None:
    """Move the files of an earlier run to `previous-{k}/`; nothing is deleted. None when there was nothing to move."""
    members = [*numbered(proj_dir).values(), *_asides(proj_dir / VALIDATION), *_asides(proj_dir / BEST)]
    members += [proj_dir / name for name in (FINAL, BEST, *KEPT) if (proj_dir / name).exists()]
    if not members:
        return None
    k = 1
    while (proj_dir / f"previous-{k}").exists():
        k += 1
    aside = proj_dir / f"previous-{k}"
    aside.mkdir()
    for member in members:
        member.rename(aside / member.name)
    return aside


def put_aside_one(path: Path) -> Path | None:
    """Rename a file to NAME-{k}.SUFFIX, after those that are there. None when it isn't there itself."""
    if not path.exists():
        return None
    k = max((int(other.stem.rpartition("-")[2]) for other in _asides(path)), default=0) + 1
    aside = path.with_stem(f"{path.stem}-{k}")
    path.rename(aside)
    return aside


def _asides(path: Path) -> list[Path]:
    """What `put_aside_one` made of earlier files of this name."""
    return [other for other in path.parent.glob(f"{path.stem}-*{path.suffix}") if re.fullmatch(r".*-\d+", other.stem)]

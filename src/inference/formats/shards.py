"""The weights files of a Hugging Face folder: one file, or parts that an index names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from src.dataset.tokenizer_files import check_size
from src.errors import UserError
from src.files import atomic_write
from src.model.weights import Weights, plain_name, read_weights

# The names that transformers looks for, in its order.
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
PART = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")  # NAME-00001-of-00003.safetensors
MAX_JSON_BYTES = 100_000_000  # the index of a model of 100 layers has half a megabyte
DOWNLOAD = "download the folder again, or the missing files of the same version"


def is_part(path: Path) -> bool:
    """Whether a file is, by its name, one of several parts of a model."""
    match = PART.fullmatch(path.name)
    return match is not None and int(match[3]) > 1


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} for other content. Raises UserError when it can't be read or is huge."""
    try:
        check_size(path, MAX_JSON_BYTES)
        content = json.loads(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"can't be read ({error})", given=path) from error
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all. Raises OSError."""
    with atomic_write(path, "w") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_shards(folder: Path) -> Weights:
    """All tensors of a folder under the names in its files.

    Raises UserError when there are none, when a part is missing, is of another version than the index, or when the
    folder holds two copies of a model, as which of them is current can't be known.
    """
    # safetensors first: many folders hold both formats of the same weights, and transformers prefers it, too
    for name in WHOLE_FILES:
        whole, index = folder / name, folder / f"{name}.index.json"
        parts = _parts(folder, whole)
        # Some exporters write an index of the whole file, too.
        if whole.is_file() and (parts or _names_others(index, name)):
            # transformers would take the whole file without a word, and a later download in parts would be ignored
            raise UserError(
                f"contains {name} and also parts of a model ({(parts or [index])[0].name})",
                given=folder,
                expected="one copy of the weights",
                advice="remove the one that is out of date",
            )
        if index.is_file():
            return _read_by_index(folder, index)
        if whole.is_file():
            return read_weights(whole)
        if parts:
            return _merge({part: read_weights(part) for part in _complete(parts, folder)})
    return _read_other_names(folder)


def _parts(folder: Path, whole: Path) -> list[Path]:
    """The files that are, by their names, parts of the model that `whole` would hold in one file."""
    return sorted(path for path in folder.glob(f"{whole.stem}-*{whole.suffix}") if PART.fullmatch(path.name))


def _complete(parts: list[Path], folder: Path) -> list[Path]:
    """`parts`, if there is one of each number. Raises UserError otherwise."""
    # by the names alone: without an index nothing else says how many parts there should be
    matches = [match for part in parts if (match := PART.fullmatch(part.name))]
    totals = {int(match[3]) for match in matches}
    if len(totals) > 1:
        raise UserError(
            f"contains parts of two copies of a model ({parts[0].name}, {parts[-1].name})",
            given=folder,
            expected="one copy of the weights",
            advice="remove the one that is out of date",
        )
    (total,) = totals
    if missing := sorted(set(range(1, total + 1)) - {int(match[2]) for match in matches}):
        raise UserError(
            f"parts {missing} of the {total} of this model are missing", given=folder, expected="all", advice=DOWNLOAD
        )
    return parts


def _read_by_index(folder: Path, index: Path) -> Weights:
    """The tensors that an index names, from the files in which it places them."""
    places = _places(index)
    # Parts that the index doesn't name are left alone: they are of an earlier version, or of an adapter.
    files = sorted(set(places.values()))
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise UserError(
            f"{', '.join(missing[:3])} is missing ({len(missing)} of {len(files)} files that {index.name} names)",
            given=folder,
            advice=DOWNLOAD,
        )
    contents = {folder / name: read_weights(folder / name) for name in files}
    # a part of another version has the right name and other tensors
    for name, file in places.items():
        if plain_name(name) not in contents[folder / file]:
            raise UserError(f"lacks {name}, which {index.name} places in it", given=folder / file, advice=DOWNLOAD)
    return _merge(contents)


def _places(index: Path) -> dict[str, str]:
    """The file of each parameter in an index."""
    places = read_json(index).get("weight_map")
    # Plain names only: an index that came with a download must not choose files elsewhere on this machine.
    if not isinstance(places, dict) or not all(isinstance(f, str) and Path(f).name == f for f in places.values()):
        raise UserError("not an index: weight_map doesn't map parameters to files", given=index, advice=DOWNLOAD)
    return places


def _names_others(index: Path, name: str) -> bool:
    """Whether there is an index that names other files than this one."""
    return index.is_file() and set(_places(index).values()) != {name}


def _read_other_names(folder: Path) -> Weights:
    """The tensors of the only .safetensors files, under a name that is not one of `WHOLE_FILES`."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        expected = " or ".join(WHOLE_FILES)
        raise UserError("no weights next to config.json", given=folder, expected=expected, advice="download them, too")
    parts = [file for file in files if PART.fullmatch(file.name)]
    if parts and len(parts) < len(files):
        whole = next(file for file in files if file not in parts)
        raise UserError(
            f"contains {whole.name} and also parts of a model ({parts[0].name})",
            given=folder,
            expected="one copy of the weights",
            advice="remove the one that is out of date",
        )
    return _merge({file: read_weights(file) for file in (_complete(parts, folder) if parts else files)})


def _merge(contents: dict[Path, Weights]) -> Weights:
    """The tensors of several files together. Raises UserError when two of them have the same name."""
    merged: Weights = {}
    # dict's own union would keep the tensor of the last file, in alphabetical order, whichever is current
    for file, weights in contents.items():
        if repeated := next((name for name in weights if name in merged), ""):
            raise UserError(
                f"{repeated} is in this file and in another one of the folder",
                given=file,
                expected="one copy of the weights",
                advice="remove the file that is out of date",
            )
        merged |= weights
    return merged

"""A model with a front end as one folder: what a run with --encoder writes, and what chat, evaluation and export read.

multimodal.json     format version, settings of encoder and projector, and which of the following there are
media.safetensors   weights of the projector, and of the encoder unless it is a frozen one of another folder
rwkv.pth            the language model, where it was trained in full; else base: path and hash of its weights
adapter/ state.pth  what was trained beside that base
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.errors import UserError
from src.files import atomic_write
from src.model import RWKV7
from src.model.safetensors_file import write_safetensors
from src.model.weights import Weights, read_weights
from src.multimodal.config import HF, MediaConfig
from src.multimodal.front_end import FrontEnd, attach_front_end

RECORD, TENSORS = "multimodal.json", "media.safetensors"
LANGUAGE_MODEL, ADAPTER, STATE = "rwkv.pth", "adapter", "state.pth"
FORMAT, VERSION = "rwkv7-multimodal", 3
CHANGED = {"patches": 3, "logmel": 2}  # the version since which they have the parameters that they have


@dataclass(frozen=True)
class MediaRecord:
    """What multimodal.json says. `base_path` and `base_sha256`: of the language model, "" where it is in the folder;
    `tokenizer`: its name, or that of a folder within; "" where the run's own record names it."""

    config: MediaConfig
    base_path: str = ""
    base_sha256: str = ""
    tokenizer: str = ""


def write_front_end(folder: Path, record: MediaRecord, tensors: Weights) -> None:
    """Write multimodal.json and media.safetensors into a new `folder`; the names of `tensors` begin with encoder. or
    projector."""
    write_safetensors({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS, {})
    base = {"path": record.base_path, "sha256": record.base_sha256} if record.base_path else None
    content = {"format": FORMAT, "version": VERSION, "media": record.config.payload(), "base": base}
    with atomic_write(folder / RECORD, "w") as file:
        json.dump({**content, "tokenizer": record.tokenizer}, file, indent=2)
        file.write("\n")


def is_media_folder(path: Path) -> bool:
    return (path / RECORD).is_file()


def read_record(folder: Path) -> MediaRecord:
    """Raises UserError when it can't be read, or is of a later version."""
    path = folder / RECORD
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT or type(content.get("version")) is not int:
            raise ValueError(f"no {FORMAT}")
        version, base = content["version"], content.get("base") or {}
        texts = base.get("path", ""), base.get("sha256", ""), content.get("tokenizer", "")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a name is no text")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"can't be read ({error})", given=path) from error
    if version > VERSION:
        raise UserError(
            f"format version {version}", given=path, expected=f"at most {VERSION}", advice="update this program"
        )
    config = MediaConfig.from_payload(content.get("media"), path)
    if version < (needed := CHANGED.get(config.encoder, 0)):
        raise UserError(
            f"holds an encoder {config.encoder!r} of an earlier version",
            given=path,
            expected=f"format version {needed}",
            advice="train it again: its parameters have changed",
        )
    return MediaRecord(config, *texts)


def tensors_of(folder: Path, parts: Collection[str]) -> Weights:
    """The weights of these parts, "encoder" and "projector", in a folder; of an encoder with a folder of its own only
    where it was trained."""
    stored = read_weights(folder / TENSORS)
    return {name: tensor for name, tensor in stored.items() if name.partition(".")[0] in parts}


def load_front_end_values(front_end: FrontEnd, folder: Path) -> None:
    """Overwrite the weights of `front_end` by those in `folder`. Raises UserError when they don't fit."""
    _copy_values(dict(front_end.named_parameters()), read_weights(folder / TENSORS), front_end.config, folder)


def load_encoder_values(encoder: nn.Module, config: MediaConfig, folder: Path) -> None:
    """As `load_front_end_values`, of the encoder alone."""
    expected = {f"encoder.{name}": parameter for name, parameter in encoder.named_parameters()}
    _copy_values(expected, tensors_of(folder, ("encoder",)), config, folder)


@torch.no_grad()
def _copy_values(expected: Mapping[str, Tensor], stored: Weights, config: MediaConfig, folder: Path) -> None:
    for name in stored.keys() | expected.keys():
        if name not in stored and name.startswith("encoder.") and config.encoder.startswith(HF):
            continue  # it has the values of its own folder
        given = list(stored[name].shape) if name in stored else "missing"
        needed = list(expected[name].shape) if name in expected else "no such parameter"
        if given != needed:
            raise UserError(
                f"{name} is {given}",
                flag="load_projector",
                given=folder,
                expected=f"{needed}, with the --encoder and --projector of this run",
            )
        if not bool(stored[name].isfinite().all()):
            raise UserError(f"{name} has values that are not finite", given=folder)
        expected[name].copy_(stored[name])


def load_front_end(model: RWKV7, folder: Path) -> FrontEnd:
    """Give `model` the front end of `folder`, in the model's precision and on its device, in evaluation mode. Raises
    UserError."""
    front_end = attach_front_end(model, read_record(folder).config)
    load_front_end_values(front_end, folder)
    weight = model.emb.weight
    front_end.to(weight.device, weight.dtype).eval().requires_grad_(False)
    return front_end

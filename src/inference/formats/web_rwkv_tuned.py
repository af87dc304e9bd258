"""LoRA weights and tuned initial states as .st files for web-rwkv and Ai00, which load them beside a model.

    blocks.N.att.key.lora.0 [in, r]     A, transposed
    blocks.N.att.key.lora.1 [out, r]    B
    blocks.N.att.time_state [H, key, value]

Everything is fp16. They don't read a factor from the file: Ai00 takes alpha from its Config.toml, and multiplies B A by
alpha / r. It is stored in the metadata all the same, for `--adapter` here. `src.adapt.adapter_files` reads these files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from src.adapt.adapter_files import ALPHA, TIME_STATE, read_adapter
from src.errors import UserError
from src.inference.formats.web_rwkv import to_fp16
from src.model.safetensors_file import write_safetensors
from src.model.weights import Weights

PARTS = {"lora_A": "lora.0", "lora_B": "lora.1"}


def write_st_lora(tensors: Mapping[str, Tensor], scale: float, title: str, path: Path, type: str = "f16") -> None:
    """Write pairs blocks.N.att.key.lora_A [r, in], .lora_B [out, r], whose product times `scale` is added to a matrix.

    Raises UserError for other tensors, and for values beyond fp16; OSError.
    """
    stored, ranks = {}, set()
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        if part not in PARTS:
            raise UserError(
                f"web-rwkv adds LoRA to matrices only, and the adapter has {name}",
                advice="merge the adapter into its base, and export the result",
            )
        stored[f"{stem}.{PARTS[part]}"] = tensor.t() if part == "lora_A" else tensor
        ranks.add(tensor.shape[0 if part == "lora_A" else 1])
    if len(ranks) != 1:
        raise UserError(f"one alpha stands for all pairs, and they have the ranks {sorted(ranks)}")
    write_safetensors(to_fp16(stored), path, {"format": "pt", ALPHA: f"{scale * ranks.pop():g}", "title": title})


def read_st_lora(path: Path) -> tuple[Weights, float]:
    """The pairs in such a file under the names of `write_st_lora`, in fp16, and their scale. Raises UserError."""
    adapter = read_adapter(path)
    return {name: tensor.half() for name, tensor in adapter.tensors.items()}, adapter.config.scale


def write_st_state(states: Mapping[str, Tensor], scale: float, title: str, path: Path, type: str = "f16") -> None:
    """Write tuned states blocks.N.att.time_state [H, value, key]. Raises UserError for other tensors, OSError."""
    if others := [name for name in states if not name.endswith(TIME_STATE)]:
        raise UserError(
            f"web-rwkv's state files hold states alone, and the adapter has {others[0]}",
            advice="merge the adapter into its base, and export the result",
        )
    swapped = {name: state.transpose(-2, -1) for name, state in states.items()}
    write_safetensors(to_fp16(swapped), path, {"format": "pt", "title": title})


def read_st_state(path: Path) -> tuple[Weights, float]:
    """The states in such a file, [H, value, key] in fp16, and 1. Raises UserError."""
    return {name: state.half() for name, state in read_adapter(path).tensors.items()}, 1.0

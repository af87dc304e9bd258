"""LoRA adapters as GGUF files, for llama.cpp's --lora and Ollama's ADAPTER: W x + alpha / r * B A x.

Sources: llama.cpp's convert_lora_to_gguf.py, src/llama-adapter.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from src.errors import UserError
from src.inference.formats.gguf import ARCHITECTURE, write_tensors
from src.inference.formats.gguf_file import F16, F32, read_gguf_file
from src.inference.formats.gguf_tensors import Stored, gguf_name

TYPES = {"f32": F32, "f16": F16}
_PAIR = re.compile(r"(blocks\.\d+\.(?:att\.(?:receptance|key|value|output)|ffn\.(?:key|value)))\.lora_([AB])")
_ALPHA = "adapter.lora.alpha"


def write_gguf_lora(tensors: Mapping[str, Tensor], scale: float, title: str, path: Path, type: str = "f32") -> None:
    """Write pairs blocks.N.att.key.lora_A [r, in], .lora_B [out, r], whose product times `scale` is added to a matrix.

    Raises UserError for tensors that llama.cpp doesn't apply, and for values beyond fp16; OSError.
    """
    stored, ranks = [], set()
    for name, tensor in tensors.items():
        if (match := _PAIR.fullmatch(name)) is None:
            raise UserError(
                f"llama.cpp applies LoRA to the matrices of a block only, and the adapter has {name}",
                advice="merge the adapter into its base, and export the result",
            )
        target, half = match.groups()
        ranks.add(tensor.shape[0 if half == "A" else 1])
        full = f"{gguf_name(f'{target}.weight')}.lora_{half.lower()}"
        stored.append(Stored(full, tuple(tensor.shape), TYPES[type], name, partial(tensors.__getitem__, name)))
    if len(ranks) != 1:
        raise UserError(f"one alpha stands for all pairs, and they have the ranks {sorted(ranks)}")
    metadata = {
        "general.architecture": ARCHITECTURE,
        "general.type": "adapter",
        "general.name": title,
        "adapter.type": "lora",
        _ALPHA: scale * ranks.pop(),
    }
    write_tensors(path, metadata, stored)


def read_gguf_lora(path: Path) -> tuple[dict[str, Tensor], float]:
    """The pairs in a GGUF adapter under the names of `write_gguf_lora`, and their scale. Raises UserError."""
    file = read_gguf_file(path)
    metadata = file.metadata
    kind = tuple(metadata.get(key) for key in ("general.architecture", "general.type", "adapter.type"))
    if kind != (ARCHITECTURE, "adapter", "lora"):
        raise UserError(f"a GGUF file of the kind {kind}", given=path, expected=f"a LoRA adapter of {ARCHITECTURE}")
    tensors = {}
    for name in file.tensors:
        match = re.fullmatch(r"blk\.(\d+)\.(time|channel)_mix_(\w+)\.weight\.lora_([ab])", name)
        ours = (
            match and f"blocks.{match[1]}.{'att' if match[2] == 'time' else 'ffn'}.{match[3]}.lora_{match[4].upper()}"
        )
        if not ours or not _PAIR.fullmatch(ours):
            raise UserError(f"has no counterpart here: {name}", given=path)
        tensors[ours] = file.tensors[name]
    r = next(tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A"))
    alpha = float(metadata.get(_ALPHA, 0.0))
    return tensors, alpha / r if alpha else 1.0

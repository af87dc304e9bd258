"""The Hugging Face layout of flash-linear-attention's RWKV7 (config.json and safetensors), read and written.

The mathematics is the same; names differ, low-rank matrices are stored as linear layers (transposed), channel vectors without
their two leading ones, and layer 0 has no value residual.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.config import ModelConfig
from src.errors import UserError
from src.files import atomic_write
from src.model.layers import GROUP_NORM_EPS, LAYER_NORM_EPS
from src.model.weights import IDLE_IN_LAYER_0, Weights

CONFIG = "config.json"
TENSORS = "model.safetensors"
_MIXES = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")  # older files have them stacked, in this order, as attn.x_x
# our name <-> fla's name; {} is the layer and what follows stays as it is
_NAMES = {
    "emb.weight": "model.embeddings.weight",
    "ln_out.": "model.norm.",
    "head.weight": "lm_head.weight",
    "blocks.{}.ln0.": "model.layers.{}.pre_norm.",
    "blocks.{}.ln1.": "model.layers.{}.attn_norm.",
    "blocks.{}.ln2.": "model.layers.{}.ffn_norm.",
    "blocks.{}.ffn.": "model.layers.{}.ffn.",
    "blocks.{}.att.receptance.": "model.layers.{}.attn.r_proj.",
    "blocks.{}.att.key.": "model.layers.{}.attn.k_proj.",
    "blocks.{}.att.value.": "model.layers.{}.attn.v_proj.",
    "blocks.{}.att.output.": "model.layers.{}.attn.o_proj.",
    "blocks.{}.att.ln_x.": "model.layers.{}.attn.g_norm.",
    **{
        f"blocks.{{}}.att.{kind}{part}": f"model.layers.{{}}.attn.{kind}_lora.lora.{place}"
        for kind in "wavg"
        for part, place in (("0", "2.bias"), ("1", "0.weight"), ("2", "2.weight"))
    },
    **{f"blocks.{{}}.att.{name}": f"model.layers.{{}}.attn.{name}" for name in (*_MIXES, "k_k", "k_a", "r_k")},
}


def _renamed(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        match = re.match(re.escape(ours).replace(r"\{\}", r"(\d+)"), name)
        if match:
            return theirs.replace("{}", "".join(match.groups())) + name[match.end() :]
    raise UserError(f"{name}: no such parameter in an RWKV-7 model")


def fla_name(name: str) -> str:
    """fla's name of a parameter of ours."""
    return _renamed(name, _NAMES)


def our_name(name: str) -> str:
    """Our name of a parameter of fla's. ValueError for a name that neither knows."""
    return _renamed(name, {theirs: ours for ours, theirs in _NAMES.items()})


def to_fla(weights: Weights) -> Weights:
    """Our state dict in fla's names and shapes."""
    return {fla_name(name): _to_fla_shape(name, t) for name, t in weights.items() if name not in IDLE_IN_LAYER_0}


def _is_low_rank(name: str) -> bool:
    return re.search(r"\.att\.[wavg][12]$", name) is not None


def _to_fla_shape(name: str, tensor: Tensor) -> Tensor:
    if _is_low_rank(name):
        return tensor.t().contiguous()
    keeps_shape = re.search(r"\.att\.x_.$", name)  # the six mixes are [1, 1, C] in both
    return tensor if keeps_shape or tensor.dim() != 3 else tensor.reshape(-1)


def from_fla(tensors: Weights) -> Weights:
    """fla's tensors in our names and shapes; channel vectors stay [C], as `fit_weights` takes them."""
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith(".attn.x_x"):
            for mix, values in zip(_MIXES, tensor, strict=True):
                weights[our_name(name.removesuffix("x_x") + mix)] = values
        else:
            ours = our_name(name)
            weights[ours] = tensor.t().contiguous() if _is_low_rank(ours) else tensor
    return weights


def fla_config(config: ModelConfig, dtype: torch.dtype, eos_id: int) -> dict[str, Any]:
    """config.json of a model. ValueError for sizes that this layout can't express."""
    if config.head_size != 64:
        raise UserError(
            f"--format fla: this layout ties GroupNorm's eps to the head size, which agrees with RWKV-7's {GROUP_NORM_EPS:g} for "
            f"heads of 64 only; this model has {config.head_size}. Use --format safetensors"
        )
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "head_dim": config.head_size,
        "num_heads": config.n_head,
        "value_dim": [config.n_embd] * config.n_layer,
        "hidden_ratio": config.dim_ffn / config.n_embd,
        "intermediate_size": config.dim_ffn,
        "decay_low_rank_dim": config.d_decay_lora,
        "a_low_rank_dim": config.d_aaa_lora,
        "v_low_rank_dim": config.d_mv_lora,
        "gate_low_rank_dim": config.d_gate_lora,
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": LAYER_NORM_EPS,
        "attn_mode": "chunk",
        "attn": None,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": eos_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def is_fla_folder(path: Path) -> bool:
    """Whether `path` holds an RWKV7 model in this layout."""
    config = path / CONFIG
    return config.is_file() and _read_json(config).get("model_type") in ("rwkv7", "rwkv7_fla")


def read_fla(folder: Path) -> Weights:
    """The weights of such a folder, in one file or several, under our names. ValueError when they can't be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = _read_json(folder / CONFIG)
    if config.get("attn"):
        raise UserError(f"{folder}: a hybrid model with attention layers, not RWKV-7 alone")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: holds {CONFIG} and no .safetensors file; download the weights too")
    tensors: Weights = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file}: cut short or not a safetensors file ({error}); copy or download it again"
            ) from error
    return from_fla(tensors)


def write_fla(weights: Weights, config: ModelConfig, folder: Path, eos_id: int = 0) -> None:
    """Write `weights` (of one dtype) as such a folder; ValueError as `fla_config`, before anything is written."""
    from safetensors.torch import save_file

    described = fla_config(config, weights["emb.weight"].dtype, eos_id)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / TENSORS) as file:
        save_file(to_fla(weights), file.name, metadata={"format": "pt"})
    with atomic_write(folder / CONFIG, "w") as file:
        json.dump(described, file, indent=2)
        file.write("\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({error})") from error
    return read if isinstance(read, dict) else {}

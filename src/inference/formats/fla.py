"""Reads and writes the Hugging Face layout of flash-linear-attention's RWKV7: config.json and safetensors.

The mathematics is the same. Parameter names differ, low-rank matrices are stored as linear layers (transposed), channel
vectors have one dimension instead of three, and layer 0 has no value residual.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.config import ModelConfig
from src.errors import UserError
from src.inference.formats.shards import read_json, read_shards, write_json
from src.model.layers import GROUP_NORM_EPS, LAYER_NORM_EPS
from src.model.safetensors_file import write_safetensors
from src.model.weights import IDLE_IN_LAYER_0, Weights

CONFIG = "config.json"
TENSORS = "model.safetensors"
MODEL_TYPES = ("rwkv7", "rwkv7_fla")
# The order in which fla's older files (attn.x_x) and GGUF stack the six token-shift mixes.
MIXES = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
# Prefix of our name -> prefix of fla's; {} is the layer, and the rest of the name is the same in both.
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
        # fla's LoRA module is Sequential(Linear, activation, Linear): w1, w2, w0 are 0.weight, 2.weight, 2.bias.
        f"blocks.{{}}.att.{kind}{part}": f"model.layers.{{}}.attn.{kind}_lora.lora.{suffix}"
        for kind in "wavg"
        for part, suffix in (("0", "2.bias"), ("1", "0.weight"), ("2", "2.weight"))
    },
    **{f"blocks.{{}}.att.{name}": f"model.layers.{{}}.attn.{name}" for name in (*MIXES, "k_k", "k_a", "r_k")},
}


def _rename(name: str, names: dict[str, str]) -> str:
    for source, target in names.items():
        match = re.match(re.escape(source).replace(r"\{\}", r"(\d+)"), name)
        if match:
            return target.replace("{}", "".join(match.groups())) + name[match.end() :]
    raise UserError("no such parameter in an RWKV-7 model", given=name)


def fla_name(name: str) -> str:
    """The name in fla's layout of a parameter of `RWKV7`."""
    return _rename(name, _NAMES)


def rwkv_name(name: str) -> str:
    """The inverse of `fla_name`. Raises UserError for an unknown name."""
    return _rename(name, {theirs: ours for ours, theirs in _NAMES.items()})


def to_fla(weights: Weights) -> Weights:
    """A state dict of `RWKV7` in fla's names and shapes."""
    return {fla_name(name): _to_fla_shape(name, t) for name, t in weights.items() if name not in IDLE_IN_LAYER_0}


def is_low_rank(name: str) -> bool:
    """Whether a parameter of `RWKV7` is one of w1 ... g2, which all other formats transpose."""
    # w1 ... g2 multiply from the right (x @ w1, [C, D]), where a linear layer's weight is [out, in].
    return re.search(r"\.att\.[wavg][12]$", name) is not None


def _to_fla_shape(name: str, tensor: Tensor) -> Tensor:
    if is_low_rank(name):
        return tensor.t().contiguous()
    if tensor.dim() != 3 or re.search(r"\.att\.x_.$", name):  # the six mixes are [1, 1, C] in both layouts
        return tensor
    return tensor.reshape(-1)


def from_fla(tensors: Weights) -> Weights:
    """The inverse of `to_fla`, but channel vectors stay [C] (`fit_weights` reshapes them). Raises UserError."""
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith(".attn.x_x"):
            for mix, values in zip(MIXES, tensor, strict=True):
                weights[rwkv_name(name.removesuffix("x_x") + mix)] = values
        else:
            renamed = rwkv_name(name)
            weights[renamed] = tensor.t().contiguous() if is_low_rank(renamed) else tensor
    return weights


def fla_config(config: ModelConfig, dtype: torch.dtype, eos_id: int) -> dict[str, Any]:
    """The content of config.json. Raises UserError for a head size other than 64."""
    if config.head_size != 64:  # fla computes eps = head size * norm_eps
        raise UserError(
            f"this layout derives GroupNorm's eps from the head size, which gives {GROUP_NORM_EPS:g} for heads of "
            f"64 only; this model has heads of {config.head_size}",
            flag="format",
            given="fla",
            advice="use --format hf or safetensors",
        )
    return {**size_fields(config, dtype), "eos_token_id": eos_id}


def size_fields(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says of the model itself, in fla's and in the self-contained layout."""
    return {
        # The two names by which fla registers the model with transformers' Auto classes.
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
        "attn": None,  # set only for hybrid models with some layers of attention
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def is_fla_folder(path: Path) -> bool:
    """Whether the folder `path` contains an RWKV7 model in this layout."""
    config = path / CONFIG
    return config.is_file() and read_json(config).get("model_type") in MODEL_TYPES


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. Raises UserError when it can't be read or is that of another model."""
    config = read_json(folder / CONFIG)
    if (kind := config.get("model_type")) not in MODEL_TYPES:
        raise UserError(f"{CONFIG} says model_type {kind}", given=folder, expected=" or ".join(MODEL_TYPES))
    if config.get("attn"):
        raise UserError("a hybrid model with attention layers", given=folder, expected="a model of RWKV-7 layers only")
    return config


def is_fla(weights: Weights) -> bool:
    """Whether tensors that were read from a file have this layout's names."""
    return _NAMES["emb.weight"] in weights


def read_fla(folder: Path) -> Weights:
    """The weights of a folder, of one file or several, under the names of `RWKV7`.

    Raises UserError if a file is missing, unreadable or of another version, or if the weights aren't of the model that
    config.json describes.
    """
    config = read_config(folder)
    tensors = read_shards(folder)
    if config.get("tie_word_embeddings") and is_fla(tensors):  # then the head isn't stored
        tensors.setdefault(_NAMES["head.weight"], tensors[_NAMES["emb.weight"]])
    try:
        # Folders made from a .pth for transformers may keep the names of the .pth.
        weights = tensors if "emb.weight" in tensors else from_fla(tensors)
    except UserError as error:
        raise UserError(f"{error.given}: {error.problem}", given=folder, expected="a model of RWKV-7 layers") from error
    _check_sizes(weights, config, folder)
    return weights


def _check_sizes(weights: Weights, config: dict[str, Any], folder: Path) -> None:
    """Raises UserError when the weights are of another model than config.json describes."""
    # Without this check a model that lost its last layers, with the part that held them, would load and talk nonsense.
    layers = {int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}
    sizes = {"num_hidden_layers": len(layers)}
    if "emb.weight" in weights:
        sizes["hidden_size"] = weights["emb.weight"].shape[-1]
    for name, size in sizes.items():
        if config.get(name, size) != size:
            raise UserError(
                f"the weights are of a model with {name} {size}, {CONFIG} says {config[name]}",
                given=folder,
                advice="download the folder again: files are missing, or are of different versions",
            )


def write_fla(weights: Weights, config: ModelConfig, folder: Path, eos_id: int = 0) -> None:
    """Write `weights` (of one dtype) as a folder. Raises UserError as `fla_config` does, and OSError."""
    # Before anything is written: it raises for a model that the layout can't express.
    content = fla_config(config, weights["emb.weight"].dtype, eos_id)
    write_folder(weights, content, folder)


def write_folder(weights: Weights, content: dict[str, Any], folder: Path) -> None:
    """Write the tensors in this layout, and `content` as config.json. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    # transformers refuses a file without this metadata
    write_safetensors(to_fla(weights), folder / TENSORS, {"format": "pt"})
    write_json(folder / CONFIG, content)

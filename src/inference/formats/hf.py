"""Writes a Hugging Face folder that `transformers` opens without this project: fla's layout, and the code that runs it.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

config.json names the files of `hf_model`, which are copied into the folder. flash-linear-attention, rwkv7-hf, PEFT and
TRL know the same names of parameters. It is read as fla's folders are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from src.config import ModelConfig
from src.inference.formats.fla import size_fields, write_folder
from src.inference.formats.format import Export
from src.inference.formats.hf_tokenizer import copy_template, write_hf_tokenizer
from src.inference.formats.model_card import write_card
from src.inference.formats.shards import write_json
from src.model.layers import GROUP_NORM_EPS

MODEL_FILES = ("configuration_rwkv7.py", "layers_rwkv7.py", "modeling_rwkv7.py")
GENERATION = "generation_config.json"


def hf_config(config: ModelConfig, dtype: torch.dtype, eos_ids: tuple[int, ...]) -> dict[str, Any]:
    """The content of config.json."""
    return {
        **size_fields(config, dtype),
        # whatever the head size is: fla and rwkv7-hf, which multiply it by norm_eps, agree for heads of 64
        "group_norm_eps": GROUP_NORM_EPS,
        "auto_map": {
            "AutoConfig": "configuration_rwkv7.RWKV7Config",
            "AutoModel": "modeling_rwkv7.RWKV7Model",
            "AutoModelForCausalLM": "modeling_rwkv7.RWKV7ForCausalLM",
        },
        "use_cache": True,
        **token_ids(eos_ids),
    }


def token_ids(eos_ids: tuple[int, ...]) -> dict[str, Any]:
    """The special ids of config.json and generation_config.json: generation ends at any of `eos_ids`."""
    # 0 ends documents, and pads, unless it is text in this vocabulary
    return {"bos_token_id": 0, "eos_token_id": list(eos_ids), "pad_token_id": min(eos_ids)}


def write_hf(export: Export, folder: Path) -> None:
    """Write a model as a folder, with its tokenizer and a model card. Raises OSError."""
    config = hf_config(export.config, export.weights["emb.weight"].dtype, export.eos_ids)
    write_folder(dict(export.weights), config, folder)
    write_json(folder / GENERATION, token_ids(export.eos_ids))
    for name in MODEL_FILES:
        copy_template(name, folder)
    if export.tokenizer:
        write_hf_tokenizer(export.tokenizer, folder)
    write_card(export, folder)

"""Names of adapter tensors in the files of several programs, and the one name each has here.

Here: `blocks.N.att.key.lora_A` [r, in], `.lora_B` [out, r], `.lora_magnitude` [out] (DoRA), `.miss_block` [r, out],
`blocks.N.att.time_state` [H, value, key], and a parameter that is trained in full has its name in the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from src.adapt.config import TARGETS

# What the modules of a block are called by flash-linear-attention and rwkv7-hf, and by rwkvtune's older files. The last
# row takes the vectors: attn.x_r is att.x_r.
OTHER_MODULES = {
    "attn.r_proj": "att.receptance",
    "attn.k_proj": "att.key",
    "attn.v_proj": "att.value",
    "attn.o_proj": "att.output",
    "attn.g_norm": "att.ln_x",
    "pre_norm": "ln0",
    "attn_norm": "ln1",
    "ffn_norm": "ln2",
    "attn": "att",
}
OUTER_MODULES = {"norm": "ln_out", "embeddings": "emb", "lm_head": "head"}
# The tensors of an adapter: a pattern after the module's name, and the name here. PEFT puts the adapter's own name,
# "default", into the names of a module tree, and leaves it out in files.
PARTS = (
    (r"lora_A(\.default)?(\.weight)?|lora\.0", "lora_A"),
    (r"lora_B(\.default)?(\.weight)?|lora\.1", "lora_B"),
    (r"lora_magnitude(_vector)?(\.default)?(\.weight)?", "lora_magnitude"),
    (r"(miss_block|disha|bone)(\.default)?(\.weight)?", "miss_block"),
)
MODULES_TO_SAVE = re.compile(r"\.modules_to_save\.default(?=\.)")  # PEFT's wrapper of a module that is trained in full


@dataclass(frozen=True)
class AdapterName:
    """`module` is the name of a module of `RWKV7`, "" outside of the blocks; `part` one of PARTS, or the name of a
    parameter of that module."""

    module: str
    part: str

    def __str__(self) -> str:
        return f"{self.module}.{self.part}" if self.module else self.part

    @property
    def is_adapter(self) -> bool:
        """Whether it is a tensor beside a matrix, and not a parameter of the model."""
        return self.part in {part for _, part in PARTS}

    @property
    def target(self) -> str:
        """The matrix in a block, "att.key"; "" where the module isn't one of TARGETS."""
        target = re.sub(r"^blocks\.\d+\.", "", self.module)
        return target if target in TARGETS else ""


def adapter_name(name: str) -> AdapterName:
    """The name here of a tensor that an adapter file calls `name`."""
    name = MODULES_TO_SAVE.sub("", name)
    block = re.search(r"(?:^|\.)(?:blocks|layers)\.(\d+)\.(.+)$", name)
    if block is None:
        module, _, parameter = re.sub(r"^(base_model\.)?(model\.)*(rwkv7\.)?", "", name).rpartition(".")
        return AdapterName(OUTER_MODULES.get(module, module), parameter)
    rest = block[2]
    for pattern, part in PARTS:
        if match := re.fullmatch(rf"(.+)\.(?:{pattern})", rest):
            return AdapterName(f"blocks.{block[1]}.{_module(match[1])}", part)
    module, _, parameter = rest.rpartition(".")
    return AdapterName(f"blocks.{block[1]}.{_module(module)}", parameter)


def _module(name: str) -> str:
    return OTHER_MODULES.get(name, name)


def peft_name(name: str) -> str:
    """The name in adapter_model.safetensors of a tensor that is called `name` here."""
    for part in ("lora_A", "lora_B"):
        if name.endswith(f".{part}"):
            name += ".weight"
    return "base_model.model." + re.sub(r"\.lora_magnitude$", ".lora_magnitude_vector", name)

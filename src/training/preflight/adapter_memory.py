"""What an adapter changes in the memory of a step: what is trained, how the frozen base is stored, what backward keeps.

Kept for backward by a block with everything else frozen, in tensors [tokens, C] of the run's dtype; compared with
PyTorch's saved tensors in tests/test_plan.py:

    18 + F / C and the results of tanh and sigmoid        what the gradient of the input needs
    + the input of each adapted matrix, and r numbers     for A and B (of MiSS: only the r numbers)
    + its output                                          DoRA, for the norms
    + 4                                                   trained vectors

In the first block nothing before its adapted matrices needs a gradient. Not counted: the copies of a tuned state, one a
document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from src.adapt.adapter import adapter_tensors, add_adapter
from src.adapt.config import AdapterConfig
from src.config import TARGETS, ModelConfig
from src.model import RWKV7

KEPT_BY_FROZEN_BLOCK = 18
KEPT_BY_VECTORS = 4
# of the first block: not kept before an adapter's receptance, key and value, and before a tuned state alone
FREE_IN_FIRST_BLOCK = {"matrices": 5, "state": 8}
# bytes of a quantised weight: nf4 has an fp32 scale for 64 of them; of int8, one a row, little
QUANTISED_BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64}


@dataclass(frozen=True)
class TrainedPart:
    """Numbers of parameters: of the adapter (fp32), of the base's that are trained in full, and those that only start
    values are kept of (PiSSA's, fp32)."""

    adapter: int
    whole: int
    kept: int


def trained_part(c: ModelConfig, adapter: AdapterConfig) -> TrainedPart:
    """What `add_adapter` makes trainable in a model of these sizes."""
    with torch.device("meta"):
        plain = {name for name, _ in RWKV7(c).named_parameters()}
        model = RWKV7(c)
        add_adapter(model, adapter)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole = sum(p.numel() for name, p in trained.items() if name in plain)
    total = sum(tensor.numel() for tensor in adapter_tensors(model).values())
    own = sum(p.numel() for name, p in trained.items() if name not in plain)
    return TrainedPart(own, whole, total - own - whole)


def _shapes(c: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """(target, in, out) of a block's six matrices."""
    for target in TARGETS:
        wide = {"ffn.key": (c.n_embd, c.dim_ffn), "ffn.value": (c.dim_ffn, c.n_embd)}
        yield (target, *wide.get(target, (c.n_embd, c.n_embd)))


def base_bytes(c: ModelConfig, count: int, dtype_bytes: int, quant: str) -> float:
    """Bytes of the base's `count` weights; of a quantised one with the largest matrix as it is while multiplied."""
    if quant == "none":
        return float(dtype_bytes * count)
    sizes = [width * height for _, width, height in _shapes(c)]
    quantised = c.n_layer * sum(sizes)
    return QUANTISED_BYTES[quant] * quantised + dtype_bytes * (count - quantised) + (4 + dtype_bytes) * max(sizes)


def kept_by_frozen_block(c: ModelConfig, adapter: AdapterConfig) -> float:
    """Numbers per token, in the run's dtype, that an adapted block keeps for backward; without the recurrence's."""
    kept = KEPT_BY_FROZEN_BLOCK * c.n_embd + c.dim_ffn + c.d_decay_lora + c.d_gate_lora
    if "vectors" in adapter.train:
        kept += KEPT_BY_VECTORS * c.n_embd
    if adapter.kind == "state":
        return kept
    rank = 2 * adapter.r if adapter.kind == "pissa" else adapter.r
    for target, width, height in _shapes(c):
        if target in adapter.targets:
            kept += rank
            kept += width if adapter.kind != "miss" else 0
            kept += height if adapter.kind == "dora" else 0
    return kept


def free_in_first_block(c: ModelConfig, adapter: AdapterConfig) -> float:
    """Numbers per token of `kept_by_frozen_block` that the first block doesn't keep."""
    if adapter.train:
        return 0.0
    return FREE_IN_FIRST_BLOCK["state" if adapter.kind == "state" else "matrices"] * c.n_embd


def cast_bytes(c: ModelConfig, adapter: AdapterConfig, dtype_bytes: int) -> float:
    """Bytes of the copies of A and B that a forward pass keeps: in the run's dtype, and PiSSA's joined ones."""
    if adapter.kind == "state" or (dtype_bytes == 4 and adapter.kind != "pissa"):
        return 0.0
    pairs = sum(width + height for target, width, height in _shapes(c) if target in adapter.targets)
    rank = 2 * adapter.r if adapter.kind == "pissa" else adapter.r
    return float(dtype_bytes * rank * pairs * c.n_layer)

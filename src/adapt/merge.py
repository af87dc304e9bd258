"""Adapters merged into the weights of their base: fp32 arithmetic, then the dtype of the base.

    LoRA   W + s B A                                  s = `AdapterConfig.scale`
    DoRA   m (W + s B A) / |W + s B A|                norms of rows, [out]
    MiSS   W[:, j r + c] + D[c]                       for every piece j of r columns; the last may be shorter
    state  blocks.N.att.time_state beside the weights

A parameter that was trained in full replaces that of the base.
"""

from __future__ import annotations

import torch
from torch import Tensor

from src.adapt.adapter_files import TIME_STATE, Adapter
from src.adapt.adapter_names import adapter_name
from src.adapt.base_hash import base_sha256
from src.errors import UserError
from src.model.weights import Weights

SHOWN = 3  # of what may be every tensor of an adapter: a message has two lines


def check_adapter(adapter: Adapter, weights: Weights, path: object, other_base: bool = False) -> None:
    """Raises UserError when `adapter`, from `path`, doesn't fit `weights` by its shapes, or was trained on others.

    `other_base`: a base of equal shapes and other numbers is accepted.
    """
    config = adapter.config
    wrong = []
    for full_name, tensor in adapter.tensors.items():
        name = adapter_name(full_name)
        target = f"{name.module}.weight" if name.is_adapter else full_name
        if name.part == "time_state":
            target = f"{name.module}.r_k"  # [H, N]
        if target not in weights:
            wrong.append(f"{full_name} belongs to {target}, which the base lacks")
            continue
        shape = list(weights[target].shape)
        expected = {
            "lora_A": [config.r, shape[-1]],
            "lora_B": [shape[0], config.r],
            "lora_magnitude": [shape[0]],
            "miss_block": [config.r, shape[0]],
            "time_state": [*shape, shape[-1]],
        }.get(name.part, shape)
        fits = tensor.squeeze().shape == torch.Size(expected) or list(tensor.shape) == expected
        if not fits and (name.is_adapter or name.part == "time_state" or tensor.numel() != weights[target].numel()):
            wrong.append(f"{full_name} is {list(tensor.shape)}, expected {expected}")
        if not bool(tensor.isfinite().all()):
            wrong.append(f"{full_name} contains values that are not finite")
    if wrong:
        more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise UserError(
            f"doesn't fit the base: {'; '.join(wrong[:SHOWN])}{more}",
            given=path,
            advice="name the base that it was trained on" + (f" ({adapter.base_path})" if adapter.base_path else ""),
        )
    if adapter.base_sha256 and not other_base and adapter.base_sha256 != base_sha256(weights):
        raise UserError(
            "an adapter of another base: the weights that it was trained on have other numbers",
            given=path,
            expected=adapter.base_path,
            advice="name that base, or go on with --other_base",
        )


def merge_adapter(weights: Weights, adapter: Adapter, dtype: torch.dtype | None = None) -> Weights:
    """A copy of `weights` with `adapter` (that `check_adapter` has accepted) merged; other tensors are shared.

    What changes is rounded once, to `dtype`; None: to that of the weight.
    """
    merged = dict(weights)
    for full_name, tensor in adapter.tensors.items():
        name = adapter_name(full_name)
        stem = f"{name.module}."
        target = f"{name.module}.weight"
        if name.part == "lora_A":
            delta = adapter.config.scale * (adapter.tensors[stem + "lora_B"].float() @ tensor.float())
            matrix = weights[target].float() + delta
            if (magnitude := adapter.tensors.get(stem + "lora_magnitude")) is not None:
                matrix *= (magnitude.float() / matrix.norm(dim=1)).unsqueeze(1)
            merged[target] = matrix.to(dtype or weights[target].dtype)
        elif name.part == "miss_block":
            matrix = weights[target].float() + miss_delta(tensor.float(), weights[target].shape[1])
            merged[target] = matrix.to(dtype or weights[target].dtype)
        elif full_name.endswith(TIME_STATE):
            merged[full_name] = tensor.float()
        elif not name.is_adapter:
            merged[full_name] = tensor.reshape(weights[full_name].shape).to(dtype or weights[full_name].dtype)
    return merged


def miss_delta(block: Tensor, width: int) -> Tensor:
    """[out, width]: the rows of D [r, out] as columns, repeated; the last repetition is cut where r doesn't divide."""
    r = block.shape[0]
    return block.t().repeat(1, -(-width // r))[:, :width]

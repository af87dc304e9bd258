"""The .st files of web-rwkv and Ai00: safetensors in fp16 with RWKV-7's names and the low-rank matrices transposed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from src.errors import UserError
from src.inference.formats.fla import is_low_rank
from src.inference.formats.format import Export, rounded
from src.model.safetensors_file import write_safetensors
from src.model.weights import Weights


def is_web_rwkv(weights: Weights) -> bool:
    """Whether `weights` are in this layout, by the shapes of w1, a1 and g1: [D, C] instead of [C, D].

    Nothing else in such a file says so. Where all three D equal C both readings are possible, and the answer is False;
    no released model is that narrow.
    """
    if "emb.weight" not in weights or weights["emb.weight"].dim() != 2:
        return False
    n_embd = weights["emb.weight"].shape[1]
    # v1 is left out: layer 0's may be missing or a placeholder of another shape
    low_rank = [weights[name] for kind in "wag" if (name := f"blocks.0.att.{kind}1") in weights]
    shapes = {tuple(tensor.shape) for tensor in low_rank if tuple(tensor.shape) != (n_embd, n_embd)}
    return bool(shapes) and all(len(shape) == 2 and shape[0] != n_embd and shape[1] == n_embd for shape in shapes)


def from_web_rwkv(weights: Weights) -> Weights:
    """`weights` in the shapes of `RWKV7`."""
    return {
        # contiguous, as torch.save would store the transposition as such, and other programs may not expect one
        name: tensor.t().contiguous() if is_low_rank(name) and tensor.dim() == 2 else tensor
        for name, tensor in weights.items()
    }


def to_web_rwkv(weights: Weights) -> Weights:
    """The inverse of `from_web_rwkv`, in fp16. Raises UserError for values that fp16 can't hold."""
    return to_fp16(from_web_rwkv(weights))


def in_fp16(name: str, tensor: Tensor, type: str) -> Tensor:
    """The values that a .st file holds for a tensor of the model."""
    return tensor.half()


def write_web_rwkv(export: Export, path: Path) -> None:
    """Write a model as a .st file. Raises UserError for values that fp16 can't hold and for models that web-rwkv can't
    read, OSError."""
    n_embd = export.config.n_embd
    if export.config.n_layer < 2:  # it reads the size of v1 from block 1
        raise UserError(
            "web-rwkv reads models of two layers or more; this one has 1",
            flag="format",
            given="st",
            advice="use another format",
        )
    tensors = to_web_rwkv(dict(export.weights))
    if not is_web_rwkv(tensors):
        raise UserError(
            f"the sizes of the low-rank matrices equal n_embd {n_embd}, so that readers can't tell whether they "
            "are transposed",
            flag="format",
            given="st",
            advice="use another format",
        )
    write_safetensors(tensors, path, {"format": "pt"})


def to_fp16(tensors: Mapping[str, Tensor]) -> Weights:
    """`tensors` in fp16. Raises UserError naming the first one with values that fp16 can't hold."""
    return {name: rounded(name, tensor, torch.float16).contiguous() for name, tensor in tensors.items()}

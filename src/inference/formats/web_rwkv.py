"""The .st files of web-rwkv and Ai00: safetensors in fp16 with RWKV-7's names and the low-rank matrices transposed.

Tuned initial states and LoRA weights are files of their own there. Of any file the last two dimensions are swapped in
w1 ... g2, in time_state ([H, key, value] instead of [H, value, key]) and in LoRA's A, which is called lora.0.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from src.errors import UserError
from src.inference.formats.format import Export
from src.model.safetensors_file import write_safetensors
from src.model.weights import Weights

# w1 ... g2, which their converter transposes.
LOW_RANK = re.compile(r"\.att\.[wavg][12]$")
STATE = re.compile(r"^blocks\.\d+\.att\.time_state$")
# Theirs, and RWKV-PEFT's names for the same two matrices: A [r, in] and B [out, r].
LORA = re.compile(r"^(blocks\.\d+\.(?:att|ffn)\.\w+)\.lora\.([01])$")
LORA_RWKV = re.compile(r"^(blocks\.\d+\.(?:att|ffn)\.\w+)\.lora_([AB])(?:\.weight)?$")
LARGEST = torch.finfo(torch.float16).max


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
        name: tensor.t().contiguous() if LOW_RANK.search(name) and tensor.dim() == 2 else tensor
        for name, tensor in weights.items()
    }


def to_web_rwkv(weights: Weights) -> Weights:
    """The inverse of `from_web_rwkv`, in fp16. Raises UserError for values that fp16 can't hold."""
    return _halved(from_web_rwkv(weights))


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


def is_tuned_state(tensors: Weights) -> bool:
    """Whether a file contains nothing but tuned initial states, blocks.N.att.time_state."""
    return bool(tensors) and all(STATE.match(name) for name in tensors)


def write_state(states: Weights, path: Path) -> None:
    """Write tuned initial states blocks.N.att.time_state [H, value, key]. Raises UserError, OSError."""
    for name, state in states.items():
        if not STATE.match(name) or state.dim() != 3 or state.shape[1] != state.shape[2]:
            raise UserError(
                f"{name} of shape {list(state.shape)}", expected="blocks.N.att.time_state [heads, N, N] alone"
            )
    write_safetensors(_halved(_swapped(states)), path, {"format": "pt"})


def read_state(tensors: Weights) -> Weights:
    """The inverse: states [H, value, key] of the tensors of such a file."""
    return _swapped(tensors)


def write_lora(tensors: Weights, path: Path) -> None:
    """Write LoRA weights blocks.N.att.key.lora_A [r, in] and .lora_B [out, r]; vectors and norms in the file are kept
    as they are. Raises UserError, OSError. Alpha isn't stored: it is set where the file is loaded."""
    renamed: Weights = {}
    for name, tensor in tensors.items():
        if match := LORA_RWKV.match(name):
            part = "AB".index(match[2])
            renamed[f"{match[1]}.lora.{part}"] = tensor if part else tensor.t()
        elif tensor.dim() >= 2 and tensor.squeeze().dim() >= 2:
            raise UserError(f"{name} is a whole matrix", expected="blocks.N.att|ffn.NAME.lora_A and .lora_B")
        else:
            renamed[name] = tensor
    _check_pairs(renamed)
    write_safetensors(_halved(renamed), path, {"format": "pt"})


def read_lora(tensors: Weights) -> Weights:
    """The inverse: lora_A [r, in] and lora_B [out, r] of the tensors of such a file. Raises UserError."""
    _check_pairs(tensors)
    result: Weights = {}
    for name, tensor in tensors.items():
        if match := LORA.match(name):
            result[f"{match[1]}.lora_{'AB'[int(match[2])]}"] = tensor if match[2] == "1" else tensor.t().contiguous()
        else:
            result[name] = tensor
    return result


def _check_pairs(tensors: Weights) -> None:
    """Raises UserError unless each lora.0 [in, r] has its lora.1 [out, r]."""
    ranks: dict[str, dict[str, int]] = {}
    for name, tensor in tensors.items():
        if match := LORA.match(name):
            ranks.setdefault(match[1], {})[match[2]] = tensor.shape[-1]
    if not ranks:
        raise UserError("no LoRA weights", expected="blocks.N.att|ffn.NAME.lora_A and .lora_B")
    for name, pair in ranks.items():
        if len(pair) < 2 or pair["0"] != pair["1"]:
            raise UserError(f"{name} has LoRA matrices of the ranks {list(pair.values())}", expected="two of one rank")


def _swapped(states: Weights) -> Weights:
    return {name: state.mT.contiguous() for name, state in states.items()}


def _halved(tensors: Weights) -> Weights:
    """In fp16. Raises UserError naming the first tensor with values that fp16 can't hold."""
    for name, tensor in tensors.items():
        if tensor.numel() and (largest := float(tensor.abs().max())) > LARGEST:
            raise UserError(
                f"{name} has values up to {largest:.3g}; fp16 holds at most {LARGEST:g}",
                flag="format",
                given="st",
                advice="use --format safetensors or another one with bf16",
            )
    return {name: tensor.half().contiguous() for name, tensor in tensors.items()}

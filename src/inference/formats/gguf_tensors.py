"""Names, shapes and types of the tensors of an RWKV-7 model in a GGUF file (llama.cpp), both ways.

The six mixes of token shift are one tensor, low-rank matrices are transposed, r_k is flat, and block 0, which has no
value residual, holds copies of a0, a1, a2 as v0, v1, v2: llama.cpp loads them and never uses them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from src.config import ModelConfig
from src.errors import UserError
from src.inference.formats.fla import MIXES, is_low_rank
from src.inference.formats.gguf_file import F32, GGUFFile
from src.inference.formats.lazy import LazyWeights
from src.model import RWKV7
from src.model.weights import IDLE_IN_LAYER_0

# Our name -> GGUF's; {} is the layer. A name that ends in "." is a prefix of .weight and .bias.
_NAMES = {
    "emb.weight": "token_embd.weight",
    "blocks.0.ln0.": "token_embd_norm.",
    "ln_out.": "output_norm.",
    "head.weight": "output.weight",
    "blocks.{}.ln1.": "blk.{}.attn_norm.",
    "blocks.{}.ln2.": "blk.{}.attn_norm_2.",
    "blocks.{}.att.ln_x.": "blk.{}.time_mix_ln.",
    **{
        f"blocks.{{}}.att.{name}.weight": f"blk.{{}}.time_mix_{name}.weight"
        for name in ("receptance", "key", "value", "output")
    },
    **{
        f"blocks.{{}}.att.{name}": f"blk.{{}}.time_mix_{name}.weight"
        for name in (*(f"{kind}{part}" for kind in "wav" for part in "012"), "g1", "g2", "k_k", "k_a", "r_k")
    },
    "blocks.{}.ffn.x_k": "blk.{}.channel_mix_lerp_k.weight",
    "blocks.{}.ffn.key.weight": "blk.{}.channel_mix_key.weight",
    "blocks.{}.ffn.value.weight": "blk.{}.channel_mix_value.weight",
}
_FUSED = "blk.{}.time_mix_lerp_fused.weight"
# What is stored in the type of the file: the large matrices. All else is small and stays F32, as llama-quantize leaves
# it too, and llama.cpp requires of vectors.
_LARGE = re.compile(r"emb\.weight|head\.weight|blocks\.\d+\.(att|ffn)\.(receptance|key|value|output)\.weight")


def gguf_name(name: str) -> str:
    """GGUF's name of a parameter of `RWKV7`, but of the six mixes, which are fused. Raises UserError."""
    for ours, theirs in _NAMES.items():
        # exact names end here, prefixes go on with weight or bias
        pattern = re.escape(ours).replace(r"\{\}", r"(\d+)") + (r"(weight|bias)" if ours.endswith(".") else "")
        if match := re.fullmatch(pattern, name):
            parts = [part for part in match.groups() if part is not None]
            return (theirs + ("{}" if ours.endswith(".") else "")).format(*parts)
    raise UserError("no such parameter in an RWKV-7 model", given=name)


def is_large(name: str) -> bool:
    """Whether a parameter of `RWKV7` is stored in the type of the file, not in F32."""
    return _LARGE.fullmatch(name) is not None


@dataclass(frozen=True)
class Stored:
    """A tensor of a GGUF file.

    name   GGUF's
    shape  as in NumPy, the reverse of GGUF's own order
    kind   type of its numbers, as in gguf_file.py
    ours   the parameter of `RWKV7` that it holds; of a fused one, the first
    make   its values
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    ours: str
    make: Callable[[], Tensor]


def to_gguf(weights: Mapping[str, Tensor], config: ModelConfig, kind: int) -> Iterator[Stored]:
    """The tensors of a model (a state dict of `RWKV7`), in the order of its layers; the large matrices as `kind`."""
    with torch.device("meta"):  # for the shapes, without a look at the weights
        shapes = {name: tuple(t.shape) for name, t in RWKV7(config).state_dict().items()}
    for name, shape in shapes.items():
        if name.endswith(".att.x_r"):
            layer = name.split(".")[1]
            mixes = [name.removesuffix("x_r") + mix for mix in MIXES]
            fused = (len(MIXES), 1, 1, config.n_embd)
            yield Stored(_FUSED.format(layer), fused, F32, name, partial(_stack, weights, mixes))
        if re.search(r"\.att\.x_.$", name) or name in IDLE_IN_LAYER_0:
            continue
        source = partial(_plain, weights, name)
        stored = shape[::-1] if is_low_rank(name) else _stored_shape(shape, name)
        yield Stored(gguf_name(name), stored, kind if is_large(name) else F32, name, source)
        if re.fullmatch(r"blocks\.0\.att\.a[012]", name):
            yield Stored(gguf_name(name.replace("att.a", "att.v")), stored, F32, name, source)


def _stored_shape(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """[1, 1, C] and r_k's [H, N] are flat."""
    return (math.prod(shape),) if len(shape) == 3 or name.endswith("r_k") else shape


def _plain(weights: Mapping[str, Tensor], name: str) -> Tensor:
    tensor = weights[name]
    if is_low_rank(name):
        return tensor.t().contiguous()
    return tensor.reshape(_stored_shape(tuple(tensor.shape), name))


def _stack(weights: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return torch.stack([weights[name].reshape(1, 1, -1) for name in names])


def from_gguf(file: GGUFFile, n_layer: int, head_size: int) -> LazyWeights:
    """The inverse of `to_gguf`, without block 0's v0, v1, v2.

    Raises UserError for a tensor that is missing, that no RWKV-7 model has, or that can't be brought into shape.
    """
    makers: dict[str, Callable[[], Tensor]] = {}
    used = {gguf_name(name) for name in IDLE_IN_LAYER_0}
    for name in _parameters(n_layer):
        theirs = gguf_name(name)
        shape = _shape(file, theirs)
        if (is_low_rank(name) and len(shape) != 2) or (name.endswith("r_k") and math.prod(shape) % head_size):
            raise UserError(f"the tensor {theirs} is {list(shape)}")
        used.add(theirs)
        makers[name] = partial(_ours, file.tensors, theirs, name, head_size)
    for layer in range(n_layer):
        fused = _FUSED.format(layer)
        if _shape(file, fused)[0] != len(MIXES):
            raise UserError(f"the tensor {fused} is {list(file.shapes[fused])}, expected {len(MIXES)} mixes")
        used.add(fused)
        for i, mix in enumerate(MIXES):
            makers[f"blocks.{layer}.att.{mix}"] = partial(_mix, file.tensors, fused, i)
    if unknown := [name for name in file.tensors if name not in used]:
        raise UserError(f"its tensor {unknown[0]!r} is unknown")
    return LazyWeights(makers)


def _parameters(n_layer: int) -> Iterator[str]:
    """The parameters of a model that have a tensor of their own: all but the mixes and what block 0 doesn't use."""
    for ours in _NAMES:
        for layer in range(n_layer) if "{}" in ours else (0,):
            names = [ours.format(layer) + part for part in ("weight", "bias")] if ours.endswith(".") else [ours]
            yield from (name for each in names if (name := each.format(layer)) not in IDLE_IN_LAYER_0)


def _shape(file: GGUFFile, name: str) -> tuple[int, ...]:
    if not file.shapes.get(name):
        raise UserError(f"the tensor {name} is missing")
    return file.shapes[name]


def _ours(tensors: Mapping[str, Tensor], theirs: str, name: str, head_size: int) -> Tensor:
    tensor = tensors[theirs]
    if is_low_rank(name):
        return tensor.t().contiguous()
    if name.endswith("r_k"):
        return tensor.reshape(-1, head_size)
    return tensor if tensor.dim() > 1 or name.split(".")[-1] in ("weight", "bias") else tensor.reshape(1, 1, -1)


def _mix(tensors: Mapping[str, Tensor], fused: str, index: int) -> Tensor:
    return tensors[fused][index].reshape(1, 1, -1)

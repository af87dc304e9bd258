"""One token of a few sequences through a whole RWKV-7 network on a CPU, in one native call (cuda/cpu/decode.cpp).

src/inference/step.py has the same mathematics in plain PyTorch, for other devices and as what this is tested against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from src.ops import build

DTYPES = (torch.float32, torch.bfloat16)
MOST_SEQUENCES = 64  # up to here it was measured to be ahead of BLAS (L12-D768)
MOST_HEAD_SIZE = 256  # kMostN in cuda/cpu/decode.cpp
# The channel vectors of a block in the order in which cuda/cpu/decode.cpp (enum Vector) reads them.
VECTORS = (
    *("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias"),
    *("att.x_r", "att.x_k", "att.x_v", "att.x_w", "att.x_a", "att.x_g"),
    *("att.w0", "att.a0", "att.v0", "att.k_k", "att.k_a", "att.r_k", "att.ln_x.weight", "att.ln_x.bias", "ffn.x_k"),
)
MATRICES = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
LOW_RANK = ("w", "a", "g", "v")


@dataclass(frozen=True)
class DecodeWeights:
    """A network's weights as the native step reads them: the large matrices where they lie, copies of the small ones.

    fp32 matrices of which every number is a bf16 number, as in files saved in bf16, are read as bf16: the same
    arithmetic on the same numbers at half the bytes, and so nearly twice as fast; the copies take half of the
    weights' memory once more. For one sequence they can be packed to 12 bits a number (three eighths), without loss
    (cuda/cpu/packed.h).

    embedding and head [V, C]; ends fp32 [4, C]: weight and bias of the norms after the embedding and before the head;
    layers: for each block its vectors fp32 [19, C], inner [D, C] and outer [H, D, N] low-rank matrices (D: the four
    ranks together), and its MATRICES [out, in] (a packed matrix is uint8 [bytes]); ranks: of decay, learning rate,
    gate and value residual.
    """

    embedding: Tensor
    head: Tensor
    ends: Tensor
    layers: list[Tensor]
    ranks: tuple[int, ...]

    @classmethod
    def of(
        cls, embedding: Tensor, head: Tensor, ends: Sequence[Tensor], blocks: Sequence[Mapping[str, Tensor]], pack: bool
    ) -> DecodeWeights:
        """`blocks`: each one's parameters by name; `pack`: for steps of one sequence. Needs the native library."""
        return cls(
            embedding=embedding.detach().contiguous(),
            head=_compact(head, pack),
            ends=torch.stack([vector.detach().float() for vector in ends]),
            layers=[tensor for block in blocks for tensor in _lay_out(block, pack)],
            ranks=tuple(blocks[0][f"att.{kind}1"].shape[1] for kind in LOW_RANK),
        )


def _lay_out(block: Mapping[str, Tensor], pack: bool) -> list[Tensor]:
    n_head, head_size = block["att.r_k"].shape
    # Per head: one head's columns of the four matrices are read together, by one thread.
    outer = torch.cat([block[f"att.{kind}2"].detach() for kind in LOW_RANK])
    return [
        torch.stack([block[name].detach().float().flatten() for name in VECTORS]),
        _compact(torch.cat([block[f"att.{kind}1"].detach().t() for kind in LOW_RANK]), pack),
        _compact(outer.view(-1, n_head, head_size).transpose(0, 1), pack=False),
        *(_compact(block[f"{name}.weight"], pack) for name in MATRICES),
    ]


def _compact(matrix: Tensor, pack: bool) -> Tensor:
    """The matrix itself, or without loss as bf16 or packed where that is possible and pays."""
    matrix = matrix.detach().contiguous()
    some = matrix[:4]  # four rows tell most matrices that aren't bf16
    if matrix.dtype == torch.bfloat16 or not torch.equal(some.bfloat16().float(), some):
        return matrix
    short = matrix.bfloat16()
    if not torch.equal(short.float(), matrix):
        return matrix
    packed = torch.ops.rwkv7.pack(short) if pack else short[:0]
    # The op returns nothing where packing would not pay.
    return packed if packed.numel() else short


def can_decode(device: torch.device, dtype: torch.dtype, head_size: int, dim_ffn: int) -> bool:
    """Whether `decode_step` takes such a network; builds the native library on the first call that gets so far."""
    if device.type != "cpu" or dtype not in DTYPES or head_size % 16 or head_size > MOST_HEAD_SIZE or dim_ffn % 16:
        return False
    try:
        build.load_native()
    except build.BuildError:  # wkv7 has warned with the reason
        return False
    return True


def decode_step(tokens: Tensor, weights: DecodeWeights, att_shift: Tensor, wkv: Tensor, ffn_shift: Tensor) -> Tensor:
    """Logits fp32 [B, V] after tokens int64 [B]; the states move on in place.

    att_shift and ffn_shift [L, B, C] of the weights' dtype, wkv fp32 [L, B, H, N, N]. RuntimeError for what doesn't
    fit together and for ids outside the vocabulary.
    """
    w = weights
    return torch.ops.rwkv7.decode_step(
        tokens, w.embedding, w.head, w.ends, w.layers, *w.ranks, att_shift, wkv, ffn_shift
    )

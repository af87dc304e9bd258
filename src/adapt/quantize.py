"""A frozen base in 8 or 4 bits: the six matrices of each block as codes, multiplied in the dtype of the input.

    int8   W[o, i] ~ q[o, i] absmax[o] / 127                         q = round(127 W / absmax), a row each
    nf4    W[n]    ~ LEVELS[q[n]] absmax[n // 64]                    q the nearest level, n over the flattened matrix

The other parameters stay as they are. A product dequantises one matrix, and again in backward:
the gradient reaches the input only, and nothing is kept for it but the codes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.adapt.config import TARGETS
from src.model import RWKV7

QUANT_KINDS = ("int8", "nf4")
NF4_BLOCK = 64
# Quantiles of the normal distribution, of equal probability mass, with 0 among them (Dettmers et al., QLoRA, 2023,
# appendix E). bitsandbytes has the same sixteen numbers.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def quantize_base(model: RWKV7, kind: str) -> None:
    """Replace the six matrices of each block by `QuantizedLinear`, one after another. `kind`: one of QUANT_KINDS."""
    for block in model.blocks:
        for target in TARGETS:
            half, _, name = target.partition(".")
            linear = getattr(getattr(block, half), name)
            setattr(getattr(block, half), name, QuantizedLinear(linear.weight, kind))


class QuantizedLinear(nn.Module):
    """y = x W^T for a quantised W [out, in]: x [..., in] of any floating dtype -> y [..., out] of the same.

    Buffers are no part of the state dict: they follow from the base's weights. The fp32 ones are stored as
    integers, so that `model.bfloat16()` and what engines do of the kind leave them as they are.
    """

    codes: Tensor  # int8 [out, in], or uint8 with two codes of nf4 each, the first in the upper half
    absmax: Tensor  # fp32 as int32: [out], or [blocks]

    def __init__(self, weight: Tensor, kind: str) -> None:
        super().__init__()
        assert kind in QUANT_KINDS
        self.kind, (self.out_features, self.in_features) = kind, weight.shape
        weight = weight.detach().float()
        codes, absmax = quantize_int8(weight) if kind == "int8" else quantize_nf4(weight)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("absmax", absmax.view(torch.int32), persistent=False)

    @property
    def weight(self) -> Tensor:
        """W as it is multiplied with, fp32 [out, in]; a new tensor each time, without gradient."""
        return self.dequantize(torch.float32)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W in `dtype`, rounded once from fp32."""
        absmax = self.absmax.view(torch.float32)
        if self.kind == "int8":
            return (self.codes.float() * (absmax / 127).unsqueeze(1)).to(dtype)
        return dequantize_nf4(self.codes, absmax, (self.out_features, self.in_features)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenProduct.apply(x, self)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


class _FrozenProduct(torch.autograd.Function):
    """x W^T without keeping x or W: the gradient is grad W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: QuantizedLinear) -> Tensor:
        ctx.module = module
        return F.linear(x, module.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad @ ctx.module.dequantize(grad.dtype), None


# ---- int8 ------------------------------------------------------------------------------------------------------------


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [out, in] -> int8 [out, in], absmax fp32 [out]."""
    absmax = weight.abs().amax(dim=1)
    scale = torch.where(absmax > 0, 127 / absmax, 0)
    return (weight * scale.unsqueeze(1)).round().to(torch.int8), absmax


# ---- nf4 -------------------------------------------------------------------------------------------------------------


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [out, in] -> uint8 [numel / 2] (rounded up) and absmax fp32 [blocks], the last block filled with zeros."""
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    numel = weight.numel()
    blocks = F.pad(weight.flatten(), (0, -numel % NF4_BLOCK)).view(-1, NF4_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / torch.where(absmax > 0, absmax, 1).unsqueeze(1)
    # the nearest level: how many of the midpoints between neighbours lie below
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8).flatten()
    pairs = codes[: numel + numel % 2].view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1], absmax


def dequantize_nf4(codes: Tensor, absmax: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse: fp32 of `shape`."""
    if codes.is_cuda and (library := _bitsandbytes()) is not None:
        return _dequantize_by(library, codes, absmax, shape)
    levels = torch.tensor(NF4_LEVELS, device=codes.device)
    # a table of both numbers of a byte: one lookup for two weights
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    numel = shape[0] * shape[1]
    flat = pairs.index_select(0, codes.int()).flatten()
    if flat.numel() % NF4_BLOCK:
        flat = F.pad(flat, (0, -flat.numel() % NF4_BLOCK))
    return (flat.view(-1, NF4_BLOCK) * absmax.unsqueeze(1)).flatten()[:numel].view(shape)


def _bitsandbytes() -> Any:
    """The functions of bitsandbytes, whose format of nf4 this is; None where it isn't installed."""
    try:
        from bitsandbytes import functional
    except ImportError:
        return None
    return functional


def _dequantize_by(library: Any, codes: Tensor, absmax: Tensor, shape: tuple[int, int]) -> Tensor:
    """`dequantize_nf4` in one kernel of bitsandbytes."""
    state = library.QuantState(
        absmax=absmax,
        shape=torch.Size(shape),
        code=torch.tensor(NF4_LEVELS, device=codes.device),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=torch.float32,
    )
    return library.dequantize_4bit(codes.view(-1, 1), state)  # type: ignore[no-any-return]

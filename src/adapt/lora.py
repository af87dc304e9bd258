"""Matrices with an adapter: y = x W^T plus a trained term, W frozen. LoRA, PiSSA, DoRA and MiSS.

Each class is mixed in before the class of the module that it adapts (nn.Linear, or a quantised one), whose own forward
gives x W^T and whose parameter names stay as they are. Products are computed in the dtype of x, adapters are stored in
fp32. s is `AdapterConfig.scale`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from src.adapt.config import AdapterConfig
from src.adapt.quantize import QuantizedLinear

# Singular vectors of larger matrices are approximated: exact ones of a 1.5 B model would take half an hour.
EXACT_SVD_UP_TO = 512
SVD_OVERSAMPLING, SVD_ITERATIONS = 16, 8


class Adapted(nn.Module):
    """Base of the mix-ins. `base_product(x)` is x W^T, x [rows, in]; `base_gradient(grad)` is grad W, [rows, in]."""

    in_features: int
    out_features: int

    def base_product(self, x: Tensor) -> Tensor:
        return super().forward(x)  # type: ignore[misc,no-any-return]

    def base_gradient(self, grad: Tensor) -> Tensor:
        weight = self.dequantize(grad.dtype) if isinstance(self, QuantizedLinear) else self.weight
        return grad @ weight  # type: ignore[operator]

    def adapt(self, config: AdapterConfig) -> None:
        """Add the parameters, with values where W has some."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return self.adapted_product(x.reshape(-1, self.in_features)).unflatten(0, x.shape[:-1])

    def adapted_product(self, x: Tensor) -> Tensor:
        """As `forward`, of rows [rows, in]."""
        raise NotImplementedError


def add_low_rank(module: Adapted, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
    """x W^T + s dropout(x) A^T B^T: x [rows, in] -> [rows, out], with the module's W, A [r, in], B [out, r]."""
    a, b = a.to(x.dtype), b.to(x.dtype)
    if (dropout and module.training) or torch.compiler.is_compiling():
        low = F.linear(F.dropout(x, dropout, module.training), a)
        return torch.addmm(module.base_product(x), low, b.t(), alpha=scale)
    return _LowRankSum.apply(x, a, b, module, scale)  # type: ignore[no-any-return]


class _LowRankSum(torch.autograd.Function):
    """`add_low_rank` without dropout, in place: the low-rank part is added into the product with W, and in backward
    into the gradient from there. A sum would take two more passes over [rows, out] and [rows, in].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, module: Adapted, scale: float) -> Tensor:
        low = F.linear(x, a)
        ctx.save_for_backward(x, a, b, low)
        ctx.module, ctx.scale = module, scale
        return module.base_product(x).addmm_(low, b.t(), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, a, b, low = ctx.saved_tensors
        grad_low = (grad @ b).mul_(ctx.scale)
        grad_x = ctx.module.base_gradient(grad).addmm_(grad_low, a) if ctx.needs_input_grad[0] else None
        return grad_x, grad_low.t() @ x, (grad.t() @ low).mul_(ctx.scale), None, None


class Lora(Adapted):
    """y = x W^T + s dropout(x) A^T B^T, A [r, in], B [out, r]."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def adapt(self, config: AdapterConfig) -> None:
        self.scale, self.dropout = config.scale, config.lora_dropout
        device = next(iter([*self.parameters(), *self.buffers()])).device
        self.lora_A = nn.Parameter(torch.empty(config.r, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, config.r, device=device))

    def adapted_product(self, x: Tensor) -> Tensor:
        return add_low_rank(self, x, self.lora_A, self.lora_B, self.scale, self.dropout)


class Pissa(Lora):
    """y = x (W - B0 A0)^T + x A^T B^T: LoRA with s = 1 that begins at A0, B0, the largest r singular vectors of W.

    Computed as x W^T + x [A; A0]^T [B, -B0]^T: the base stays as it is, bit for bit, whatever its dtype, and what is
    written at the end is an ordinary LoRA of rank 2 r on it.
    """

    lora_A_init: nn.Parameter
    lora_B_init: nn.Parameter

    def adapt(self, config: AdapterConfig) -> None:
        super().adapt(config)
        self.scale = 1.0
        for name in ("lora_A", "lora_B"):
            value = getattr(self, name).detach().clone()
            self.register_parameter(f"{name}_init", nn.Parameter(value, requires_grad=False))

    @torch.no_grad()
    def decompose(self, weight: Tensor) -> None:
        """A0 = sqrt(S_r) V_r^T and B0 = U_r sqrt(S_r) of W = U S V^T."""
        r = self.lora_A.shape[0]
        if min(weight.shape) <= EXACT_SVD_UP_TO:
            u, s, vt = torch.linalg.svd(weight.float(), full_matrices=False)
        else:
            size = min(r + SVD_OVERSAMPLING, *weight.shape)
            u, s, v = torch.svd_lowrank(weight.float(), q=size, niter=SVD_ITERATIONS)
            vt = v.t()
        root = s[:r].sqrt()
        for parameter in (self.lora_A, self.lora_A_init):
            parameter.copy_(root[:, None] * vt[:r])
        for parameter in (self.lora_B, self.lora_B_init):
            parameter.copy_(u[:, :r] * root)

    def adapted_product(self, x: Tensor) -> Tensor:
        a = torch.cat([self.lora_A, self.lora_A_init])
        b = torch.cat([self.lora_B, -self.lora_B_init], dim=1)
        return add_low_rank(self, x, a, b, 1.0, self.dropout)


class Dora(Lora):
    """y = m / ||W + s B A|| (x W^T + s dropout(x) A^T B^T), with the norm of each row and m [out] trained.

    ||W + s B A||^2 = ||W||^2 + 2 s (W A^T) B + s^2 B (A A^T) B, row by row: without forming the matrix, and with its
    exact gradient (PEFT takes the norm as a constant in backward).
    """

    lora_magnitude: nn.Parameter
    squared_norms: Tensor  # ||W||^2 of each row, fp32 [out]

    def adapt(self, config: AdapterConfig) -> None:
        super().adapt(config)
        norms = torch.empty(self.out_features, device=self.lora_A.device)
        self.lora_magnitude = nn.Parameter(norms)
        self.register_buffer("squared_norms", norms.detach().clone(), persistent=False)

    @torch.no_grad()
    def measure(self, weight: Tensor) -> None:
        """Set ||W||^2 of the rows; m begins as its root, so that the adapted model is the base."""
        self.squared_norms.copy_(weight.to(self.squared_norms.dtype).square().sum(1))

    def adapted_product(self, x: Tensor) -> Tensor:
        y = add_low_rank(self, x, self.lora_A, self.lora_B, self.scale, self.dropout)
        return y * (self.lora_magnitude / self.norms(x.dtype)).to(y.dtype)

    def norms(self, dtype: torch.dtype) -> Tensor:
        """||W + s B A|| of each row, [out]."""
        # at least fp32: an engine may have A and B in the base's dtype, and the norm is a sum over a whole row
        a, b = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (self.lora_A, self.lora_B))
        s = self.scale
        cross = self.base_product(a.to(dtype)).t().to(b.dtype)  # W A^T, [out, r]
        quadratic = ((b @ (a @ a.t())) * b).sum(1)
        return (self.squared_norms + 2 * s * (cross * b).sum(1) + s**2 * quadratic).sqrt()


class Miss(Adapted):
    """y = x W^T + x_s D, D [r, out], x_s [r] the sum of x's pieces of r columns (earlier DiSHA, Bone).

    The last piece is padded with zeros where r doesn't divide the width.
    """

    miss_block: nn.Parameter

    def adapt(self, config: AdapterConfig) -> None:
        device = next(iter([*self.parameters(), *self.buffers()])).device
        self.dropout = config.lora_dropout
        self.miss_block = nn.Parameter(torch.empty(config.r, self.out_features, device=device))

    def adapted_product(self, x: Tensor) -> Tensor:
        block = self.miss_block.to(x.dtype)
        pieces = F.dropout(x, self.dropout, self.training) if self.dropout else x
        if remainder := -self.in_features % block.shape[0]:
            pieces = F.pad(pieces, (0, remainder))
        summed = pieces.unflatten(1, (-1, block.shape[0])).sum(1)
        return torch.addmm(self.base_product(x), summed, block)


MIXINS: dict[str, type[Adapted]] = {"lora": Lora, "pissa": Pissa, "dora": Dora, "miss": Miss}

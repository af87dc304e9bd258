"""Inputs for kernel tests as the model makes them and as it should never make them, and the float64 answer to each."""

from __future__ import annotations

import torch

from src.ops.reference import wkv7_reference

Tensors = dict[str, torch.Tensor]
INPUTS = "rwkvab"


def problem(
    batch: int, length: int, heads: int, head_size: int, dtype: torch.dtype, *,
    kind: str = "usual", state: bool = False, cu_seqlens: list[int] | None = None, seed: int = 0,
) -> Tensors:  # fmt: skip
    """r, w, k, v, a, b (a = -kk, b = kk * rate with unit keys kk, as in the model), perhaps state and cu_seqlens.

    kind: usual | fast (every decay at its floor, 0.545) | slow (decay 1 - 1e-3 and up) | correlated (all keys of a
    head nearly the same, rate near 1: the worst case for the inverse inside a chunk).
    """
    draw = torch.Generator().manual_seed(seed)
    shape = (batch, length, heads, head_size)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draw)

    r, k, v = normal(*shape), normal(*shape), normal(*shape)
    w = {"fast": 8.0 + normal(*shape), "slow": -8.0 + normal(*shape)}.get(kind, normal(*shape) * 2 - 2)
    key = normal(*shape)
    if kind == "correlated":
        key = normal(1, 1, heads, head_size) + 0.1 * key
    rate = torch.sigmoid(normal(*shape) + (4.0 if kind == "correlated" else 0.0))
    kk = torch.nn.functional.normalize(key, dim=-1)
    x: Tensors = {"r": r, "w": w, "k": 0.5 * k, "v": v, "a": -kk, "b": kk * rate}
    if kind == "correlated":
        x["k"] = kk * (1 + 0.1 * normal(*shape))
    x = {name: tensor.to(dtype).contiguous() for name, tensor in x.items()}
    documents = batch
    if cu_seqlens is not None:
        x["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
        documents = len(cu_seqlens) - 1
    if state:
        x["state"] = normal(documents, heads, head_size, head_size)
    return x


def incoming(x: Tensors, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of y and of final_state."""
    draw = torch.Generator().manual_seed(seed)
    batch, _, heads, head_size = x["r"].shape
    documents = batch if x.get("cu_seqlens") is None else x["cu_seqlens"].numel() - 1
    dy = torch.randn(x["r"].shape, generator=draw).to(x["r"].dtype)
    return dy, torch.randn(documents, heads, head_size, head_size, generator=draw)


def answer(x: Tensors, dy: torch.Tensor, dfinal_state: torch.Tensor | None) -> Tensors:
    """Outputs and gradients in float64, from the plain reference and autograd."""
    leaves = {name: tensor.double().requires_grad_() for name, tensor in x.items() if name != "cu_seqlens"}
    if "state" not in leaves:
        batch, _, heads, head_size = x["r"].shape
        documents = batch if x.get("cu_seqlens") is None else x["cu_seqlens"].numel() - 1
        leaves["state"] = torch.zeros(documents, heads, head_size, head_size, dtype=torch.float64, requires_grad=True)
    y, final_state = wkv7_reference(*(leaves[name] for name in INPUTS), leaves["state"], x.get("cu_seqlens"))
    loss = (y * dy.double()).sum()
    if dfinal_state is not None:
        loss = loss + (final_state * dfinal_state.double()).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    out = {"y": y.detach(), "final_state": final_state.detach()}
    return out | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def error(got: torch.Tensor, true: torch.Tensor) -> float:
    """||got - true|| / ||true||; not finite when anything is."""
    return float((got.double() - true).norm() / true.norm().clamp(min=1e-30))

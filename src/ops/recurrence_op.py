"""The native op of the recurrence for PyTorch: sizes of its outputs, gradients, and replay in recomputation.

cuda/wkv7_schemas.h has the op's schemas. Shapes and dtypes were checked by `src.ops.recurrence.wkv7`, the only caller.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CPU_SEGMENT = 32  # tokens between two kept states; kSegment in cuda/cpu/wkv7_cpu.h
CUDA_WINDOW = {
    32: 16,
    64: 16,
    128: 8,
}  # by head size: the same for the exact CUDA kernel; Shape::window in cuda/wkv7_recurrent.cu
CHUNKED_SEGMENT, CHUNKED_SLOT = (
    48,
    8704 // 4,
)  # for the chunked kernel; and fp32 numbers in a kept state; cuda/wkv7_chunked.cu
WGMMA_SEGMENT, WGMMA_SLOT = 32, 8192 // 4  # for the kernel by warpgroups; kTokens and kSlotBytes, cuda/wgmma_state.cuh
KERNEL_NUMBERS = {"recurrent": 0, "chunked": 1, "wgmma": 2}  # as cuda/wkv7_schemas.h has them


WGMMA_LEAST_PART = 512  # tokens, of a document that is cut for want of heads; WKV7_LEAST_PART, cuda/wgmma_state.cuh


def wgmma_parts(tokens: int, sequences: int, heads: int) -> int:
    """Into how many parts the kernel by warpgroups cuts each document, to have work for a whole GPU; Cut there."""
    length = tokens // sequences
    count = min(2 * 132 // (sequences * heads), length // WGMMA_LEAST_PART)
    if count < 4:
        return 1
    part = -(-length // (count * WGMMA_SEGMENT)) * WGMMA_SEGMENT
    return -(-length // part)


def kept_floats(kernel: int, tokens: int, sequences: int, heads: int, head_size: int) -> tuple[int, int]:
    """fp32 numbers of saved_state and saved_sa, as a CUDA kernel keeps them.

    There is room for every document's partial last slot, whatever the bounds are: sizes must not depend on their
    values.
    """
    if kernel == KERNEL_NUMBERS["wgmma"]:
        parts = sequences * wgmma_parts(tokens, sequences, heads)
        between = 3 * parts * heads * head_size**2 if parts > sequences else 0
        return (tokens // WGMMA_SEGMENT + parts) * heads * WGMMA_SLOT, between
    if kernel == KERNEL_NUMBERS["chunked"]:
        return (tokens // CHUNKED_SEGMENT + sequences) * heads * CHUNKED_SLOT, 0
    return (tokens // CUDA_WINDOW[head_size] + sequences) * heads * head_size**2, tokens * heads * head_size


def run_native(
    inputs: tuple[Tensor, ...], state: Tensor | None, cu_seqlens: Tensor | None, kernel: int
) -> tuple[Tensor, Tensor]:
    """(y, final_state) of the native op; what backward needs is kept only if an input requires a gradient."""
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, state) if x is not None)
    # A compiled graph has PyTorch's selective checkpointing instead (src/model/recompute.py).
    # What needs no gradient is not recorded either, but computed again.
    cache = _active.cache if save and not torch.compiler.is_compiling() else None
    if cache is not None and cache.recorded is not None:
        y, final_state, _, _ = _Replayed.apply(*inputs, state, cu_seqlens, save, kernel, next(cache.recorded))
        return y, final_state
    outputs = torch.ops.rwkv7.wkv7_forward(*inputs, state, cu_seqlens, save, kernel)
    if cache is not None:
        # Detached: with their history they would keep the whole graph alive.
        cache.outputs.append(tuple(x.detach() for x in outputs))
    y, final_state, _, _ = outputs
    return y, final_state


class OutputCache:
    """A context that records the outputs of `wkv7` in `outputs`, or with `replay` returns them in the same order.

    A replayed call computes nothing, and its gradients are the op's own: for the recomputation of activation
    checkpointing, where the inputs are those of the recorded call. Only calls that reach the native op in eager mode
    take part. In backward the context is entered in a thread of autograd's, so the active one is kept per thread.
    """

    def __init__(self, outputs: list[tuple[Tensor, ...]], replay: bool) -> None:
        self.outputs, self.replay = outputs, replay
        self.recorded: Iterator[tuple[Tensor, ...]] | None = None

    def __enter__(self) -> None:
        self.outer = _active.cache
        # From the start at each entry: backward may run several times through one graph.
        self.recorded = iter(self.outputs) if self.replay else None
        _active.cache = self

    def __exit__(self, *_: object) -> None:
        _active.cache = self.outer


class _Active(threading.local):
    cache: OutputCache | None = None


_active = _Active()


class _Replayed(torch.autograd.Function):
    """wkv7_forward whose outputs are known already: only its place in the graph."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in inputs[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _setup_context(ctx, inputs[:-1], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*_backward(ctx, *grads), None)  # type: ignore[arg-type]


def register_op() -> None:
    """Registers shapes (for torch.compile and meta tensors) and gradients of the loaded library's op."""
    torch.library.register_fake("rwkv7::wkv7_forward", _forward_shapes)
    torch.library.register_fake("rwkv7::wkv7_backward", _backward_shapes)
    torch.library.register_autograd("rwkv7::wkv7_forward", _backward, setup_context=_setup_context)
    torch.library.register_autograd("rwkv7::wkv7_backward", _no_double_backward)


def _sequences(r: Tensor, cu_seqlens: Tensor | None) -> Any:
    return r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _forward_shapes(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    kernel: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, H, N = r.shape
    y = r.new_empty(B, T, H, N)
    final_state = r.new_empty(_sequences(r, cu_seqlens), H, N, N, dtype=torch.float32)
    if r.device.type == "cuda":
        states, sums = kept_floats(kernel, B * T, _sequences(r, cu_seqlens), H, N)
        if not save:  # the kernel by warpgroups has its scratch memory there
            states, sums = 0, sums if kernel == KERNEL_NUMBERS["wgmma"] else 0
        return y, final_state, r.new_empty(states, dtype=torch.float32), r.new_empty(sums, dtype=torch.float32)
    if not save:
        return y, final_state, r.new_empty(0, dtype=torch.float32), r.new_empty(0, dtype=torch.float32)
    # On a CPU: the state before every segment but the first; in a packed row as many as any bounds can need.
    kept = B * ((T - 1) // CPU_SEGMENT) if cu_seqlens is None else T // CPU_SEGMENT
    return y, final_state, r.new_empty(kept, H, N, N, dtype=torch.float32), r.new_empty(B, T, H, N, dtype=torch.float32)


def _backward_shapes(
    dy: Tensor,
    dfinal_state: Tensor | None,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved_state: Tensor,
    saved_sa: Tensor,
    kernel: int,
) -> tuple[Tensor, ...]:
    dstate = r.new_empty(0, dtype=torch.float32) if state is None else r.new_empty(state.shape, dtype=torch.float32)
    return (*(r.new_empty(r.shape) for _ in range(6)), dstate)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    r, w, k, v, a, b, state, cu_seqlens, save, kernel = inputs
    _, _, saved_state, saved_sa = output
    ctx.mark_non_differentiable(saved_state, saved_sa)
    ctx.set_materialize_grads(False)  # training drops the final state: no zeros are made for its gradient
    ctx.save = save
    ctx.kernel = kernel
    if save:
        ctx.save_for_backward(r, w, k, v, a, b, state, cu_seqlens, saved_state, saved_sa)


def _backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if not ctx.save:
        raise RuntimeError("wkv7_forward was called with save=False: nothing was kept for backward")
    r, w, k, v, a, b, state, cu_seqlens, saved_state, saved_sa = ctx.saved_tensors
    if dy is None:  # only the final state was used
        dy = torch.zeros_like(r)
    *grads, dstate = torch.ops.rwkv7.wkv7_backward(
        dy, dfinal_state, r, w, k, v, a, b, state, cu_seqlens, saved_state, saved_sa, ctx.kernel
    )
    return (*grads, None if state is None else dstate, None, None, None)


def _no_double_backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    raise RuntimeError("wkv7 has no second derivative in its native kernels; use kernel='reference' for it")

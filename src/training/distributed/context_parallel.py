"""Context parallel: P processes hold one part each of every sequence, and exchange what lies at the borders.

Recurrence, for each head: over a part c the state becomes S P_c + C_c, with

    C_c   its end state from zero
    P_c   its end state from the identity with k = v = 0; 0 where a document begins in the part

All processes exchange P_c and C_c, compute the state at each border, S_{c+1} = S_c P_c + C_c, and run their part from
the right one. Backward is the mirror image: D_c is the gradient of the state at a part's beginning while that of its
end is 0; they are exchanged, and G_c = D_{c+1} + G_{c+1} P_{c+1}^T is the gradient of the state at the end of part c.

Token shift: the last row of a part is what precedes the first row of the next one; its gradient comes back.

The state before the first part and that after the last one, and their gradients, are the same on all P processes. Bytes
that a process receives in a layer, with B sequences (1 in a packed row) and b bytes of a number:

    forward    (P - 1) B (2 C b + 8 C N)       rows of both mixes; P_c and C_c in fp32
    backward   (P - 1) B (2 C b + 4 C N)       their gradients; D_c
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from src.config import ModelConfig
from src.ops import wkv7


class ContextParallel:
    """This process's place among `size` processes that share sequences; `received`: bytes from the others so far."""

    def __init__(self, size: int) -> None:
        """Every rank of the process group takes part."""
        assert dist.get_world_size() % size == 0
        self.size, self.rank = size, dist.get_rank() % size
        self.received = 0
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, dist.get_world_size(), size)]
        self._group = groups[dist.get_rank() // size]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, in their order."""
        tensors = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(tensors, tensor.contiguous(), group=self._group)
        self.received += (self.size - 1) * tensor.numel() * tensor.element_size()
        return tensors

    def rows(self, x: Tensor, shift: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """What precedes each sequence in x [B, T, C] for token shift, and the last row of the whole sequence [B, C].

        `shift`: as `state` of `wkv7` below, [B, C] or [D (+ 1), C].
        """
        return _Rows.apply(self, cu_seqlens, x[:, -1], shift)  # type: ignore[no-any-return]

    def wkv7(
        self,
        r: Tensor,
        w: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        *,
        kernel: str,
    ) -> tuple[Tensor, Tensor]:
        """As `src.ops.wkv7` of this process's part: y, and the state at the end of the whole sequence.

        state: [B, ...] before the whole sequence. Of a packed row: first that, [1, ...], then one for each document
        that begins in this part; of D documents here, the first one is continued where there are D in all, not D + 1.
        """
        assert state is not None, "a part of a sequence is computed from a given state"
        return _Recurrence.apply(self, kernel, cu_seqlens, r, w, k, v, a, b, state)  # type: ignore[no-any-return]

    def counted_once(self, x: Tensor) -> Tensor:
        """x, whose gradient, the same on all P processes, is that of a parameter which the strategy sums over them."""
        return _CountedOnce.apply(x, self.rank == 0)  # type: ignore[no-any-return]


def data_parallel(rank: int, world_size: int, size: int) -> tuple[int, int]:
    """(rank, world size) as the data sees them: the `size` processes of a group read the same samples."""
    return rank // size, world_size // size


def bytes_received(
    c: ModelConfig, size: int, sequences: int, dtype_bytes: int, forward: int = 1, backward: int = 1
) -> int:
    """Bytes that a process receives in so many passes forward and backward, by the formula above."""
    rows, states = 2 * c.n_embd * dtype_bytes, 4 * c.n_embd * c.head_size
    return (size - 1) * sequences * c.n_layer * (forward * (rows + 2 * states) + backward * (rows + states))


def _continues(state: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether the first sequence of a part began before it."""
    return cu_seqlens is None or state.shape[0] == cu_seqlens.shape[0] - 1


def _starts(before: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """What the sequences of a part begin from: `before` the first one where it continues, `state` the others."""
    if cu_seqlens is None:
        return before
    return torch.cat([before, state[1:]]) if _continues(state, cu_seqlens) else state[1:]


def _run(inputs: list[Tensor], state: Tensor, cu_seqlens: Tensor | None, kernel: str) -> tuple[Tensor, Tensor]:
    r, w, k, v, a, b = inputs
    return wkv7(r, w, k, v, a, b, state, cu_seqlens, kernel=kernel)


class _Rows(torch.autograd.Function):
    """(last row of the part, rows before the sequences) -> (rows before those of the part, last row of the whole)."""

    # One node with the choice of what the part begins from, so that it has a gradient on every process: a collective
    # that one of them leaves out would meet another one.
    @staticmethod
    def forward(
        ctx: Any, context: ContextParallel, cu_seqlens: Tensor | None, last: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.context, ctx.is_packed, ctx.continues = context, cu_seqlens is not None, _continues(shift, cu_seqlens)
        rows = context.gather(last)
        carried = shift if cu_seqlens is None else shift[:1]
        before = rows[context.rank - 1] if context.rank > 0 else carried
        return _starts(before, shift, cu_seqlens).clone(), rows[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstarts: Tensor, dend: Tensor) -> tuple[None, None, Tensor, Tensor]:
        context = ctx.context
        first = dstarts[:1] if ctx.is_packed else dstarts
        gradients = [*context.gather(first if ctx.continues else torch.zeros_like(first)), dend]
        dshift = gradients[0]
        if ctx.is_packed:
            dshift = torch.cat([dshift, dstarts[1:] if ctx.continues else dstarts])
        return None, None, gradients[context.rank + 1], dshift


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, context: ContextParallel, kernel: str, cu_seqlens: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        *inputs, state = tensors
        carried = state if cu_seqlens is None else state[:1]
        # its end from zero; of a packed row that of the last document
        _, own = _run(inputs, _starts(torch.zeros_like(carried), state, cu_seqlens), cu_seqlens, kernel)
        addition = own if cu_seqlens is None else own[-1:]
        transition = _transition(inputs, carried, state, cu_seqlens, kernel)
        parts = [part.unbind() for part in context.gather(torch.stack([transition, addition]))]
        at_border = [carried]
        for part_transition, part_addition in parts:
            at_border.append(at_border[-1] @ part_transition + part_addition)
        start = _starts(at_border[context.rank], state, cu_seqlens)
        y, _ = _run(inputs, start, cu_seqlens, kernel)
        ctx.context, ctx.kernel, ctx.continues = context, kernel, _continues(state, cu_seqlens)
        ctx.save_for_backward(*inputs, start, cu_seqlens, torch.stack([part for part, _ in parts]))
        return y, at_border[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dend: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, start, cu_seqlens, transitions = ctx.saved_tensors
        leaves = [x.detach().requires_grad_() for x in (*inputs, start)]
        with torch.enable_grad():
            y, final = _run(leaves[:-1], leaves[-1], cu_seqlens, ctx.kernel)
        (dstart,) = torch.autograd.grad(y, leaves[-1], dy, retain_graph=True)
        first = dstart if cu_seqlens is None else dstart[:1]
        gathered = ctx.context.gather(first if ctx.continues else torch.zeros_like(first))
        at_end = [dend]  # of the state at the end of each part, from the last one
        for dpart, part in zip(reversed(gathered), reversed(transitions.unbind()), strict=True):
            at_end.append(dpart + at_end[-1] @ part.transpose(-1, -2))
        dcarried = at_end.pop()  # before the first part
        dfinal = at_end[ctx.context.size - 1 - ctx.context.rank]
        if cu_seqlens is not None:  # only the last document goes on
            dfinal = torch.cat([torch.zeros_like(final[:-1]), dfinal])
        *gradients, dstart = torch.autograd.grad([y, final], leaves, [dy, dfinal])
        if cu_seqlens is not None:
            dcarried = torch.cat([dcarried, dstart[1:] if ctx.continues else dstart])
        return None, None, None, *gradients, dcarried


def _transition(inputs: list[Tensor], carried: Tensor, state: Tensor, cu_seqlens: Tensor | None, kernel: str) -> Tensor:
    """P_c of this part, [B, H, N, N]."""
    if cu_seqlens is not None and (cu_seqlens.shape[0] > 2 or not _continues(state, cu_seqlens)):
        return torch.zeros_like(carried)
    r, w, k, _, a, b = inputs
    identity = torch.eye(carried.shape[-1], dtype=carried.dtype, device=carried.device).expand_as(carried).contiguous()
    nothing = torch.zeros_like(k)
    return wkv7(r, w, nothing, nothing, a, b, identity, kernel=kernel)[1]


class _CountedOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: bool) -> Tensor:
        ctx.counts = counts
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        # zeros, not none: DDP waits for a gradient of every parameter
        return (dx if ctx.counts else torch.zeros_like(dx)), None

"""Sequences cut into chunks of CHUNK tokens: rows [B, T, H, N] and packed documents, to [C, S, CHUNK, N] and back.

S are the sequences that are computed side by side: B * H of rows, H of a packed row. Every document begins at a
chunk's first slot, and slots without a token are padding, which leaves a state as it is. The number of chunks depends
on shapes alone: T // CHUNK + D of a packed row, so some at its end may be empty. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# 16 and 64 take longer on a CPU (tests/bench/wkv7.py --kernel portable). 1 / decay^CHUNK is at most 3e8.
CHUNK = 32


@dataclass(frozen=True)
class Packing:
    """Where the documents of a packed row lie, as int64 indices.

    token_at [C * CHUNK]: the token in a slot, T for padding;  slot_of [T]: the slot of a token
    first, last [D]: a document's first and last chunk;        document [C]: the document of a chunk
    is_first, is_last [C]: bool
    """

    token_at: Tensor
    slot_of: Tensor
    first: Tensor
    last: Tensor
    document: Tensor
    is_first: Tensor
    is_last: Tensor


def pack(cu_seqlens: Tensor, tokens: int) -> Packing:
    """The packing of the documents with these bounds, int32 [D + 1], in a row of `tokens`."""
    device, documents = cu_seqlens.device, cu_seqlens.shape[0] - 1
    # The sum of max(1, ceil(length / CHUNK)) is at most tokens // CHUNK + documents. As one fraction, which is never 1
    # for two documents: a compiled graph treats sizes of 1 apart.
    chunks = (tokens + CHUNK * documents) // CHUNK
    bounds = cu_seqlens.to(torch.int64)
    # One chunk at least: an empty document's state passes through it.
    counts = torch.div(bounds[1:] - bounds[:-1] + (CHUNK - 1), CHUNK, rounding_mode="floor").clamp(1)
    end = torch.cumsum(counts, 0)
    first, last = end - counts, end - 1
    tokens_before, chunks_before = bounds[:-1], first * CHUNK
    # The document of a token: how many documents but the first begin at it or before. Those at T have no token.
    document = _count_up(bounds[1:-1], tokens + 1)[:tokens]
    token = torch.arange(0, tokens, 1, device=device)
    slot_of = token + (chunks_before - tokens_before).index_select(0, document)
    padding = torch.full((chunks * CHUNK,), tokens, dtype=torch.int64, device=device)
    nothing = torch.full((chunks,), False, dtype=torch.bool, device=device)
    return Packing(
        token_at=padding.scatter(0, slot_of, token),
        slot_of=slot_of,
        first=first,
        last=last,
        document=_count_up(first[1:], chunks),
        is_first=nothing.scatter(0, first, True),
        is_last=nothing.scatter(0, last, True),
    )


def _count_up(places: Tensor, length: int) -> Tensor:
    """[length]: how many of `places` are at or before each position."""
    zeros = torch.full((length,), 0, dtype=torch.int64, device=places.device)
    ones = torch.full((places.shape[0],), 1, dtype=torch.int64, device=places.device)
    return torch.cumsum(zeros.scatter_add(0, places, ones), 0)


def to_chunks(x: Tensor, packing: Packing | None, padding: float = 0.0) -> Tensor:
    """[B, T, H, N] -> a view or copy [C, B, H, CHUNK, N] of it, with `padding` in slots that have no token."""
    T = x.shape[1]
    if packing is not None:
        padded = torch.constant_pad_nd(x, (0, 0, 0, 0, 0, 1), padding)
        x = padded.index_select(1, packing.token_at)
    # A compiled graph pads always: it shall serve every length.
    elif torch.compiler.is_compiling() or T % CHUNK:
        x = torch.constant_pad_nd(x, (0, 0, 0, 0, 0, -T % CHUNK), padding)
    return _as_chunks(x)


def _as_chunks(rows: Tensor) -> Tensor:
    """[B, C * CHUNK, H, N] as a view [C, B, H, CHUNK, N]."""
    B, slots, H, N = rows.shape
    return rows.view(B, slots // CHUNK, CHUNK, H, N).permute(1, 0, 3, 2, 4)


def from_chunks(function: Callable[..., Tensor], x: Tensor, y: Tensor, like: Tensor, packing: Packing | None) -> Tensor:
    """function(x, y) of [C, B, H, CHUNK, N] -> dense [B, T, H, N], shape and dtype of `like`. One pass over memory."""
    B, T, H, N = like.shape
    rows = torch.empty((B, x.shape[0] * CHUNK, H, N), dtype=like.dtype, device=like.device)
    write(_as_chunks(rows), function, x, y)
    if packing is not None:
        return rows.index_select(1, packing.slot_of)
    return rows if rows.shape[1] == T else rows[:, :T].contiguous()


def write(out: Tensor, function: Callable[..., Tensor], x: Tensor, y: Tensor) -> None:
    """out <- function(x, y), elementwise, where `out` may be any view."""
    if torch.compiler.is_compiling():  # it takes no views, and makes one pass of this
        out.copy_(function(x, y))
    else:
        function(x, y, out=out)

"""What is wrong with the flags that divide a sample: in pieces one after another, in parts for several processes."""

from __future__ import annotations

from collections.abc import Iterator

from src.config.flags import Flags
from src.errors import UserError


def piece_faults(flags: Flags) -> Iterator[UserError]:
    """Values of these flags that are valid by themselves but not together."""
    chunk, length = flags.chunk_ctx, flags.ctx_len
    if chunk > 0 and length > 0 and length % chunk:
        yield UserError(
            "a sample can't be cut into equal pieces",
            flag="chunk_ctx",
            given=chunk,
            expected=f"a divisor of --ctx_len {length}",
            advice=f"for example {_divisor_near(length, chunk)}",
        )
    if flags.bptt == 0:
        yield UserError(
            flag="bptt", given=0, expected="-1 (all pieces), or how many at the end are connected: 1, 2, ..."
        )
    elif flags.bptt != -1 and not chunk:
        yield UserError("needs --chunk_ctx", flag="bptt", given=flags.bptt, advice="leave it out")
    parts = flags.context_parallel
    if parts > 1 and flags.encoder:
        yield UserError(
            "samples with pictures or sounds aren't divided among processes",
            flag="context_parallel",
            given=parts,
            advice="leave it out",
        )
    # what one process computes at a time is cut further: the piece, or the sample
    name, size = ("chunk_ctx", chunk) if chunk else ("ctx_len", length)
    if parts > 1 and size > 0 and size % parts:
        yield UserError(
            "every process gets the same number of tokens",
            flag="context_parallel",
            given=parts,
            expected=f"a divisor of --{name} {size}",
        )
    if parts > 1 and flags.compile == "1":
        yield UserError(
            "with --context_parallel, processes exchange states inside of each block, which a compiled graph can't",
            flag="compile",
            given=1,
            advice="leave it out",
        )


def _divisor_near(length: int, wanted: int) -> int:
    """The largest divisor of `length` that isn't above `wanted`."""
    return next(size for size in range(min(wanted, length), 0, -1) if length % size == 0)

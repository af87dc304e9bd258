"""What --chunk_ctx changes in the memory of a step: one piece is computed at a time, and some things stay beside it.

With B samples of a micro batch in n pieces, b bytes of the run's dtype, P trained parameters:

    activations, logits    of the tokens of one piece
    borders                (n - 1) B L (2 C b + 4 C N): token-shift rows and fp32 states, from forward to backward
    sums                   4 P: the gradients of the pieces so far in fp32, while those of the next are computed
    tokens                 16 bytes a token of the micro batch: inputs and targets
"""

from __future__ import annotations

from dataclasses import dataclass

from src.config import ModelConfig, RunConfig

TOKEN_BYTES = 16


@dataclass(frozen=True)
class Cut:
    """A micro batch of `samples` samples, each in `pieces` pieces of `length` tokens."""

    samples: int
    length: int
    pieces: int = 1

    @property
    def tokens(self) -> int:
        """Of the micro batch that are computed at a time."""
        return self.samples * self.length


def cut_of(config: RunConfig) -> Cut:
    """How the run's micro batches are cut."""
    pieces = config.ctx_len // config.chunk_ctx if config.chunk_ctx else 1
    return Cut(config.micro_bsz, config.ctx_len // pieces, pieces)


def border_bytes(c: ModelConfig, dtype_bytes: int) -> int:
    """Bytes of the state of one sample at the border of two pieces."""
    return c.n_layer * (2 * c.n_embd * dtype_bytes + 4 * c.n_embd * c.head_size)


def kept_beside(c: ModelConfig, cut: Cut, dtype_bytes: int, trained: int) -> float:
    """Bytes that a step in pieces keeps beside the piece that is computed; 0 for samples in one piece."""
    if cut.pieces == 1:
        return 0.0
    borders = (cut.pieces - 1) * cut.samples * border_bytes(c, dtype_bytes)
    return borders + 4.0 * trained + TOKEN_BYTES * cut.tokens * cut.pieces

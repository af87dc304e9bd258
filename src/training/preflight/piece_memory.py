"""What --chunk_ctx and --context_parallel change in the memory of a step: what is computed at a time, and kept beside.

With B samples of a micro batch in n pieces, b bytes of the run's dtype, P trained parameters:

    activations, logits    of the tokens of one piece
    borders                (n - 1) B L (2 C b + 4 C N): token-shift rows and fp32 states, from forward to backward
    sums                   4 P: the gradients of the pieces so far in fp32, while those of the next are computed
    tokens                 16 bytes a token of the micro batch: inputs and targets
    exchange               where K processes share a sample, (K + 1) B L 4 C N: of each part the transition of its
                           state, and the state that this process begins from
"""

from __future__ import annotations

from dataclasses import dataclass

from src.config import ModelConfig, RunConfig
from src.training.distributed.context_parallel import bytes_received

TOKEN_BYTES = 16


@dataclass(frozen=True)
class Cut:
    """A micro batch of `samples` samples, each in `pieces` pieces; of these, `shared_by` processes have `length` tokens
    each."""

    samples: int
    length: int
    pieces: int = 1
    shared_by: int = 1

    @property
    def tokens(self) -> int:
        """Of the micro batch that are computed at a time."""
        return self.samples * self.length


def cut_of(config: RunConfig) -> Cut:
    """How the run's micro batches are cut."""
    pieces = config.ctx_len // config.chunk_ctx if config.chunk_ctx else 1
    return Cut(config.micro_bsz, config.ctx_len // pieces // config.context_parallel, pieces, config.context_parallel)


def border_bytes(c: ModelConfig, dtype_bytes: int) -> int:
    """Bytes of the state of one sample at the border of two pieces."""
    return c.n_layer * (2 * c.n_embd * dtype_bytes + 4 * c.n_embd * c.head_size)


def kept_beside(c: ModelConfig, cut: Cut, dtype_bytes: int, trained: int) -> float:
    """Bytes that a step keeps beside what is computed at a time; 0 for samples in one piece on one process."""
    exchange = (
        (cut.shared_by + 1) * cut.samples * c.n_layer * 4.0 * c.n_embd * c.head_size if cut.shared_by > 1 else 0.0
    )
    if cut.pieces == 1:
        return exchange
    borders = (cut.pieces - 1) * cut.samples * border_bytes(c, dtype_bytes)
    return borders + exchange + 4.0 * trained + TOKEN_BYTES * cut.tokens * cut.pieces * cut.shared_by


def received_bytes(c: ModelConfig, config: RunConfig, dtype_bytes: int) -> int:
    """Bytes that a process receives in an optimizer step from those that it shares samples with."""
    cut = cut_of(config)
    packed = config.data_type == "sft" or config.document_states
    sequences = 1 if packed else cut.samples
    # Pieces but the last are computed once more for the states at their borders; of partitioned parameters that one is,
    # too, for the loss. What --grad_cp computes again exchanges again.
    again = cut.pieces - (not config.strategy.startswith("deepspeed_stage_3")) if cut.pieces > 1 else 0
    forward, backward = cut.pieces * (1 + config.grad_cp) + again, cut.pieces
    return config.accumulate_grad_batches * bytes_received(c, cut.shared_by, sequences, dtype_bytes, forward, backward)


def describe_pieces(config: RunConfig, c: ModelConfig, dtype_bytes: int) -> list[str]:
    """What --chunk_ctx and --context_parallel mean for a run, in a line each."""
    cut, lines = cut_of(config), []
    if cut.pieces > 1:
        state = cut.samples * border_bytes(c, dtype_bytes) / (1 << 20)
        lines.append(
            f"      pieces  {cut.pieces:,} of {config.chunk_ctx:,} tokens, for one more forward pass; a state of "
            f"{state:.1f} MiB is kept at each border, {(cut.pieces - 1) * state / 1024:.2f} GiB in all"
        )
    if cut.shared_by > 1:
        received = received_bytes(c, config, dtype_bytes) / (1 << 20)
        lines.append(
            f"     context  {cut.shared_by} processes share a sample, {cut.length * cut.pieces:,} tokens of it each; a "
            f"process receives {received:,.1f} MiB in a step from the others"
        )
    return lines

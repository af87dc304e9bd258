"""`ModelConfig`: the sizes of a model, given or derived, and how it is computed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from src.errors import UserError, UserErrors

KERNELS = ("auto", "recurrent", "chunked", "portable", "reference")
PLAIN_KERNELS = ("portable", "reference")  # everything in plain PyTorch: no native op is called but the loss's
BLOCK_KINDS = ("rwkv", "attention")
REQUIRED_SIZES = ("n_layer", "n_embd", "vocab_size", "head_size")
DERIVED_SIZES = ("dim_ffn", "d_decay_lora", "d_aaa_lora", "d_mv_lora", "d_gate_lora")
# The recurrence kernels compute a head's state in tiles of 16 rows and columns.
HEAD_SIZE_MULTIPLE = 16
# In the place of a token where a row of embeddings is given instead. No vocabulary has it, so any tokenizer's will do.
PLACEHOLDER = -1


def low_rank_size(factor: float, n_embd: int, head_size: int = 64) -> int:
    """Default inner size D of a low-rank product: max(32, 32 * round(f * sqrt(C) / 32)).

    f is 2.5 for decay and in-context learning rate, 1.7 for the value residual, 5 for the gate. Pass `head_size` for
    the first three, which are multiplied by N / 64 when N > 64.
    """
    scale = max(1.0, head_size / 64)
    # Python's round (half to even) is part of the formula: released models of C = 1024 have D = 64, half up gives 96.
    return max(32, 32 * round(factor * scale * math.sqrt(n_embd) / 32))


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of an RWKV-7 model.

    A derived size (`dim_ffn`, `d_*_lora`) given as 0 is computed on construction, so the fields of an instance are the
    actual sizes. Raises `UserErrors`, one `UserError` per flag, if no model can have these sizes.
    """

    n_layer: int
    n_embd: int
    vocab_size: int
    head_size: int = 64
    dim_ffn: int = 0
    d_decay_lora: int = 0
    d_aaa_lora: int = 0
    d_mv_lora: int = 0
    d_gate_lora: int = 0
    # These two are no sizes, but the layers choose by them.
    kernel: str = "auto"
    grad_cp: bool = False
    # The kind of each block; (): all are "rwkv". The commands train and serve models of those alone.
    blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise UserErrors(faults)
        sizes = {
            "dim_ffn": 4 * self.n_embd,
            "d_decay_lora": low_rank_size(2.5, self.n_embd, self.head_size),
            "d_aaa_lora": low_rank_size(2.5, self.n_embd, self.head_size),
            "d_mv_lora": low_rank_size(1.7, self.n_embd, self.head_size),
            "d_gate_lora": low_rank_size(5, self.n_embd),
        }
        for name, size in sizes.items():
            if getattr(self, name) == 0:
                # The class is frozen for its users; this is the one place that may complete it.
                object.__setattr__(self, name, size)

    def _faults(self) -> Iterator[UserError]:
        for name in REQUIRED_SIZES:
            if (size := getattr(self, name)) < 1:
                yield UserError(flag=name, given=size, expected="at least 1")
        for name in DERIVED_SIZES:
            if (size := getattr(self, name)) < 0:
                yield UserError(flag=name, given=size, expected="0 (computed from n_embd) or a positive size")
        if self.head_size >= 1 and self.head_size % HEAD_SIZE_MULTIPLE:
            yield UserError(
                flag="head_size",
                given=self.head_size,
                expected=f"a multiple of {HEAD_SIZE_MULTIPLE} (released models have 64)",
            )
        # Only if both sizes are valid: the remainder of an invalid one would be a second message about one mistake.
        elif self.n_embd >= 1 and self.head_size >= 1 and self.n_embd % self.head_size:
            # Both neighbours: the user may prefer a smaller or a larger model.
            below = self.n_embd // self.head_size * self.head_size
            nearest = f"{below} or {below + self.head_size}" if below else f"{self.head_size}"
            yield UserError(
                flag="n_embd",
                given=self.n_embd,
                expected=f"a multiple of --head_size {self.head_size}, for example {nearest}",
            )
        if self.kernel not in KERNELS:
            yield UserError(flag="kernel", given=self.kernel, expected=f"one of {', '.join(KERNELS)}")
        yield from self._block_faults()

    def _block_faults(self) -> Iterator[UserError]:
        if not self.blocks:
            return
        given = f"ModelConfig(blocks={self.blocks})"  # it has no flag
        if len(self.blocks) != self.n_layer:
            yield UserError(given=given, expected=f"a kind for each of n_layer = {self.n_layer} blocks")
        if not set(self.blocks) <= set(BLOCK_KINDS):
            yield UserError(given=given, expected=f"the kinds {' and '.join(BLOCK_KINDS)}")
        # Its values are those that later blocks interpolate with.
        elif self.blocks[0] != "rwkv":
            yield UserError(given=given, expected="rwkv as the first kind")

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_size

    def block_kind(self, layer: int) -> str:
        return self.blocks[layer] if self.blocks else "rwkv"

    @property
    def title(self) -> str:
        return f"L{self.n_layer}-D{self.n_embd}"

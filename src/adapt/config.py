"""`AdapterConfig`: which adapter a model gets, and where."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("lora", "pissa", "miss", "dora", "state")
# the matrices of a block, by the last part of their module's name; "key" and "value" are in both halves
TARGETS = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
# trained in full beside the adapter: LayerNorms (ln0, ln1, ln2, ln_x, ln_out); x_*, w0, a0, v0, k_k, k_a, r_k
WHOLE_PARTS = ("ln", "vectors")


@dataclass(frozen=True)
class AdapterConfig:
    """The kind of an adapter and its sizes.

    kind            "lora": y = x W^T + s dropout(x) A^T B^T with s = lora_alpha / r (lora_alpha / sqrt(r) with
                    use_rslora); "dora": the same, rows scaled to a trained magnitude; "pissa": LoRA whose A and B begin
                    as the largest r singular vectors of W, which loses them; "miss": y = x W^T + x_s D, x_s [r] the sum
                    of x's pieces of r columns; "state": one initial state per block
    target_modules  entries of TARGETS; a name without a dot ("key") means it in both halves
    train           entries of WHOLE_PARTS
    """

    kind: str
    r: int = 32
    lora_alpha: float = 64.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] = TARGETS
    train: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """The entries of TARGETS that `target_modules` names, in their order."""
        named = set(self.target_modules)
        return tuple(target for target in TARGETS if target in named or target.partition(".")[2] in named)

    @property
    def scale(self) -> float:
        """s of the formula above."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

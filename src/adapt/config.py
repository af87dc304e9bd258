"""`AdapterConfig`: which adapter a model gets, and where."""

from __future__ import annotations

from dataclasses import dataclass

from src.config import TARGETS, WHOLE_PARTS, RunConfig, adapter_kind, split_list

__all__ = ["KINDS", "TARGETS", "WHOLE_PARTS", "AdapterConfig", "adapter_of"]

KINDS = ("lora", "pissa", "miss", "dora", "state")


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


def adapter_of(config: RunConfig) -> AdapterConfig | None:
    """The adapter that a run trains; None where it trains all weights."""
    kind = adapter_kind(config)
    if not kind:
        return None
    return AdapterConfig(
        kind,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=split_list(config.lora_targets),
        train=split_list(config.lora_train),
    )

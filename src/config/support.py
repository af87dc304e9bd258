"""Which kind of training goes with which base, strategy and option: one table, for the flags, the run and the docs.

What no row refuses is supported, and tested.
"""

from __future__ import annotations

from dataclasses import dataclass

from src.errors import UserError

PEFT_KINDS = ("none", "lora", "pissa", "miss", "dora")
TRAIN_TYPES = ("none", "state")
QUANTISATIONS = ("none", "int8", "nf4")
# the matrices of a block, by the last part of their module's name; "key" and "value" are in both halves
TARGETS = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
# trained in full beside the adapter: LayerNorms (ln0, ln1, ln2, ln_x, ln_out); x_*, w0, a0, v0, k_k, k_a, r_k
WHOLE_PARTS = ("ln", "vectors")
# the table's
# with an encoder: "projector", beside weights that stay as they are, and "full, encoder"; an adapter's kind is its own
KINDS = ("full", *PEFT_KINDS[1:], "state", "projector", "full, encoder")
BASES = ("fp32", "bf16", "fp16", *QUANTISATIONS[1:])
STRATEGIES = ("one process", "DDP", "ZeRO 1", "ZeRO 2", "ZeRO 3")
ADAPTERS = KINDS[1:-1]
QUANTISED = QUANTISATIONS[1:]


@dataclass(frozen=True)
class Refusal:
    """Combinations that are not offered, with the reason and what to do; an empty field stands for any value."""

    kinds: tuple[str, ...]
    bases: tuple[str, ...]
    strategies: tuple[str, ...]
    reason: str
    flag: str  # that a user would change
    advice: str

    def matches(self, kind: str, base: str, strategy: str) -> bool:
        rows = ((self.kinds, kind), (self.bases, base), (self.strategies, strategy))
        return all(not values or value in values for values, value in rows)

    def error(self, given: object) -> UserError:
        """`given` is the value of `flag`."""
        return UserError(self.reason, flag=self.flag, given=given, advice=self.advice)


REFUSALS = (
    Refusal(
        ("full", "full, encoder"),
        QUANTISED,
        (),
        "all weights are trained, and quantised ones can't be",
        "quant",
        "leave it out, or train an adapter (--peft, --train_type state) beside the frozen weights",
    ),
    Refusal(
        ADAPTERS,
        (),
        ("ZeRO 3",),
        "a frozen base is whole on every process",
        "strategy",
        "use deepspeed_stage_2 or ddp; --quant nf4 makes the base a quarter of its size",
    ),
    Refusal(
        ADAPTERS[:-1],
        ("fp16",),
        ("ZeRO 1", "ZeRO 2"),
        "an engine that scales the loss of fp16 keeps what it trains in fp16, and an adapter is fp32",
        "precision",
        "use bf16 or fp32, or --strategy ddp",
    ),
    Refusal(
        ("full, encoder",),
        (),
        ("ZeRO 3",),
        "encoder and projector are whole on every process",
        "strategy",
        "use deepspeed_stage_2 or ddp",
    ),
)


def refusal(kind: str, base: str, strategy: str) -> Refusal | None:
    """The row that refuses a combination; None where it is supported. Options go with all of them."""
    return next((row for row in REFUSALS if row.matches(kind, base, strategy)), None)

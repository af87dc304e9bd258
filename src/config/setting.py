"""How a flag is declared: `flag()` makes a dataclass field with metadata for the command line, checks and docs."""

from __future__ import annotations

import dataclasses
from typing import Any

# Whether a setting may change when a run is resumed.
#   fixed   it would be another run: another model, other data or another order of the data; refused
#   free    it says where and how to compute, or what to log; changing it needs no mention
#   noted   it changes how training goes on; allowed, and the change is logged
WITHIN_RUN = ("fixed", "free", "noted")
GROUPS = {  # the topics of `train.py --help`, in this order
    "run": "run: folder, initial weights, saving",
    "data": "data",
    "model": "model",
    "adapt": "fine-tuning a part: adapters, tuned states",
    "media": "pictures and sounds",
    "length": "length, batch size and learning rate",
    "optimizer": "optimizer",
    "speed": "memory and speed",
    "hardware": "hardware",
    "logging": "logging",
}
# Its default, -1, means "not given"; no user has to know.
HIDDEN_DEFAULTS = ("plan",)


def flag(
    default: Any,
    group: str,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    below: float | None = None,
    const: Any = None,
    within_run: str = "noted",
) -> Any:
    """A field of `Flags`.

    default      the value if the flag is not given; its type is the flag's: int, float, str, or bool (0 or 1 on the
                 command line)
    group        topic, a key of GROUPS
    help         meaning, for --help and docs/flags.md
    choices      the values it accepts; empty: any
    at_least, below
                 bounds of a number, the first inclusive, the second exclusive
    const        the value if the flag is given without one; None: it needs one (argparse's term)
    within_run   "fixed", "free" or "noted": see WITHIN_RUN
    """
    # "noted" is the default: a new flag that forgets to choose logs one line, it hides and refuses nothing.
    assert within_run in WITHIN_RUN, within_run
    metadata = {
        "group": group,
        "help": help,
        "choices": choices,
        "at_least": at_least,
        "below": below,
        "const": const,
        "within_run": within_run,
    }
    return dataclasses.field(default=default, metadata=metadata)


def default_text(field: dataclasses.Field[Any]) -> str:
    """A flag's default as it is written on the command line; "" if it is empty or has no meaning of its own."""
    if field.name in HIDDEN_DEFAULTS:
        return ""
    return str(int(field.default)) if isinstance(field.default, bool) else str(field.default)

"""What is wrong with the flags of fine-tuning a part: an adapter, tuned states, a quantised base."""

from __future__ import annotations

from collections.abc import Iterator

from src.config.flags import Flags
from src.config.support import TARGETS, WHOLE_PARTS
from src.errors import UserError

SETTINGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "lora_train", "use_rslora")


def adapter_kind(flags: Flags) -> str:
    """The kind of adapter that these flags train, as in src/adapt/config.py; "" where all weights are trained."""
    if flags.train_type == "state":
        return "state"
    return "" if flags.peft == "none" else flags.peft


def adapter_faults(flags: Flags) -> Iterator[UserError]:
    """Values of these flags that are valid by themselves but not together, and lists with unknown entries."""
    kind = adapter_kind(flags)
    if flags.train_type == "state" and flags.peft != "none":
        yield UserError(
            "--train_type state trains the initial states alone",
            flag="peft",
            given=flags.peft,
            advice="leave one of them out; chat and evaluate use an adapter and a state together",
        )
    yield from _list_faults("lora_targets", flags.lora_targets, TARGETS, halves=True)
    yield from _list_faults("lora_train", flags.lora_train, WHOLE_PARTS)
    if flags.peft == "none":
        for name in SETTINGS:
            default = type(flags).__dataclass_fields__[name].default
            if getattr(flags, name) != default:
                yield UserError("needs --peft", flag=name, given=getattr(flags, name), advice="leave it out")
    # whatever the strategy; what depends on it is refused once that is known
    if kind and flags.train_stage == 1:
        yield UserError(
            "--train_stage 1 initialises whole weights", flag="train_stage", given=1, advice="use --train_stage 0"
        )
    # Stages 2 and 3 begin with rwkv-init.pth; --plan needs no weights.
    if kind and flags.train_stage == 0 and not flags.load_model and flags.plan < 0:
        yield UserError("missing", flag="load_model", expected="the weights that the adapter changes")


def _list_faults(flag: str, text: str, known: tuple[str, ...], halves: bool = False) -> Iterator[UserError]:
    names = {*known, *(name.partition(".")[2] for name in known if halves)}
    unknown = [name for name in split_list(text) if name not in names]
    if unknown or (halves and not split_list(text)):
        expected = f"a list of {', '.join(known)}" + (", or of the part after the point for both halves" * halves)
        yield UserError(f"{unknown[0]} matches nothing" if unknown else "", flag=flag, given=text, expected=expected)


def split_list(text: str) -> tuple[str, ...]:
    """The entries of a list with commas."""
    return tuple(entry.strip() for entry in text.split(",") if entry.strip())

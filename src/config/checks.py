"""What is wrong with settings: each value by itself, and several together."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from src.config.adapter import adapter_faults, adapter_kind
from src.config.flags import Flags
from src.config.media import media_faults
from src.config.pieces import piece_faults
from src.errors import UserError

# Flags that describe how conversations are read; --tokenizer and --val_data_file are for token files, too.
SFT_ONLY = ("sft_loss", "packing", "truncate", "special_tokens", "think")
NODES = re.compile(r"[1-9][0-9]{0,5}(:[1-9][0-9]{0,5})?")
ENDPOINT = re.compile(
    r"([^\s:\[\]]+|\[[0-9A-Fa-f:.]+\]):0*([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
)
NUMBER_PAIR = re.compile(r"\d+(\.\d+)?,\d+(\.\d+)?")
# --val_every: a number of mini-epochs, or of steps.
VAL_EVERY = re.compile(r"(\d+) *(steps?)?")


def value_faults(flags: Flags) -> Iterator[UserError]:
    """Values outside of their choices or bounds, one fault per flag at most."""
    for field in dataclasses.fields(flags):
        expected = _expected(field, getattr(flags, field.name))
        if expected:
            yield UserError(flag=field.name, given=getattr(flags, field.name), expected=expected)


def _expected(field: dataclasses.Field[Any], value: Any) -> str:
    """What a flag accepts, if `value` isn't that; "" if it is."""
    choices, at_least, below = (field.metadata[name] for name in ("choices", "at_least", "below"))
    # before the bounds: NaN compares false with each of them
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if choices and value not in choices:
        return f"one of {', '.join(filter(None, choices))}"
    if at_least is not None and value < at_least:
        return f"at least {at_least}"
    if below is not None and value >= below:
        # For an integer "at most 3" instead of "less than 4": it is a value that can be given.
        return f"less than {below}" if isinstance(field.default, float) else f"at most {below - 1}"
    return ""


def form_faults(flags: Flags) -> Iterator[UserError]:
    """Text values that are not in the form they must have."""
    if not flags.proj_dir:
        yield UserError(flag="proj_dir", given="", expected="a folder for the run")
    # isdigit, because int() would accept " 2", "+2" and "1_0" as well
    if flags.devices != "auto" and not (flags.devices.isdigit() and int(flags.devices) >= 1):
        yield UserError(flag="devices", given=flags.devices, expected='a number of processes or "auto"')
    if not NODES.fullmatch(flags.num_nodes) or not _in_order(flags.num_nodes):
        yield UserError(flag="num_nodes", given=flags.num_nodes, expected='a number of nodes, or "2:4": from 2 to 4')
    if flags.rdzv_endpoint and not ENDPOINT.fullmatch(flags.rdzv_endpoint):
        yield UserError(
            flag="rdzv_endpoint", given=flags.rdzv_endpoint, expected="HOST:PORT or [IPv6]:PORT, a port of 1 to 65535"
        )
    if not VAL_EVERY.fullmatch(flags.val_every):
        yield UserError(
            flag="val_every",
            given=flags.val_every,
            expected='a number of mini-epochs, such as "2", or of steps, such as "500steps"',
        )
    for name in ("plan_bandwidth", "plan_gpu", "plan_disks"):
        text = getattr(flags, name)
        if not NUMBER_PAIR.fullmatch(text) or min(number_pair(text)) <= 0:
            default = next(field.default for field in dataclasses.fields(flags) if field.name == name)
            yield UserError(flag=name, given=text, expected=f"two numbers above 0, such as {default}")


def number_pair(text: str) -> tuple[float, float]:
    """The values of a flag such as --plan_bandwidth 450,50."""
    first, second = map(float, text.split(","))
    return first, second


def _in_order(num_nodes: str) -> bool:
    numbers = [int(number) for number in num_nodes.split(":")]
    return numbers == sorted(numbers)


def combination_faults(flags: Flags) -> Iterator[UserError]:
    """Values that are valid by themselves but not together."""
    yield from _mode_faults(flags)
    yield from _data_faults(flags)
    yield from _sft_faults(flags)
    yield from _start_faults(flags)
    yield from adapter_faults(flags)
    yield from media_faults(flags)
    yield from _length_faults(flags)
    yield from piece_faults(flags)


def _mode_faults(flags: Flags) -> Iterator[UserError]:
    """--plan, --check and --dry_run: each does its own work and stops."""
    # Two of them would mean that one is silently not done.
    given = (("plan", flags.plan >= 0), ("check", flags.check), ("dry_run", flags.dry_run))
    modes = [name for name, is_given in given if is_given]
    for mode in modes[1:]:
        yield UserError(f"cannot be combined with --{modes[0]}", flag=mode, advice="leave one of them out")
    if flags.dry_run and flags.train_stage == 1:
        yield UserError(
            "--train_stage 1 takes no training steps",
            flag="dry_run",
            advice="use --train_stage 0, or 3 to resume the run in --proj_dir",
        )
    if flags.dry_run and flags.profile:
        yield UserError(
            "writes a file, but --dry_run saves nothing",
            flag="profile",
            given=flags.profile,
            advice="leave one of them out",
        )


def _data_faults(flags: Flags) -> Iterator[UserError]:
    # Stage 1 only initialises weights, and --plan only computes: neither reads data.
    if not flags.data_file and flags.train_stage != 1 and flags.plan < 0:
        if flags.data_type == "sft":
            yield UserError("missing", flag="data_file", expected="a jsonl file of conversations")
        else:
            yield UserError(
                "missing",
                flag="data_file",
                expected="binidx data, made from a jsonl file by data/make_data.py",
                advice="sh demo-training-run.sh trains on demo data",
            )
    if flags.data_type == "sft" and not flags.tokenizer:
        yield UserError(
            "missing",
            flag="tokenizer",
            expected='the model\'s tokenizer, for --data_type sft: a folder with a chat template, or "world"',
        )


def _sft_faults(flags: Flags) -> Iterator[UserError]:
    """Flags for the other kind of data, which would be ignored."""
    if flags.data_type == "sft":
        if flags.document_states:
            yield UserError(
                "a conversation has its own state in any case",
                flag="document_states",
                given=1,
                advice="leave it out",
            )
        return
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        # Scripts may pass a default along.
        if field.name in SFT_ONLY and value != field.default:
            yield UserError(
                f"has no effect with --data_type {flags.data_type}",
                flag=field.name,
                given=int(value) if isinstance(value, bool) else value,
                advice="leave it out, or use --data_type sft",
            )


def _start_faults(flags: Flags) -> Iterator[UserError]:
    if flags.train_stage == 1 and flags.load_model:
        yield UserError(
            "--train_stage 1 initialises new weights",
            flag="load_model",
            given=flags.load_model,
            advice="leave it out, or use --train_stage 0",
        )
    if flags.epoch_begin and not flags.load_model:
        yield UserError("needs --load_model", flag="epoch_begin", given=flags.epoch_begin, advice="leave it out")
    # Stages 2 and 3 load rwkv-init.pth, to which both may apply, too.
    for name in ("load_partial", "resize_vocab"):
        if getattr(flags, name) and not flags.load_model and flags.train_stage < 2:
            yield UserError("needs --load_model", flag=name, given=1, advice="leave it out")


def _length_faults(flags: Flags) -> Iterator[UserError]:
    if flags.lr_final > flags.lr_init:
        yield UserError(
            "the cosine decays from lr_init to lr_final",
            flag="lr_final",
            given=flags.lr_final,
            expected=f"at most --lr_init {flags.lr_init}",
        )
    # Stage 1 takes no steps.
    if flags.lr_init == 0 and flags.train_stage != 1:
        yield UserError(
            "nothing would be learned", flag="lr_init", given=flags.lr_init, expected="more than 0, for example 6e-4"
        )
    if flags.epochs == 0 and not flags.my_exit_tokens:
        yield UserError(
            "nothing would be trained", flag="epochs", given=flags.epochs, expected="more than 0, or --my_exit_tokens"
        )
    if flags.train_minutes and adapter_kind(flags):
        yield UserError(
            "the speed is measured with all weights trained",
            flag="train_minutes",
            given=flags.train_minutes,
            advice="give --my_exit_tokens or --epochs for an adapter",
        )
    if flags.train_minutes and flags.plan >= 0:
        yield UserError(
            "the speed of another machine can't be measured",
            flag="train_minutes",
            given=flags.train_minutes,
            advice="give --my_exit_tokens or --epochs with --plan",
        )
    # 1 is the default: scripts that set --my_exit_tokens may pass it along without meaning a length.
    if flags.my_exit_tokens and flags.epochs not in (0, 1) and not flags.train_minutes:
        yield UserError(
            f"--my_exit_tokens {flags.my_exit_tokens} sets the length of the run too",
            flag="epochs",
            given=flags.epochs,
            advice="leave one of them out",
        )

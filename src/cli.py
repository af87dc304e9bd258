"""The command line of train.py: the flags of existing RWKV training scripts become a RunConfig.

Flags and their texts are made from the fields of `RunConfig`. What is written here is how a command line differs from
it: notations of existing scripts, flags that are accepted without effect, and the answers to flags that are refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from src.config import GROUPS, RunConfig, default_text, rwkv_peft
from src.errors import UserError
from src.version import __version__

# Trainer flags of Lightning 1.9 that old scripts carry. They change nothing here, so they are accepted with a note ...
HARMLESS_TRAINER_FLAGS = (
    *("amp_backend", "amp_level", "auto_lr_find", "auto_scale_batch_size", "auto_select_gpus", "benchmark"),
    *("check_val_every_n_epoch", "default_root_dir", "deterministic", "detect_anomaly", "enable_checkpointing"),
    *("enable_model_summary", "inference_mode", "ipus", "limit_predict_batches", "limit_test_batches"),
    *("limit_val_batches", "log_every_n_steps", "max_epochs", "min_epochs", "min_steps"),
    *("move_metrics_to_cpu", "multiple_trainloader_mode", "num_sanity_val_steps", "plugins"),
    *("profiler", "reload_dataloaders_every_n_epochs", "replace_sampler_ddp"),
    *("sync_batchnorm", "tpu_cores", "track_grad_norm", "use_distributed_sampler", "val_check_interval"),
)
# ... and those that would change the run if they were honoured, with what replaces them. Ignoring one of these would
# train something else than the script asks for.
REPLACED_FLAGS = {
    "gradient_clip_val": "use --grad_clip",
    "gradient_clip_algorithm": "use --grad_clip (always the global norm)",
    "max_steps": "use --my_exit_tokens",
    "limit_train_batches": "use --my_exit_tokens",
    "overfit_batches": "use --my_exit_tokens and a small --data_file",
    "fast_dev_run": "use --dry_run",
    "gpus": "use --devices",
    "num_processes": "use --devices",
    "max_time": "use --time_limit",
    "resume_from_checkpoint": "use --load_model (weights), or the same --proj_dir, which resumes by itself",
    # of the trainers for RWKV-4 to RWKV-6
    "my_pile_stage": "use --train_stage",
    "my_pile_version": "leave it out",
    "my_pile_edecay": "the learning rate falls along a cosine to --lr_final; leave it out",
    "my_qa_mask": "use --data_type sft, where only answers count",
    "head_size_a": "use --head_size",
    "head_size_divisor": "leave it out: RWKV-7's is fixed",
    "weight_decay_final": "leave it out: --weight_decay is constant",
    "layerwise_lr": "leave it out: RWKV-7's w0 always has twice the learning rate",
    "pre_ffn": "leave it out: RWKV-7 has none",
    "head_qk": "leave it out: RWKV-7 has none",
    "tiny_att_dim": "leave it out: RWKV-7 has none",
    "tiny_att_layer": "leave it out: RWKV-7 has none",
    "dropout": "leave it out: RWKV-7 is trained without",
    "lora": "use --peft lora",
}


def _check_my_testing(value: str, config: RunConfig) -> str:
    if value != "x070":
        raise UserError(flag="my_testing", given=value, expected="x070 (RWKV-7)", advice="leave it out")
    return ""


def _check_dim_att(value: str, config: RunConfig) -> str:
    if _convert("dim_att", value, int) not in (0, config.n_embd):
        raise UserError(
            "the time mix is as wide as the model",
            flag="dim_att",
            given=value,
            expected=f"--n_embd {config.n_embd}",
            advice="leave it out",
        )
    return ""


def _check_epoch_count(value: str, config: RunConfig) -> str:
    ignored = _convert("epoch_count", value, int) != 0
    return "--epoch_count is ignored: the run ends after --my_exit_tokens, or --epochs" if ignored else ""


# Flags of RWKV-LM that have no effect here: one value is right, or the flag is ignored. They are not settings, so they
# are not in RunConfig. Each checks its value and returns a note, "" if none is needed; raises UserError.
COMPATIBILITY_FLAGS: dict[str, Callable[[str, RunConfig], str]] = {
    "my_testing": _check_my_testing,
    "dim_att": _check_dim_att,
    "epoch_count": _check_epoch_count,
}
# What Python and shell scripts write for a boolean; lower case.
BOOLEANS = {"0": False, "1": True, "false": False, "true": True}
MISSING_VALUE = "its value is missing"
PATH_FLAGS = ("proj_dir", "data_file", "val_data_file", "load_model", "tokenizer")
# More than this many prefix matches (--d has eleven) are a list to search, not an answer.
MAX_SUGGESTIONS = 6

EXAMPLES = """\
examples:
  sh demo-training-run.sh                     the whole way on demo data, without a download; calls this program
  python train.py --proj_dir out/mine --data_file data/mine --tokenizer world --n_layer 12 --n_embd 768 --ctx_len 512
  python train.py --check ...                 will the run that ... describes fit and work?
  python train.py --version                   the versions of this project and of torch
"""


class _Formatter(argparse.HelpFormatter):
    """Wraps flags as usual and keeps the examples' lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text == EXAMPLES else super()._fill_text(text, width, indent)


def build_parser() -> argparse.ArgumentParser:
    """The flags of `RunConfig` by topic, with their meanings and defaults, for --help."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="train.py [--flag value]...",
        description="Train an RWKV-7 model. The flags are those of existing RWKV training scripts.",
        epilog=EXAMPLES,
        formatter_class=lambda prog: _Formatter(prog, max_help_position=34, width=120),
    )
    topics = {key: parser.add_argument_group(title) for key, title in GROUPS.items()}
    for setting in dataclasses.fields(RunConfig):
        kind, choices = type(setting.default), [choice for choice in setting.metadata["choices"] if choice]
        default = default_text(setting)
        text = setting.metadata["help"] + f" ({' | '.join(choices)})" * bool(choices) + f" [{default}]" * bool(default)
        topics[setting.metadata["group"]].add_argument(
            f"--{setting.name}",
            metavar="0|1" if kind is bool else kind.__name__.upper(),
            nargs=None if setting.metadata["const"] is None else "?",
            help=text.replace("%", "%%"),
        )
    return parser


def version_text() -> str:
    """This project's version and torch's, which is read from its metadata: importing it takes seconds."""
    try:
        torch = f"torch {version('torch')}"
    except PackageNotFoundError:
        torch = "torch is not installed"
    return f"train.py {__version__} ({torch})\n"


def parse(argv: list[str]) -> tuple[RunConfig, list[str]]:
    """`argv` as settings, and notes about flags that were accepted but have no effect.

    Prints and exits for --help and --version. Exits with code 2 and shows all faults at once if there are any.
    """
    parser = build_parser()
    # before anything is checked: who asks for help may not know yet what is required
    if "--help" in argv or "-h" in argv:
        parser.print_help()
        parser.exit()
    if "--version" in argv:
        print(version_text(), end="")
        parser.exit()
    config, notes, faults = interpret(argv)
    if faults:
        lines = [*map(str, faults)] if len(faults) == 1 else [f"{len(faults)} errors:", *map(str, faults)]
        parser.exit(2, "train.py: " + "\n  ".join(lines) + "\nThe meaning of every flag: python train.py --help\n")
    return config, notes


def interpret(argv: list[str]) -> tuple[RunConfig, list[str], list[UserError]]:
    """Settings, notes and faults of a command line. The settings are usable only if there are no faults."""
    line = _read(argv)
    values, faults = _typed_values(line.values)
    translated, contradictions = rwkv_peft.translate(line.rwkv_peft, values)
    config, notes = _normalised({**translated, **values})
    config.given = frozenset(values)
    if batches := _batches_of_epoch_count(line, config):
        config.batches = batches
        count = line.compatibility.pop("epoch_count")
        notes.append(f"--epoch_count {count}: as in RWKV-PEFT, so many times --epoch_steps batches of each process")
    faults = [*line.faults, *faults, *contradictions, *config.faults()]
    notes = [*line.notes, *notes]
    for name, text in line.compatibility.items():
        try:
            notes += filter(None, [COMPATIBILITY_FLAGS[name](text, config)])
        except UserError as fault:
            faults.append(fault)
    return config, notes, faults


def _batches_of_epoch_count(line: _Line, config: RunConfig) -> int:
    """The length that --epoch_count and --epoch_steps give a command of RWKV-PEFT, in batches of a process; 0 for other
    commands, and where --my_exit_tokens or --epochs say how long the run is."""
    count = line.compatibility.get("epoch_count", "")
    is_rwkv_peft = bool(line.rwkv_peft) or config.peft != "none" or (line.values.get("train_type") or "none") != "none"
    if not is_rwkv_peft or not count.isdecimal() or config.my_exit_tokens or "epochs" in config.given:
        return 0
    return int(count) * (config.epoch_steps or rwkv_peft.EPOCH_STEPS)


@dataclass
class _Line:
    """What a command line consists of."""

    values: dict[str, str | None] = field(default_factory=dict)  # flag -> its last value, None without one
    compatibility: dict[str, str] = field(default_factory=dict)  # the same for COMPATIBILITY_FLAGS
    rwkv_peft: dict[str, str] = field(default_factory=dict)  # the same for rwkv_peft.FLAGS
    notes: list[str] = field(default_factory=list)
    faults: list[UserError] = field(default_factory=list)


def _read(argv: list[str]) -> _Line:
    """Sorts the arguments: each is a flag, a flag's one value, or a fault.

    Not argparse: it stops at the first fault, accepts abbreviations (a script's --lr would start to mean something else
    when a flag is added), and knows no flag that is accepted with a note.
    """
    line, position = _Line(), 0
    while position < len(argv):
        argument = argv[position]
        position += 1
        if not _is_flag(argument):
            before = " ".join(argv[max(0, position - 3) : position - 1])
            follows = f" (it follows {before})" if before else ""
            line.faults.append(UserError(f"not a flag{follows}; a flag takes one value", given=repr(argument)))
            continue
        name, equals, text = argument.lstrip("-").partition("=")
        value: str | None = text if equals else None
        # A flag takes one value at most: a second one is then an argument without a flag.
        if not equals and position < len(argv) and not _is_flag(argv[position]):
            value = argv[position]
            position += 1
        _add_flag(line, argument, name, value)
    return line


def _add_flag(line: _Line, argument: str, name: str, value: str | None) -> None:
    known = {setting.name for setting in dataclasses.fields(RunConfig)}
    if (name in known or name in COMPATIBILITY_FLAGS or name in rwkv_peft.FLAGS) and not argument.startswith("--"):
        line.faults.append(UserError("written with one dash", flag=name, expected="two"))
    elif name in known:
        line.values[name] = value  # the last one counts: scripts append the user's flags to their own
    elif name in COMPATIBILITY_FLAGS or name in rwkv_peft.FLAGS:
        if value is None:
            line.faults.append(UserError(MISSING_VALUE, flag=name))
        elif name in COMPATIBILITY_FLAGS:
            line.compatibility[name] = value
        else:
            line.rwkv_peft[name] = value
    elif name == "local_rank":
        pass  # launchers of several processes add it
    elif name in HARMLESS_TRAINER_FLAGS:
        line.notes.append(f"--{name} is a flag of Lightning 1.9's Trainer and has no effect here; leave it out")
    elif name in REPLACED_FLAGS:
        line.faults.append(UserError("not a flag of this program", flag=name, advice=REPLACED_FLAGS[name]))
    else:
        line.faults.append(UserError("no such flag", flag=name, advice=_did_you_mean(name)))


def _is_flag(argument: str) -> bool:
    """Whether an argument is a flag: it begins with a dash and is not a negative number."""
    # inf and nan are numbers to float(); a lone dash is a file by convention
    return argument.startswith("-") and not re.fullmatch(r"-(\d|\.\d|inf|nan).*|-", argument)


def _did_you_mean(name: str) -> str:
    """A question naming the flags that begin with a misspelt `name`, else the most similar one; "" if there is none."""
    known = [setting.name for setting in dataclasses.fields(RunConfig)]
    # An abbreviation first: by similarity alone, "lr" is nearest to "logger".
    candidates = [flag for flag in known if name and flag.startswith(name)]
    if not 1 <= len(candidates) <= MAX_SUGGESTIONS:
        candidates = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {', '.join(f'--{flag}' for flag in candidates)}?" if candidates else ""


def _convert(name: str, text: str, kind: type) -> Any:
    """The value of a flag, of type `kind`. Raises UserError if `text` is not one."""
    try:
        return BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        expected = {bool: "0 or 1", int: "an integer", float: "a number"}[kind]
        raise UserError(flag=name, given=repr(text), expected=expected) from None


def _typed_values(texts: dict[str, str | None]) -> tuple[dict[str, Any], list[UserError]]:
    """The values in their flags' types. One that isn't of the type is a fault, and its flag keeps the default."""
    values: dict[str, Any] = {}
    faults: list[UserError] = []
    for setting in dataclasses.fields(RunConfig):
        if setting.name not in texts:
            continue
        text, const = texts[setting.name], setting.metadata["const"]
        if text is None and const is None:
            faults.append(UserError(MISSING_VALUE, flag=setting.name))
            continue
        try:
            values[setting.name] = const if text is None else _convert(setting.name, text, type(setting.default))
        except UserError as fault:
            faults.append(fault)
    return values, faults


def _normalised(values: dict[str, Any]) -> tuple[RunConfig, list[str]]:
    """Settings from values in the notations of existing scripts, and notes."""
    notes = []
    for name in PATH_FLAGS:
        if values.get(name, "").startswith("~"):  # a shell expands it neither in quotes nor after an equals sign
            values[name] = os.path.expanduser(values[name])
    # RWKV-LM's scripts pass 0 for "no file"
    if values.get("load_model") == "0":
        values["load_model"] = ""
    if values.get("kernel") in ("@rwkv3", ""):  # RWKV-LM's names for its only kernel
        values["kernel"] = "auto"
    if values.get("accelerator") == "cuda":
        values["accelerator"] = "gpu"
    for name, aliases in rwkv_peft.ALIASES.items():
        if values.get(name) in aliases:
            values[name] = aliases[values[name]]
    if values.get("val_data_file") == "heldout":
        parts = re.fullmatch(r"(.*?)(\.bin|\.idx|\.jsonl(?:\.gz|\.zst)?)?", values.get("data_file", ""))
        assert parts is not None, "it matches everything"
        stem, suffix = parts.groups("")
        values["val_data_file"] = f"{stem}-heldout{suffix}"
    if values.get("logger", "").lower() in BOOLEANS:
        notes.append(
            "--logger is a flag of Lightning 1.9's Trainer too, without effect here; expected tensorboard or csv"
        )
        values["logger"] = ""
    return RunConfig(**values), notes

"""The command line of train.py: the flags of existing RWKV training scripts become a RunConfig.

Flags and their texts are made from the fields of `RunConfig`; this file knows only how a command line differs from it: the
flags of Lightning 1.9's Trainer that old scripts pass along, those of other RWKV trainers, and what to say about one that nobody knows.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
from typing import Any, NoReturn

from src.config import GROUPS, RunConfig

# Trainer flags of Lightning 1.9 that old scripts carry. They change nothing here, so they are accepted with a warning ...
HARMLESS_TRAINER_FLAGS = (
    *("amp_backend", "amp_level", "auto_lr_find", "auto_scale_batch_size", "auto_select_gpus", "benchmark"),
    *("check_val_every_n_epoch", "default_root_dir", "deterministic", "detect_anomaly", "enable_checkpointing"),
    *("enable_model_summary", "inference_mode", "ipus", "limit_predict_batches", "limit_test_batches"),
    *("limit_val_batches", "log_every_n_steps", "max_epochs", "min_epochs", "min_steps"),
    *("move_metrics_to_cpu", "multiple_trainloader_mode", "num_sanity_val_steps", "plugins"),
    *("profiler", "reload_dataloaders_every_n_epochs", "replace_sampler_ddp"),
    *("sync_batchnorm", "tpu_cores", "track_grad_norm", "use_distributed_sampler", "val_check_interval"),
)
# ... and those that would change the run if they were honoured, with what does it here.
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
    "resume_from_checkpoint": "use --load_model (weights), or the same --proj_dir, which continues by itself",
    # of the trainers for RWKV-4 to RWKV-6
    "my_pile_stage": "use --train_stage",
    "my_pile_version": "leave it out",
    "my_pile_edecay": "the learning rate falls along a cosine to --lr_final; leave it out",
    "my_qa_mask": "use --data_type sft, where only answers count",
    "head_size_a": "use --head_size",
    "head_size_divisor": "leave it out: RWKV-7's is fixed",
    "weight_decay_final": "leave it out: --weight_decay stays what it is",
    "layerwise_lr": "leave it out: RWKV-7's w0 always has twice the learning rate",
    "pre_ffn": "leave it out: RWKV-7 has none",
    "head_qk": "leave it out: RWKV-7 has none",
    "tiny_att_dim": "leave it out: RWKV-7 has none",
    "tiny_att_layer": "leave it out: RWKV-7 has none",
    "dropout": "leave it out: RWKV-7 is trained without",
    "quant": "leave it out: all weights are trained, in --precision",
    "lora": "leave it out: all weights are trained, not adapters",
    "peft": "leave it out: all weights are trained, not adapters",
}

EXAMPLES = """\
examples:
  sh demo-training-run.sh                     the whole way on demo data, without a download; this program is a part of it
  python train.py --proj_dir out/mine --data_file data/mine --tokenizer world --n_layer 12 --n_embd 768 --ctx_len 512
  python train.py --check ...                 will the run that ... describes fit and work?
"""


class _Formatter(argparse.HelpFormatter):
    """Flags wrapped as usual, the examples as they stand."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text == EXAMPLES else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """argparse with errors that say what to do, and exit code 2 as usual."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"train.py: {message}\nEvery flag with its meaning: python train.py --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The flags of `RunConfig` by topic, with their meanings and defaults, for --help."""
    parser = Parser(
        prog="train.py",
        usage="train.py [--flag value]...",
        description="Train an RWKV-7 model. The flags are those of existing RWKV training scripts.",
        epilog=EXAMPLES,
        formatter_class=lambda prog: _Formatter(prog, max_help_position=34, width=120),
    )
    topics = {key: parser.add_argument_group(title) for key, title in GROUPS.items()}
    for field in dataclasses.fields(RunConfig):
        kind = type(field.default)
        choices = (
            "" if not field.metadata["choices"] else " (" + " | ".join(filter(None, field.metadata["choices"])) + ")"
        )
        shown = "" if field.default == "" or field.name == "plan" else f" [{field.default}]".replace("%", "%%")
        topics[field.metadata["group"]].add_argument(
            f"--{field.name}",
            metavar=kind.__name__.upper(),
            nargs=None if field.metadata["alone"] is None else "?",
            help=field.metadata["help"].replace("%", "%%") + choices + shown,
        )
    return parser


def parse(argv: list[str]) -> tuple[RunConfig, list[str]]:
    """`argv` as settings, and what is to be said about flags that were accepted without being needed.

    Exits with code 2 and all faults at once when the command line can't be understood.
    """
    parser = build_parser()
    if "--help" in argv or "-h" in argv:
        parser.print_help()
        parser.exit()
    words, notes, faults = _read(argv)
    values, more = _typed(words)
    faults += more
    config, more = _normalise(values)
    notes += more
    faults += config.faults()
    if faults:
        parser.error("\n".join(faults) if len(faults) == 1 else "several things are wrong:\n  " + "\n  ".join(faults))
    return config, notes


def _read(argv: list[str]) -> tuple[dict[str, str | None], list[str], list[str]]:
    """(flag -> its last value, None where it stands alone; notes; faults). Every word is a flag, a flag's one value, or a fault."""
    known = {field.name for field in dataclasses.fields(RunConfig)}
    given: dict[str, str | None] = {}
    notes: list[str] = []
    faults: list[str] = []
    at = 0
    while at < len(argv):
        word = argv[at]
        at += 1
        if not _is_flag(word):
            before = f" (the words before it are {' '.join(argv[max(0, at - 3) : at - 1])})" if at > 1 else ""
            faults.append(f"{word!r}: a value without a flag before it{before}; a flag takes one value")
            continue
        name, equals, value = word.lstrip("-").partition("=")
        found: str | None = value if equals else None
        if not equals and at < len(argv) and not _is_flag(argv[at]):
            found = argv[at]
            at += 1
        if name in known and word.startswith("--"):
            given[name] = found
        elif name in known:
            faults.append(f"{word}: a flag begins with two dashes: --{name}")
        elif name == "local_rank":
            pass  # launchers of several processes add it
        elif name in HARMLESS_TRAINER_FLAGS:
            notes.append(f"--{name}: a flag of Lightning 1.9's Trainer that changes nothing here; leave it out")
        elif name in REPLACED_FLAGS:
            faults.append(f"--{name}: not a flag here; {REPLACED_FLAGS[name]}")
        else:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            faults.append(f"{word}: no such flag" + (f"; the nearest is --{near[0]}" if near else ""))
    return given, notes, faults


def _is_flag(word: str) -> bool:
    """Whether a word of the command line is a flag: a dash, and not a negative number."""
    return word.startswith("-") and not re.fullmatch(r"-(\d|\.\d|inf|nan).*|-", word)


def _typed(words: dict[str, str | None]) -> tuple[dict[str, Any], list[str]]:
    """The words as values of the fields' types; a word that is none is a fault, and its flag keeps the default."""
    values: dict[str, Any] = {}
    faults: list[str] = []
    for field in dataclasses.fields(RunConfig):
        if field.name not in words:
            continue
        word, alone = words[field.name], field.metadata["alone"]
        kind: Any = type(field.default)
        if word is None and alone is None:
            faults.append(f"--{field.name}: its value is missing")
            continue
        try:
            values[field.name] = alone if word is None else kind(word)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            faults.append(f"--{field.name} {word!r}: expected {expected}")
    return values, faults


def _normalise(given: dict[str, Any]) -> tuple[RunConfig, list[str]]:
    """Values that existing scripts write in their own way."""
    notes = []
    for name in ("proj_dir", "data_file", "val_data_file", "load_model", "tokenizer"):
        if given.get(name, "").startswith("~"):  # a shell leaves it as it is in quotes, and after an equals sign
            given[name] = os.path.expanduser(given[name])
    if given.get("load_model") == "0":
        given["load_model"] = ""
    if given.get("kernel") in ("@rwkv3", ""):
        given["kernel"] = "auto"
    if given.get("accelerator") == "cuda":
        given["accelerator"] = "gpu"
    if given.get("epoch_count"):
        notes.append("--epoch_count is ignored: the run ends after --my_exit_tokens")
    if given.get("val_data_file") == "heldout":
        found = re.fullmatch(r"(.*?)(\.bin|\.idx|\.jsonl(?:\.gz|\.zst)?)?", given.get("data_file", ""))
        assert found is not None, "it matches everything"
        stem, ending = found.groups("")
        given["val_data_file"] = f"{stem}-heldout{ending}"
    if given.get("logger", "").lower() in ("true", "false", "1", "0"):
        notes.append("--logger: as a flag of Lightning 1.9's Trainer it changes nothing here; tensorboard or csv would")
        given["logger"] = ""
    return RunConfig(**given), notes

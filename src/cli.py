"""The command line of train.py: the flags of existing RWKV training scripts become a RunConfig.

Flags and their texts are made from the fields of `RunConfig`; this file knows only how a command line differs from it: the
flags of Lightning 1.9's Trainer that old scripts pass along, and what to say about a flag that nobody knows.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from typing import NoReturn

from src.config import GROUPS, RunConfig

# Trainer flags of Lightning 1.9 that old scripts carry. They change nothing here, so they are accepted with a warning ...
HARMLESS_TRAINER_FLAGS = (
    *("amp_backend", "amp_level", "auto_lr_find", "auto_scale_batch_size", "auto_select_gpus", "benchmark"),
    *("check_val_every_n_epoch", "default_root_dir", "deterministic", "detect_anomaly", "enable_checkpointing"),
    *("enable_model_summary", "inference_mode", "ipus", "limit_predict_batches", "limit_test_batches"),
    *("limit_val_batches", "log_every_n_steps", "logger", "max_epochs", "min_epochs", "min_steps"),
    *("move_metrics_to_cpu", "multiple_trainloader_mode", "num_sanity_val_steps", "plugins"),
    *("profiler", "reload_dataloaders_every_n_epochs", "replace_sampler_ddp"),
    *("sync_batchnorm", "tpu_cores", "track_grad_norm", "use_distributed_sampler", "val_check_interval"),
)
# ... and those that would change the run if they were honoured, with the flag that does it here.
REPLACED_TRAINER_FLAGS = {
    "gradient_clip_val": "--grad_clip",
    "gradient_clip_algorithm": "--grad_clip (always the global norm)",
    "max_steps": "--my_exit_tokens",
    "limit_train_batches": "--my_exit_tokens",
    "overfit_batches": "--my_exit_tokens and a small --data_file",
    "fast_dev_run": "--my_exit_tokens",
    "gpus": "--devices",
    "num_processes": "--devices",
    "max_time": "--time_limit",
    "resume_from_checkpoint": "--load_model (weights), or the same --proj_dir, which continues by itself",
}


class Parser(argparse.ArgumentParser):
    """argparse with errors that say what to do, and exit code 2 as usual."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"train.py: {message}\nEvery flag with its meaning: python train.py --help\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="train.py",
        description="Train an RWKV-7 model. The flags are those of existing RWKV training scripts.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
        allow_abbrev=False,  # a prefix of a flag is a typing error, not a wish
    )
    topics = {key: parser.add_argument_group(title) for key, title in GROUPS.items()}
    for field in dataclasses.fields(RunConfig):
        kind = type(field.default)
        choices = (
            "" if not field.metadata["choices"] else " (" + " | ".join(filter(None, field.metadata["choices"])) + ")"
        )
        shown = f" [{field.default if field.default != '' else 'none'}]".replace("%", "%%")
        argument = topics[field.metadata["group"]].add_argument(
            f"--{field.name}",
            type=kind,
            default=field.default,
            metavar=kind.__name__.upper(),
            help=field.metadata["help"].replace("%", "%%") + choices + shown,
        )
        if field.name == "plan":  # a question that needs no number
            argument.nargs, argument.const = "?", 0.0
    return parser


def parse(argv: list[str]) -> tuple[RunConfig, list[str]]:
    """`argv` as settings, and what is to be said about flags that were accepted without being needed.

    Exits with code 2 and all faults at once when the command line can't be understood.
    """
    parser = build_parser()
    namespace, unknown = parser.parse_known_args(argv)
    notes, faults = _judge_unknown(unknown, [field.name for field in dataclasses.fields(RunConfig)])
    config, more = _normalise(namespace)
    notes += more
    faults += config.faults()
    if faults:
        parser.error("\n".join(faults) if len(faults) == 1 else "several things are wrong:\n  " + "\n  ".join(faults))
    return config, notes


def _judge_unknown(unknown: list[str], known: list[str]) -> tuple[list[str], list[str]]:
    notes, faults = [], []
    for word in unknown:
        if not word.startswith("--"):
            continue  # the value of the flag before it, which has been judged
        name = word[2:].split("=")[0]
        if name == "local_rank":
            continue  # launchers of several processes add it
        if name in HARMLESS_TRAINER_FLAGS:
            notes.append(f"--{name}: a flag of Lightning 1.9's Trainer that changes nothing here; leave it out")
        elif name in REPLACED_TRAINER_FLAGS:
            faults.append(f"--{name}: not a flag here; use {REPLACED_TRAINER_FLAGS[name]}")
        else:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            faults.append(f"--{name}: no such flag" + (f"; the nearest is --{near[0]}" if near else ""))
    stray = unknown and not unknown[0].startswith("--")
    if stray:
        faults.append(f"{unknown[0]!r}: a value without a flag before it")
    return notes, faults


def _normalise(namespace: argparse.Namespace) -> tuple[RunConfig, list[str]]:
    """Values that existing scripts write in their own way."""
    notes = []
    given = vars(namespace)
    if given["load_model"] == "0":
        given["load_model"] = ""
    if given["kernel"] in ("@rwkv3", ""):
        given["kernel"] = "auto"
    if given["accelerator"] == "cuda":
        given["accelerator"] = "gpu"
    if given["epoch_count"]:
        notes.append("--epoch_count is ignored: the run ends after --my_exit_tokens")
    return RunConfig(**given), notes

"""Command-line arguments that the programs in this package share: the model, adapters, how tokens are sampled."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from src.adapt.adapter_files import STATE_LAYOUTS
from src.config.flags import SPECIAL_TOKENS, THINK_MODES
from src.dataset.control_tokens import parses_special_tokens
from src.errors import UserError
from src.inference.adaptation import Adaptation
from src.inference.load import DTYPES
from src.inference.sampling import SEED_LIMIT, Sampling

PICTURES = (".png", ".svg")
MODEL_HELP = (
    "weights (.pth, .safetensors, .st, .gguf), a run's folder, or a Hugging Face folder in "
    "flash-linear-attention's layout"
)


def add_model_arguments(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """Add MODEL, --tokenizer, --dtype and --device. `optional`: MODEL may be left out."""
    # With nargs=None argparse stores one value; "?" makes the same positional argument optional.
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?" if optional else None,
        default="",
        help=MODEL_HELP + ("; default: the newest under out/" if optional else ""),
    )
    add_adapter_arguments(parser)
    parser.add_argument("--tokenizer", default="", help='"world" or a Hugging Face folder; default: that of the run')
    parser.add_argument("--dtype", choices=tuple(DTYPES), default=None, help="default: bf16 on cuda and xpu, else fp32")
    parser.add_argument(
        "--device", default=None, help="cpu, cuda, cuda:1, mps, xpu, ...; default: the first CUDA GPU, without one cpu"
    )


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --adapter, --state and what goes with them; `adaptation_from` has their values."""
    parser.add_argument(
        "--adapter", default="", help="LoRA, DoRA or MiSS: a PEFT folder, a .pth or .st, or the folder of a run"
    )
    parser.add_argument("--state", default="", help="tuned initial states: a .pth or .st, or the folder of a run")
    add_adapter_details(parser)


def add_adapter_details(parser: argparse.ArgumentParser) -> None:
    """Add what goes with --adapter and --state."""
    parser.add_argument("--lora_alpha", type=float, default=None, help="for LoRA files that don't have it")
    parser.add_argument(
        "--state_layout",
        choices=STATE_LAYOUTS,
        default="",
        help="axis order of --state [head, ., .]; default: value-key in a .pth, key-value in safetensors",
    )
    parser.add_argument(
        "--other_base", action="store_true", help="accept an adapter that was trained on other weights of these sizes"
    )


def adaptation_from(options: argparse.Namespace) -> Adaptation:
    """The values of the flags of `add_adapter_arguments`. Raises UserError for one without what it belongs to."""
    if options.lora_alpha is not None and not options.adapter:
        raise UserError("needs --adapter", flag="lora_alpha", given=f"{options.lora_alpha:g}")
    return Adaptation(options.adapter, options.state, options.lora_alpha, options.state_layout, options.other_base)


def add_chat_template_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --chat_template, for `find_template`; `default` is described in its help."""
    parser.add_argument(
        "--chat_template",
        default="",
        help=f"none, tokenizer (its own), rwkv (User: ... Assistant: ...) or a Jinja file; default: {default}",
    )


def add_special_tokens_argument(parser: argparse.ArgumentParser) -> None:
    """Add --special_tokens, for `parse_special_from`."""
    parser.add_argument(
        "--special_tokens",
        choices=SPECIAL_TOKENS,
        default=SPECIAL_TOKENS[0],
        help="what special tokens such as <|im_end|> are in your messages: text, or tokens (parse) [%(default)s]",
    )


def parse_special_from(options: argparse.Namespace) -> bool:
    """Whether special tokens in messages are tokens, by --special_tokens."""
    return parses_special_tokens(options.special_tokens)


def add_think_argument(parser: argparse.ArgumentParser, note: str = "") -> None:
    """Add --think, for `ChatTemplate.thinking`."""
    parser.add_argument(
        "--think",
        choices=THINK_MODES,
        default="",
        help="whether the model is asked to think before it answers; short and long with the format of RWKV only"
        + (f"; {note}" if note else ""),
    )


def add_media_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --image and --sound, each as often as wanted; `media_from` has their values."""
    files: dict[str, Any] = {"action": "append", "default": [], "metavar": "FILE"}
    parser.add_argument("--image", **files, help="put this image before the question")
    parser.add_argument("--sound", **files, help="put this sound before the question")


def media_from(options: argparse.Namespace) -> list[tuple[str, Path]]:
    """(kind, file) of the flags of `add_media_arguments`."""
    return [(kind, Path(file)) for kind in ("image", "sound") for file in getattr(options, kind)]


def picture_from(options: argparse.Namespace, flag: str) -> Path:
    """The file that `flag` names for a picture. Raises UserError where none can be written there."""
    path = Path(getattr(options, flag))
    if path.suffix.lower() not in PICTURES:
        raise UserError(flag=flag, given=path, expected=f"a name that ends in {' or '.join(PICTURES)}")
    if not path.parent.is_dir():
        raise UserError("no such folder", flag=flag, given=path, advice="make it first")
    return path


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag per field of `Sampling`, and --seed."""
    descriptions = {
        "temperature": "0: always the most likely token",
        "top_p": "1: off",
        "top_k": "0: off",
        "presence_penalty": "subtracted from the logit of every token generated so far",
        "frequency_penalty": "subtracted from it once more for each time it was generated",
        "penalty_decay": "factor on these counts with every further token",
    }
    # From the fields, so that a default stands once: in Sampling.
    for field in fields(Sampling):
        # The annotations are strings here (see __future__), so they can't be used as types.
        kind = int if field.name == "top_k" else float
        help = f"{descriptions[field.name]} [%(default)s]"
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=help)
    parser.add_argument("--seed", type=int, default=None, help="equal seeds give equal text; default: a random one")


def sampling_from(options: argparse.Namespace) -> Sampling:
    """The values of the flags of `add_sampling_arguments`. Raises UserError naming a flag that is out of range."""
    if options.seed is not None and not 0 <= options.seed < SEED_LIMIT:
        raise UserError(flag="seed", given=options.seed, expected="an integer from 0 to 2^63 - 1")
    # Sampling checks its own values, and its fields have the names of the flags.
    return Sampling(**{field.name: getattr(options, field.name) for field in fields(Sampling)})

"""A model in another format or precision, verified by reading it back.

    python -m src.inference.export MODEL OUT [--format FORMAT] [--dtype bf16 | --type q8_0]
    python -m src.inference.export BASE MERGED.pth --adapter ADAPTER [--state STATE]
    python -m src.inference.export BASE OUT --adapter ADAPTER --format gguf-lora | st-lora
    python -m src.inference.export BASE OUT --state STATE --format st-state
    python -m src.inference.export RUN OUT --format multimodal
    python -m src.inference.export --list        the formats, and the programs that read them

MODEL may itself be in any of these formats (of an ollama folder its model.gguf), so this converts in both directions:
`--format pth` makes a .pth of a Hugging Face folder. An official .pth needs no conversion. An adapter is merged into
its base's weights, in fp32, and rounded to BASE's dtype or --dtype. Initial states are stored beside the weights, in
formats that have a place.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from src.adapt.merge import check_adapter
from src.dataset.tokenizer import Tokenizer
from src.errors import UserError
from src.inference.adaptation import Adaptation, model_name
from src.inference.arguments import MODEL_HELP, adaptation_from, add_adapter_arguments
from src.inference.evaluation_data import read_tokens
from src.inference.formats import multimodal
from src.inference.formats.adapters import ADAPTER_FORMATS, AdapterFormat, convert_adapter
from src.inference.formats.convert import FORMATS, check_states, convert_model, unmerged_model
from src.inference.formats.format import Format
from src.inference.load import DTYPES, find_model, find_tokenizer, load_model, load_weights
from src.inference.windows import stack_windows, windows
from src.model import RWKV7
from src.model.weights import config_from_weights, split_states
from src.run_folder import RUN
from src.terminal import prepare_output, show

ALL_FORMATS: dict[str, Format | AdapterFormat] = {**FORMATS, **ADAPTER_FORMATS}
# Of --data: enough to tell a loss to three digits, and a matter of minutes for a large model on a CPU.
HELD_OUT_WINDOWS, HELD_OUT_LENGTH = 32, 512


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    prepare_output()
    options = parser.parse_args(argv)
    try:
        weights, found = find_model(options.model, adaptation_from(options))
        if options.format == multimodal.NAME:
            _write_multimodal(options, weights, found)
            return 0
        adaptation = replace(found, media="")  # the other formats have no place for encoder and projector
        format = options.format or _format_of(options.out)
        # before seconds are spent on loading the model
        _check_out(options.out, format, [weights, *found.paths])
        _check_options(format, options, adaptation)
        if format in ADAPTER_FORMATS:
            model = load_model(weights, "as is", "cpu")
        else:
            # Rounded once: where the format rounds by itself, what an adapter is merged into stays fp32 until then.
            merged = options.dtype or ("fp32" if FORMATS[format].types else "as is")
            model = load_model(weights, merged if adaptation else "as is", "cpu", adaptation)
        tokenizer = _tokenizer(weights, model, options.tokenizer, ALL_FORMATS[format], found)
        type, title = options.type or "", _title(weights)
        held_out = _held_out(options.data, model, tokenizer) if options.data else None
        if format in ADAPTER_FORMATS:
            ((path, adapter),) = adaptation.read()
            check_adapter(adapter, model.state_dict(), path, adaptation.other_base)
            parity = convert_adapter(
                model, adapter, options.out, format, tokenizer, type=type, title=f"{title} adapter", windows=held_out
            )
        else:
            folder = ([Path(found.media)] if found.media else adaptation.paths or [weights])[0].parent
            parity = convert_model(
                model,
                options.out,
                format,
                DTYPES.get(options.dtype),
                tokenizer,
                type=type,
                title=title,
                windows=held_out,
                run=folder if (folder / RUN).is_file() and weights.is_file() else None,
                unmerged=unmerged_model(weights, adaptation) if adaptation else None,
            )
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except (OSError, RuntimeError) as error:  # VerificationError, and what torch.save raises when the disk is full
        parser.exit(1, f"{parser.prog}: {error}\n")
    show(f"wrote {options.out} ({format}) from {model_name(weights, adaptation)}\n{parity}")
    if found.media:
        show(f"the language model alone: encoder and projector stay in {found.media}")
    if format in FORMATS and (next_command := FORMATS[format].next_command) is not None:
        show(next_command(title, options.out))
    return 0


def _write_multimodal(options: argparse.Namespace, weights: Path, found: Adaptation) -> None:
    for flag in ("type", "data"):
        if given := getattr(options, flag):
            raise UserError(
                f"doesn't go with --format {multimodal.NAME}", flag=flag, given=given, advice="leave it out"
            )
    vocab_size = config_from_weights(split_states(load_weights(weights))[0], str(weights)).vocab_size
    tokenizer = find_tokenizer(weights, vocab_size, options.tokenizer, found)
    multimodal.write_multimodal(weights, found, options.out, options.dtype, tokenizer)
    show(f"wrote {options.out} ({multimodal.NAME}) from {model_name(weights, found)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m src.inference.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write, or folder, as --list says")
    parser.add_argument("--list", action=_List, help="show the formats and the programs that read them")
    parser.add_argument(
        "--format",
        choices=(*ALL_FORMATS, multimodal.NAME),
        default=None,
        help="default: by OUT's suffix; without one, fla",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default=None, help="default: that of MODEL")
    types = dict.fromkeys(type for format in ALL_FORMATS.values() for type in format.types)
    parser.add_argument("--type", choices=tuple(types), default=None, help="of formats with their own types (--list)")
    parser.add_argument("--tokenizer", default="", help="to store with the weights; default: that of the run")
    parser.add_argument("--data", type=Path, default=None, help="held-out text or binidx: compare losses, too")
    add_adapter_arguments(parser)
    return parser


class _List(argparse.Action):
    """Prints the table of formats and exits, as --help does."""

    def __init__(self, **options: object) -> None:
        super().__init__(nargs=0, **options)  # type: ignore[arg-type]

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(format_list())
        parser.exit()


def format_list() -> str:
    """The formats with their suffixes and types, and under each the programs that read it, with the command."""
    lines = []
    for name, format in ALL_FORMATS.items():
        types = f", --type {'|'.join(format.types)}" if format.types else ", --dtype"
        lines.append(f"{name:12} {format.summary} ({format.suffix or 'folder'}{types})")
        lines += [f"{'':12}   {program.name}: {program.command}" for program in format.programs]
    return "\n".join([*lines, f"{multimodal.NAME:12} {multimodal.SUMMARY} (folder, --dtype)"])


def _format_of(out: Path) -> str:
    """The format of OUT by its suffix. Raises UserError for another suffix."""
    # A folder has no suffix. Where two formats share a suffix, the first one is its default.
    by_suffix: dict[str, str] = {}
    for name, format in FORMATS.items():
        by_suffix.setdefault(format.suffix, name)
    if out.suffix not in by_suffix:
        expected = ", ".join(suffix for suffix in by_suffix if suffix)
        raise UserError(
            f"no format has the suffix {out.suffix}",
            given=out,
            expected=f"{expected}, or none for a folder, or --format",
        )
    return by_suffix[out.suffix]


def _check_out(out: Path, format: str, inputs: list[Path]) -> None:
    """Raises UserError when OUT can't be written in `format`, or is one of `inputs`, before the model is loaded."""
    suffix = ALL_FORMATS[format].suffix
    if out.exists() and any(path.exists() and out.samefile(path) for path in inputs):
        is_model = out.samefile(inputs[0])
        raise UserError(
            "is MODEL itself" if is_model else "is what is applied to MODEL", given=out, advice="name another file"
        )
    if not suffix:  # an existing folder is fine: `convert_model` looks at what it contains
        return
    if out.is_dir():
        raise UserError(
            f"is a folder, but --format {format} writes a file", given=out, expected=f"{out / 'model'}{suffix}"
        )
    if out.suffix != suffix:  # other programs choose their reader by it
        raise UserError(f"--format {format} writes a file that ends in {suffix}", given=out, expected=f"{out}{suffix}")


def _check_options(format: str, options: argparse.Namespace, adaptation: Adaptation) -> None:
    """Raises UserError for options that don't go with `format`."""
    if format in ADAPTER_FORMATS:
        if len(adaptation.paths) != 1:
            raise UserError(
                f"--format {format} writes one adapter or one set of initial states",
                flag="adapter",
                given=" and ".join(map(str, adaptation.paths)) or "nothing",
                expected="--adapter or --state of MODEL",
            )
    elif adaptation.state:
        check_states(format, adaptation.state, "state")
    types = ALL_FORMATS[format].types
    if types and options.dtype:
        raise UserError(
            f"--format {format} has types of its own",
            flag="dtype",
            given=options.dtype,
            expected=f"--type {' | '.join(types)}",
        )
    if options.type and options.type not in types:
        expected = f"--type {' | '.join(types)}" if types else f"--dtype {' | '.join(DTYPES)}"
        raise UserError(f"not a type of --format {format}", flag="type", given=options.type, expected=expected)


def _tokenizer(
    weights: Path, model: RWKV7, given: str, format: Format | AdapterFormat, adaptation: Adaptation
) -> Tokenizer | None:
    """The tokenizer of the model: an export may be complete without one, unless it was asked for."""
    try:
        return find_tokenizer(weights, model.config.vocab_size, given, adaptation)
    except UserError as error:
        if given or (isinstance(format, Format) and format.needs_tokenizer):
            raise
        if not format.suffix:
            show(f"note: no tokenizer is copied ({error})")
        return None


def _title(weights: Path) -> str:
    """What a model is called: the name of its run's or its own folder, or that of its file where that says more."""
    generic = weights.stem.startswith("rwkv-") and weights.suffix == ".pth"  # rwkv-final, rwkv-12
    return weights.absolute().parent.name if generic else weights.stem


def _held_out(data: Path, model: RWKV7, tokenizer: Tokenizer | None) -> Tensor:
    """Windows of `data`, int64 [B, T + 1]. Raises UserError when it can't be read or is of another vocabulary."""
    tokens = read_tokens(data, tokenizer)
    return stack_windows(tokens, windows(len(tokens), HELD_OUT_LENGTH, HELD_OUT_WINDOWS), model.config.vocab_size)


if __name__ == "__main__":
    sys.exit(main())

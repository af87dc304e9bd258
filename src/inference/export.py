"""A model in another format or precision, verified by reading it back.

    python -m src.inference.export MODEL OUT [--format pth | safetensors | fla] [--dtype bf16]
    python -m src.inference.export BASE MERGED.pth --adapter ADAPTER [--state STATE]

MODEL may itself be in any of these formats, so this converts in both directions: `--format pth` makes a .pth of a
Hugging Face folder. An official .pth needs no conversion. An adapter is merged into its base's weights, in fp32, and
rounded to BASE's dtype or --dtype. Initial states are stored beside the weights, in formats that have a place.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from src.dataset.tokenizer import Tokenizer
from src.errors import UserError
from src.inference.adaptation import Adaptation, model_name
from src.inference.arguments import MODEL_HELP, adaptation_from, add_adapter_arguments
from src.inference.formats.convert import FORMATS, convert_model
from src.inference.load import DTYPES, NO_SIZE_LIMIT, find_model, find_tokenizer


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m src.inference.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write (with fla: folder)")
    parser.add_argument("--format", choices=FORMATS, default=None, help="default: by OUT's suffix; without one, fla")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default=None, help="default: that of MODEL")
    parser.add_argument("--tokenizer", default="", help="to copy next to the weights (fla); default: that of the run")
    add_adapter_arguments(parser)
    options = parser.parse_args(argv)
    try:
        weights, adaptation = find_model(options.model, adaptation_from(options))
        format = options.format or _format_of(options.out)
        _check_out(options.out, format, weights)  # before seconds are spent on loading the model
        tokenizer = _tokenizer(weights, options.tokenizer, adaptation) if FORMATS[format].is_folder else None
        parity = convert_model(weights, options.out, format, DTYPES.get(options.dtype), tokenizer, adaptation)
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except (OSError, RuntimeError) as error:  # VerificationError, and what torch.save raises when the disk is full
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(f"wrote {options.out} ({format}) from {model_name(weights, adaptation)}\n{parity}")
    return 0


def _format_of(out: Path) -> str:
    """The format of OUT by its suffix. Raises UserError for another suffix."""
    # A folder has no suffix. Where two formats share a suffix, the later one is its default.
    by_suffix = {format.suffix: name for name, format in FORMATS.items()}
    if out.suffix not in by_suffix:
        expected = ", ".join(suffix for suffix in by_suffix if suffix)
        raise UserError(
            f"no format has the suffix {out.suffix}",
            given=out,
            expected=f"{expected}, or none for a folder, or --format",
        )
    return by_suffix[out.suffix]


def _check_out(out: Path, format: str, weights: Path) -> None:
    """Raises UserError when OUT can't be written in `format`, before the model is loaded."""
    suffix = FORMATS[format].suffix
    if out.exists() and out.resolve() == weights.resolve():
        raise UserError("is MODEL itself", given=out, advice="name another file")
    if not suffix:  # an existing folder is fine: `convert_model` looks at what it contains
        return
    if out.is_dir():
        raise UserError(
            f"is a folder, but --format {format} writes a file", given=out, expected=f"{out / 'model'}{suffix}"
        )
    if out.suffix != suffix:  # other programs choose their reader by it
        raise UserError(f"--format {format} writes a file that ends in {suffix}", given=out, expected=f"{out}{suffix}")


def _tokenizer(weights: Path, given: str, adaptation: Adaptation) -> Tokenizer | None:
    """The tokenizer to copy: the export is complete without one, unless it was asked for."""
    try:
        # Without the model its vocabulary size is unknown here, so World isn't inferred from it; it has no files to
        # copy.
        return find_tokenizer(weights, NO_SIZE_LIMIT, given, adaptation)
    except UserError as error:
        if given:
            raise
        print(f"note: no tokenizer is copied ({error})")
        return None


if __name__ == "__main__":
    sys.exit(main())

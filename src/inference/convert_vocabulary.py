"""A model with a larger or smaller vocabulary: room for new control tokens, or for another tokenizer's.

    python -m src.inference.convert_vocabulary MODEL OUT --vocab_size 65600
    python -m src.inference.convert_vocabulary MODEL OUT --tokenizer FOLDER    as many rows as it has ids

The first rows of embedding and head are kept. New rows are the mean of the old ones and have to be trained. OUT is a
new .pth or .safetensors file. train.py adds rows by itself with --resize_vocab 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from src.dataset.tokenizer import load_tokenizer
from src.errors import UserError
from src.inference.arguments import MODEL_HELP
from src.inference.formats.convert import convert_model
from src.inference.load import find_tokenizer, find_weights, load_model
from src.model import RWKV7
from src.model.vocabulary import resize_vocabulary

FORMATS = {".pth": "pth", ".safetensors": "safetensors"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m src.inference.convert_vocabulary",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write (.pth or .safetensors)")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--vocab_size", type=int, help="rows of the new vocabulary")
    size.add_argument("--tokenizer", default="", help="world or a tokenizer folder, which the rows are for")
    options = parser.parse_args(argv)
    try:
        print(convert_vocabulary(options.model, options.out, options.vocab_size, options.tokenizer))
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except (OSError, RuntimeError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    return 0


def convert_vocabulary(model: str, out: Path, vocab_size: int | None, tokenizer: str) -> str:
    """Write `model` with `vocab_size` rows, or with those of `tokenizer`; what was done. Raises UserError, OSError."""
    if out.suffix not in FORMATS:
        raise UserError(f"ends in {out.suffix or 'nothing'}", given=out, expected=f"{' or '.join(FORMATS)}")
    if out.exists():
        raise UserError("exists", given=out, advice="name another file")
    weights = find_weights(model)
    rows = load_tokenizer(tokenizer).vocab_size if tokenizer else vocab_size
    assert rows is not None
    if rows < 1:
        raise UserError("no vocabulary", flag="vocab_size", given=rows, expected="at least 1")
    original = load_model(weights, "as is", "cpu")
    before = original.config.vocab_size
    if not tokenizer:
        _check_ids(weights, before, rows)
    if rows == before:
        raise UserError("the model has these rows already", flag="vocab_size", given=rows)
    resized = RWKV7.from_weights(resize_vocabulary(original.state_dict(), rows), str(weights))
    convert_model(resized.eval().requires_grad_(False), out, FORMATS[out.suffix])
    change = (
        f"{rows - before} new ones are the mean of the others" if rows > before else f"the last {before - rows} left"
    )
    return f"wrote {out}: {rows} rows instead of {before}; {change}"


def _check_ids(weights: Path, before: int, rows: int) -> None:
    """Raises UserError when the tokenizer of the model has ids that the new one lacks."""
    try:
        own = find_tokenizer(weights, before)
    except UserError:  # none is known, or it doesn't fit already
        return
    if own.largest_id >= rows:
        raise UserError(
            f"the model's tokenizer ({own.name}) has ids up to {own.largest_id}",
            flag="vocab_size",
            given=rows,
            expected=f"at least {own.largest_id + 1}, or --tokenizer with another one",
        )


if __name__ == "__main__":
    sys.exit(main())

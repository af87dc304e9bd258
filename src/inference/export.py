"""A model in another format or precision, checked by reading it back.

    python -m src.inference.export MODEL OUT [--format pth | safetensors | fla] [--dtype bf16]

MODEL may be in any of these formats itself, so this is the way in as well: an official .pth needs no conversion, and
`--format pth` makes one of a Hugging Face folder.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from src.dataset.tokenizer import Tokenizer, copy_tokenizer
from src.errors import UserError
from src.files import atomic_write, sync_folder
from src.inference.fla import TENSORS, write_fla
from src.inference.load import DTYPES, MODEL_HELP, find_tokenizer, find_weights, load_model
from src.model import RWKV7
from src.model.weights import Weights

FORMATS = ("pth", "safetensors", "fla")
CHECKED_TOKENS = 64
SAME = 1e-5  # of the logits of what was written and of what was meant, both computed in fp32


@dataclass(frozen=True)
class Parity:
    """Logits of the exported model beside the original's, in fp32 over `CHECKED_TOKENS` tokens.

    written: largest difference to the original rounded to the same dtype: has to be zero but for the order of sums
    rounding: largest difference to the original itself;  agreement: share of positions with the same likeliest token
    """

    written: float
    rounding: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"read back: logits differ by {self.written:.1e} from what was meant to be written, by {self.rounding:.1e} from the "
            f"original's; the likeliest token is the same in {100 * self.agreement:.0f} % of {CHECKED_TOKENS} places"
        )


def export(
    model: Path, out: Path, format: str, dtype: torch.dtype | None, tokenizer: Tokenizer | None = None
) -> Parity:
    """Write `model` (whatever `find_weights` gives) to `out` and compare the logits of what is read back.

    dtype None keeps that of the file. What stood there before stays until the new one has been checked. Raises ValueError when the
    format can't hold the model or `out` holds another, OSError when it can't be written, RuntimeError when what is read back is another
    model.
    """
    is_folder = format == "fla"
    if is_folder and (others := sorted(file.name for file in out.glob("*.safetensors") if file.name != TENSORS)):
        raise UserError(
            f"OUT {out}: holds other weights ({others[0]}), which would be read together with these; name another folder"
        )
    original = load_model(model, "as is", "cpu")
    weights = {name: t.to(dtype or t.dtype).contiguous() for name, t in original.state_dict().items()}
    meant = RWKV7.from_weights(weights, str(model)) if dtype else original
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export-", dir=out if is_folder and out.is_dir() else out.parent) as beside:
        new = Path(beside) / f"model.{format}"
        if is_folder:
            write_fla(weights, original.config, new, eos_id=max(tokenizer.eos_ids) if tokenizer else 0)
        else:
            _write_file(weights, new)
        found = parity(original, meant, load_model(new, "as is", "cpu"))
        if not found.written <= SAME:
            raise RuntimeError(
                f"{out}: nothing was written there, because what was read back is not the model that should be ({found})"
            )
        if is_folder:
            out.mkdir(exist_ok=True)
            for file in new.iterdir():
                file.replace(out / file.name)
        else:
            new.replace(out)
    if is_folder and tokenizer and tokenizer.name != "world":
        copy_tokenizer(Path(tokenizer.name), out)
    sync_folder(out if is_folder else out.parent)
    return found


def _write_file(weights: Weights, path: Path) -> None:
    with atomic_write(path) as file:
        if path.suffix == ".pth":
            torch.save(weights, file)
        else:
            from safetensors.torch import save_file

            save_file(weights, file.name)


@torch.no_grad()
def parity(original: RWKV7, meant: RWKV7, written: RWKV7) -> Parity:
    size = original.config.vocab_size
    tokens = torch.arange(CHECKED_TOKENS).mul(7919).remainder(size).unsqueeze(0)
    first, second, third = (model.float()(tokens)[0] for model in (original, meant, written))
    return Parity(
        written=float((second - third).abs().max()),
        rounding=float((first - third).abs().max()),
        agreement=float((first.argmax(-1) == third.argmax(-1)).float().mean()),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m src.inference.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write (with fla: folder)")
    parser.add_argument("--format", choices=FORMATS, default=None, help="default: by OUT's ending; without one, fla")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default=None, help="default: that of MODEL")
    parser.add_argument("--tokenizer", default="", help="to put beside it (fla); default: what the run recorded")
    options = parser.parse_args(argv)
    try:
        weights = find_weights(options.model)
        format = options.format or _format_of(options.out)
        if options.out.exists() and options.out.resolve() == weights.resolve():
            raise UserError(f"OUT {options.out}: is MODEL itself; name another file")
        if format != "fla" and options.out.is_dir():
            raise UserError(
                f"OUT {options.out}: is a folder; --format {format} writes one file, for example {options.out / f'model.{format}'}"
            )
        if format != "fla" and options.out.suffix != f".{format}":  # files are read by their ending
            raise UserError(
                f"OUT {options.out}: --format {format} writes a file that ends in .{format}; name it {options.out}.{format}"
            )
        tokenizer = _tokenizer(weights, options.tokenizer) if format == "fla" else None
        found = export(weights, options.out, format, DTYPES[options.dtype] if options.dtype else None, tokenizer)
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(2 if isinstance(error, ValueError) else 1, f"{parser.prog}: {error}\n")
    print(f"wrote {options.out} ({format}) from {weights}\n{found}")
    return 0


def _format_of(out: Path) -> str:
    endings = {".pth": "pth", ".safetensors": "safetensors", "": "fla"}
    if out.suffix not in endings:
        raise UserError(f"OUT {out}: expected an ending .pth or .safetensors, none for a folder, or --format")
    return endings[out.suffix]


def _tokenizer(weights: Path, given: str) -> Tokenizer | None:
    try:
        return find_tokenizer(weights, sys.maxsize, given)
    except ValueError as error:
        if given:
            raise
        print(f"note: no tokenizer is put beside the weights ({error})")
        return None


if __name__ == "__main__":
    sys.exit(main())

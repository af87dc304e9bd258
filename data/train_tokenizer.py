"""Trains a tokenizer on your own text, in any language: a Hugging Face folder for --tokenizer, with a chat template.

    python data/train_tokenizer.py FILE.jsonl --out data/my_tokenizer --vocab_size 8000

The tokenizer is byte-level BPE, so it can encode any text. Id 0, <|endoftext|>, ends documents; the chat template is
ChatML.
"""

import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

# For `python data/...`: Python puts this folder on the path, and `src` is in the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from src.dataset.corpus.bpe import MIN_VOCAB_SIZE, SPECIAL_TOKENS, train_bpe
from src.dataset.corpus.command_line import add_field, create_parser, exit_on_user_error
from src.dataset.corpus.documents import read_documents
from src.dataset.corpus.text_input import ENDINGS, check_inputs, read_pieces
from src.errors import UserError
from src.terminal import show


def read_texts(path: str, field: str, max_bytes: float) -> Iterator[str]:
    """The documents of a file, without invalid lines, until they exceed `max_bytes`."""
    n_bytes = 0
    for piece in read_pieces([path], field):
        for _, text in read_documents(piece, field):
            # Invalid lines are make_data's to report; they don't matter for the choice of tokens.
            if isinstance(text, str):
                n_bytes += len(text.encode())
                yield text
            if n_bytes >= max_bytes:
                return


def main(arguments: list[str] | None = None) -> None:
    parser = create_parser(__doc__)
    parser.add_argument("inputs", nargs="+", metavar="FILE", help=f"{' '.join(ENDINGS)}, as for make_data.py")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder for the tokenizer")
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=8000,
        help="entries; more make texts shorter and the model larger [%(default)s]",
    )
    add_field(parser)
    parser.add_argument(
        "--megabytes",
        type=float,
        default=200.0,
        help="amount of text to read, the same from the beginning of each file; more takes longer and changes little "
        "[%(default)s]",
    )
    args = parser.parse_args(arguments)
    with exit_on_user_error(parser):
        if args.vocab_size < MIN_VOCAB_SIZE:
            expected = f"at least {MIN_VOCAB_SIZE}, for 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
            raise UserError(flag="vocab_size", given=args.vocab_size, expected=expected)
        if args.megabytes <= 0:
            raise UserError(flag="megabytes", given=args.megabytes, expected="more than 0")
        # Replacing it would make models that were trained with it unusable.
        if (args.out / "tokenizer.json").exists():
            raise UserError("already contains a tokenizer", flag="out", given=args.out, advice="use another folder")
        try:
            check_inputs(args.inputs)
            # An equal share of each file, so that later files are represented too.
            max_bytes = args.megabytes * 1e6 / len(args.inputs)
            texts = (text for path in args.inputs for text in read_texts(path, args.field, max_bytes))
            # Reads the first document here, because training on no text would succeed with a tokenizer of bytes.
            first = next(texts, None)
            if first is None:
                raise UserError(
                    "no text", given=" ".join(args.inputs), expected=f'lines like {{"{args.field}": "..."}}'
                )
            progress = tqdm(chain([first], texts), desc="reading", unit=" documents", unit_scale=True)
            n_entries = train_bpe(progress, args.out, args.vocab_size)
        except OSError as error:
            sys.exit(f"{parser.prog}: {error.filename or args.out}: {error.strerror}")
    # Training with a larger --vocab_size would only add unused rows to the model.
    if n_entries < args.vocab_size:
        print(f"note: {n_entries} entries: the text is too short for {args.vocab_size}")
    show(f"--tokenizer {args.out}")


if __name__ == "__main__":
    main()

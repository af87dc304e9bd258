"""Describes a token file: python data/inspect_data.py DATA

Prints the number of documents and tokens, the range of ids, the distribution of document lengths, and windows as text.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

# For `python data/...`: Python puts this folder on the path, and `src` is in the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from src.dataset import MMapIndexedDataset
from src.dataset.binidx import file_prefix, with_ending
from src.dataset.corpus.command_line import add_tokenizer, create_parser, exit_on_user_error
from src.dataset.tokenizer import load_tokenizer
from src.errors import UserError
from src.terminal import show

BLOCK = 1 << 24  # tokens read at once, because a file may be larger than memory
BAR_WIDTH = 40  # characters


def histogram(sizes: np.ndarray) -> Iterator[str]:
    """The number of documents with a length of 1, 2-3, 4-7, ...: one line each, with a bar."""
    exponents = np.frexp(sizes)[1]  # n for sizes 2^(n-1) .. 2^n - 1, and 0 for 0
    counts = np.bincount(exponents)
    for exponent in range(int(exponents.min()), len(counts)):
        low, high = (1 << exponent) >> 1, max(0, (1 << exponent) - 1)
        # Rounded up, so that a single document is visible.
        bar = "#" * -(-BAR_WIDTH * int(counts[exponent]) // int(counts.max()))
        yield f"{low:>11} - {high:<11}{counts[exponent]:>11}  {bar}"


def id_range(data: MMapIndexedDataset) -> tuple[int, int]:
    """The smallest and the largest token id."""
    starts = range(0, data.n_tokens, BLOCK)
    return (
        min(int(data.tokens[start : start + BLOCK].min()) for start in starts),
        max(int(data.tokens[start : start + BLOCK].max()) for start in starts),
    )


def count_unterminated(data: MMapIndexedDataset, bounds: np.ndarray) -> int:
    """The number of documents that do not end with token 0; `bounds` are their first tokens and the end."""
    last = bounds[1:][np.diff(bounds) > 0] - 1
    terminated = sum(int((data.tokens[last[i : i + BLOCK]] == 0).sum()) for i in range(0, len(last), BLOCK))
    return len(bounds) - 1 - terminated


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("data", help="X, X.bin or X.idx")
    add_tokenizer(parser)
    parser.add_argument("--windows", type=int, default=3, help="number of windows to show [3]")
    parser.add_argument("--ctx_len", type=int, default=64, help="tokens per window [64]")
    args = parser.parse_args()
    with exit_on_user_error(parser):
        # A folder next to the dataset of its name is no mistake: data/demo/ and data/demo.bin.
        if Path(args.data).is_dir() and not with_ending(file_prefix(args.data), ".idx").exists():
            names = sorted(str(path.with_suffix("")) for path in Path(args.data).glob("*.idx"))
            advice = f"name a dataset in it, such as {names[0]} (one of {len(names)})" if names else "it has no X.idx"
            raise UserError("is a folder", given=args.data, advice=advice)
        data, tokenizer = MMapIndexedDataset(args.data), load_tokenizer(args.tokenizer)
        if data.n_tokens == 0:
            raise UserError("contains no tokens", given=data.bin_path)
        for warning in data.warnings:
            show(f"WARNING: {warning}", file=sys.stderr)
        low, high = id_range(data)
        if low < 0:
            raise UserError(
                "contains negative ids, like the cache of fine-tuning data (X.jsonl.sft)",
                given=data.bin_path,
                advice="for that, use data/token_count.py X.jsonl CTX_LEN --tokenizer FOLDER --preview",
            )
        bounds = np.concatenate([[0], np.cumsum(data.sizes, dtype=np.int64)])[data.doc_idx]
        lengths = np.diff(bounds)
        show(
            f"{data.bin_path}: {len(lengths)} documents, {data.n_tokens} tokens of type {data.dtype}, "
            f"ids {low} to {high}"
        )
        print(f"documents that do not end with token 0: {count_unterminated(data, bounds)}")
        print(f"length: mean {lengths.mean():.1f}, median {np.median(lengths):.0f}, longest {lengths.max()}")
        print("\n".join(histogram(lengths)))
        # After the numbers, which are right with any tokenizer.
        if high >= tokenizer.vocab_size:
            raise UserError(
                f"its largest id is {tokenizer.vocab_size - 1}, that of the data {high}",
                flag="tokenizer",
                given=tokenizer.name,
                expected="the tokenizer that created the data",
            )
        for number in range(args.windows):
            start = number * max(0, data.n_tokens - args.ctx_len) // max(1, args.windows - 1)
            show(f"token {start}: {tokenizer.decode(data.tokens[start : start + args.ctx_len].tolist())!r}")


if __name__ == "__main__":
    main()

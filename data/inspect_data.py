"""Looks into a token file: python data/inspect_data.py DATA

Prints documents, tokens, the range of ids, how long the documents are, and a few windows as text.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from src.dataset import MMapIndexedDataset
from src.dataset.tokenizer import load_tokenizer

AT_ONCE = 1 << 24  # tokens in memory
BAR = 40  # characters


def histogram(sizes: np.ndarray) -> Iterator[str]:
    """How many documents have a length of 1, 2-3, 4-7, ...: one line each, with a bar."""
    exponents = np.frexp(sizes)[1]  # 0 for 0, n for 2^(n-1) .. 2^n - 1
    counts = np.bincount(exponents)
    for exponent in range(int(exponents.min()), len(counts)):
        low, high = (1 << exponent) >> 1, max(0, (1 << exponent) - 1)
        bar = "#" * -(-BAR * int(counts[exponent]) // int(counts.max()))
        yield f"{low:>11} - {high:<11}{counts[exponent]:>11}  {bar}"


def id_range(data: MMapIndexedDataset) -> tuple[int, int]:
    starts = range(0, data.n_tokens, AT_ONCE)
    return (
        min(int(data.tokens[start : start + AT_ONCE].min()) for start in starts),
        max(int(data.tokens[start : start + AT_ONCE].max()) for start in starts),
    )


def without_end(data: MMapIndexedDataset, bounds: np.ndarray) -> int:
    """How many documents do not end with token 0."""
    last = bounds[1:][np.diff(bounds) > 0] - 1
    with_end = sum(int((data.tokens[last[i : i + AT_ONCE]] == 0).sum()) for i in range(0, len(last), AT_ONCE))
    return len(bounds) - 1 - with_end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="X, X.bin or X.idx")
    parser.add_argument("--tokenizer", default="world", help="world, or a Hugging Face tokenizer folder [world]")
    parser.add_argument("--windows", type=int, default=3, help="how many windows to show [3]")
    parser.add_argument("--ctx_len", type=int, default=64, help="tokens per window [64]")
    args = parser.parse_args()
    try:
        data, tokenizer = MMapIndexedDataset(args.data), load_tokenizer(args.tokenizer)
        if data.n_tokens == 0:
            raise ValueError(f"{data.bin_path} holds no tokens.")
    except ValueError as error:
        parser.error(str(error))
    low, high = id_range(data)
    if low < 0:
        parser.error(
            f"{data.bin_path} holds negative ids, as the cache of fine-tuning data (X.jsonl.sft) does for tokens that don't count. Look "
            "into the X.jsonl that it was made from: python data/token_count.py X.jsonl CTX_LEN --tokenizer FOLDER --preview"
        )
    bounds = np.concatenate([[0], np.cumsum(data.sizes, dtype=np.int64)])[data.doc_idx]
    lengths = np.diff(bounds)
    print(
        f"{data.bin_path}: {len(lengths)} documents, {data.n_tokens} tokens of type {data.dtype}, ids {low} to {high}"
    )
    print(f"documents that do not end with token 0: {without_end(data, bounds)}")
    print(f"length: mean {lengths.mean():.1f}, median {np.median(lengths):.0f}, longest {lengths.max()}")
    print("\n".join(histogram(lengths)))
    if high >= tokenizer.vocab_size:
        parser.error(
            f"--tokenizer {tokenizer.name} has ids up to {tokenizer.vocab_size - 1}: another one made this data."
        )
    for number in range(args.windows):
        at = number * max(0, data.n_tokens - args.ctx_len) // max(1, args.windows - 1)
        print(f"token {at}: {tokenizer.decode(data.tokens[at : at + args.ctx_len].tolist())!r}")


if __name__ == "__main__":
    main()

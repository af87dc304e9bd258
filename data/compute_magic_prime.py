"""Prints the flags for one pass over an existing dataset: python data/compute_magic_prime.py DATA CTX_LEN"""

import sys
from pathlib import Path

# For `python data/...`: Python puts this folder on the path, and `src` is in the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src.dataset import MMapIndexedDataset, magic_prime
from src.dataset.corpus.command_line import create_parser, exit_on_user_error
from src.terminal import show


def format_flags(tokens: int, ctx_len: int) -> str:
    return f"--my_exit_tokens {tokens} --magic_prime {magic_prime(tokens, ctx_len)} --ctx_len {ctx_len}"


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("data", help="X, X.bin or X.idx")
    parser.add_argument("ctx_len", type=int, help="tokens per window, as for training")
    args = parser.parse_args()
    with exit_on_user_error(parser):
        data = MMapIndexedDataset(args.data)
        for warning in data.warnings:
            show(f"WARNING: {warning}", file=sys.stderr)
        flags = format_flags(data.n_tokens, args.ctx_len)
    print(f"{len(data)} documents, {data.n_tokens} tokens of type {data.dtype}")
    # Last, so that scripts can take it with `tail -n 1`.
    print(flags)


if __name__ == "__main__":
    main()

"""Prints the flags that go once through an existing dataset: python data/compute_magic_prime.py DATA CTX_LEN"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src.dataset import MMapIndexedDataset, magic_prime


def flags_line(tokens: int, ctx_len: int) -> str:
    return f"--my_exit_tokens {tokens} --magic_prime {magic_prime(tokens, ctx_len)} --ctx_len {ctx_len}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="X, X.bin or X.idx")
    parser.add_argument("ctx_len", type=int, help="tokens per window, as for training")
    args = parser.parse_args()
    try:
        data = MMapIndexedDataset(args.data)
        line = flags_line(data.n_tokens, args.ctx_len)
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(data)} documents, {data.n_tokens} tokens of type {data.dtype}")
    print(line)


if __name__ == "__main__":
    main()

"""Counts a file of conversations: python data/token_count.py FILE.jsonl CTX_LEN --tokenizer FOLDER

Rendered tokens, answer tokens (those that count for the loss), turns, what CTX_LEN would cut, how well rows are filled.
The tokens are kept beside the file, where training finds them.
"""

import argparse
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

COUNTS, CONTEXT, RESET = "\033[1;32m", "\033[2m", "\033[0m"


def colored(ids: np.ndarray, counts: np.ndarray, decode: Callable[[list[int]], str]) -> str:
    """A conversation with what counts in green and the rest dim."""
    changes = [0, *(np.flatnonzero(np.diff(counts)) + 1).tolist(), len(ids)]
    parts = []
    for begin, end in pairwise(changes):
        parts.append((COUNTS if counts[begin] else CONTEXT) + decode(ids[begin:end].tolist()) + RESET)
    return "".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="FILE", help='.jsonl, .jsonl.gz or .jsonl.zst of {"conversations": [...]}')
    parser.add_argument("ctx_len", type=int, metavar="CTX_LEN", help="positions of a row, as for training")
    parser.add_argument("--tokenizer", required=True, help="a Hugging Face tokenizer folder with a chat template")
    parser.add_argument(
        "--preview", type=int, nargs="?", const=0, metavar="N", help="show conversation N [0] in colour"
    )
    args = parser.parse_args(arguments)

    from src.dataset.sft import SftRows
    from src.dataset.sft_cache import chat_tokenizer, open_conversations

    try:
        tokenizer = chat_tokenizer(args.tokenizer)
        conversations = open_conversations(args.data, args.tokenizer)
        count, tokens = len(conversations.data), conversations.data.n_tokens
        if args.preview is not None:
            if not 0 <= args.preview < count:
                raise ValueError(f"--preview {args.preview}: the file has the conversations 0 to {count - 1}.")
            print(colored(*conversations.read(args.preview), tokenizer.decode))
        rows, padded = SftRows(conversations, args.ctx_len), SftRows(conversations, args.ctx_len, packing=False)
    except ValueError as error:
        parser.error(str(error))
    sizes = conversations.data.sizes
    left_out = ", ".join(f"{n} with {reason}" for reason, n in conversations.left_out.items()) or "none"
    too_long = int((sizes > args.ctx_len + 1).sum())
    print(f"conversations   {count} (lines left out: {left_out})")
    print(f"turns           {conversations.turns}, {conversations.turns / count:.2f} a conversation")
    print(f"tokens          {tokens}, mean {tokens / count:.0f}, median {np.median(sizes):.0f}, longest {sizes.max()}")
    print(f"answer tokens   {conversations.answer_tokens}, {100 * conversations.answer_tokens / tokens:.1f} % of them")
    print(f"longer than {args.ctx_len:<5}{too_long}, {100 * too_long / count:.1f} %")
    print(
        f"rows            {len(rows)} packed, {100 * rows.filled:.1f} % filled; without packing {len(padded)}, {100 * padded.filled:.1f} %"
    )
    print(f"once through: --my_exit_tokens {len(rows) * args.ctx_len} --ctx_len {args.ctx_len}")


if __name__ == "__main__":
    main()

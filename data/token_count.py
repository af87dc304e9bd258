"""Counts the tokens of a file of conversations: python data/token_count.py FILE CTX_LEN --tokenizer FOLDER

Prints rendered tokens, answer tokens (those with a loss), turns, what CTX_LEN would truncate, and how well rows are
filled. The tokens are cached next to the file, where training uses them.
"""

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

# For `python data/...`: Python puts this folder on the path, and `src` is in the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from src.dataset.control_tokens import parses_special_tokens
from src.dataset.corpus.command_line import add_special_tokens, add_think, create_parser, exit_on_user_error
from src.errors import UserError
from src.terminal import printable, show

ANSWER_COLOR, CONTEXT_COLOR, RESET = "\033[1;32m", "\033[2m", "\033[0m"  # ANSI: bold green, dim


def colored(ids: np.ndarray, is_answer: np.ndarray, decode: Callable[[list[int]], str]) -> str:
    """A conversation with answer tokens in green and all others dim."""
    # Decoded span by span: a single token may be part of a character.
    bounds = [0, *(np.flatnonzero(np.diff(is_answer)) + 1).tolist(), len(ids)]
    spans = []
    for begin, end in pairwise(bounds):
        color = ANSWER_COLOR if is_answer[begin] else CONTEXT_COLOR
        spans.append(color + printable(decode(ids[begin:end].tolist())) + RESET)
    return "".join(spans)


def main(arguments: list[str] | None = None) -> None:
    parser = create_parser(__doc__)
    parser.add_argument("data", metavar="FILE", help=".jsonl, .json (also .gz, .zst) or .parquet")
    parser.add_argument("ctx_len", type=int, metavar="CTX_LEN", help="positions per row, as for training")
    parser.add_argument("--tokenizer", required=True, help="world, or a tokenizer folder with a chat template")
    parser.add_argument("--preview", type=int, nargs="?", const=0, metavar="N", help="show conversation N [0] in color")
    add_special_tokens(parser)
    add_think(parser)
    args = parser.parse_args(arguments)

    # After the command line is parsed: torch takes seconds to import.
    from src.dataset.encode_conversation import chat_tokenizer
    from src.dataset.sft import SftRows
    from src.dataset.sft_cache import open_conversations
    from src.dataset.unusable_lines import unusable_warning

    with exit_on_user_error(parser):
        tokenizer = chat_tokenizer(args.tokenizer, args.think)
        parse_special = parses_special_tokens(args.special_tokens)
        conversations = open_conversations(args.data, args.tokenizer, parse_special=parse_special, think=args.think)
        count, tokens = len(conversations.data), conversations.data.n_tokens
        if args.preview is not None:
            if not 0 <= args.preview < count:
                raise UserError(flag="preview", given=args.preview, expected=f"a conversation from 0 to {count - 1}")
            print(colored(*conversations.read(args.preview), tokenizer.decode))
        rows, padded = SftRows(conversations, args.ctx_len), SftRows(conversations, args.ctx_len, packing=False)
    sizes = conversations.data.sizes
    left_out = ", ".join(f"{n} with {reason}" for reason, n in conversations.left_out.items()) or "none"
    # A conversation of n tokens takes n - 1 positions.
    too_long = int((sizes > args.ctx_len + 1).sum())
    show(f"conversations   {count} (lines left out: {left_out})")
    if conversations.unused:
        show("not used        " + ", ".join(f"{kind}: {n}" for kind, n in conversations.unused.items()))
    print(f"turns           {conversations.turns}, {conversations.turns / count:.2f} per conversation")
    print(f"tokens          {tokens}, mean {tokens / count:.0f}, median {np.median(sizes):.0f}, longest {sizes.max()}")
    print(f"answer tokens   {conversations.answer_tokens}, {100 * conversations.answer_tokens / tokens:.1f} % of them")
    print(f"longer than {args.ctx_len:<5}{too_long}, {100 * too_long / count:.1f} %")
    print(
        f"rows            {len(rows)} packed, {100 * rows.filled:.1f} % filled; "
        f"without packing {len(padded)}, {100 * padded.filled:.1f} %"
    )
    if warning := unusable_warning(conversations.left_out, count):
        show(warning)
    print(f"one epoch: --my_exit_tokens {len(rows) * args.ctx_len} --ctx_len {args.ctx_len}")


if __name__ == "__main__":
    main()

"""Text to tokens for pretraining: python data/make_data.py FILE.jsonl N_EPOCH CTX_LEN

Tokenizes the {"text": ...} lines, ends every document with token 0, shuffles them N_EPOCH times, each time differently,
and writes FILE.bin/.idx. The last line of its output has the flags for train.py. The result depends only on the input,
the tokenizer, N_EPOCH and --seed. The files appear under their names when they are complete; after an interruption, the
same command starts over and removes what the first one left. The input may be larger than memory; a single document
must fit (about 60 bytes per token).
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

# For `python data/...`: Python puts this folder on the path, and `src` is in the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from src.dataset import BinIdxWriter, MMapIndexedDataset, magic_prime
from src.dataset.binidx import token_dtype, with_ending
from src.dataset.control_tokens import parses_special_tokens
from src.dataset.corpus.command_line import (
    add_field,
    add_special_tokens,
    add_tokenizer,
    create_parser,
    exit_on_user_error,
)
from src.dataset.corpus.external_shuffle import ExternalShuffle
from src.dataset.corpus.text_input import ENDINGS, STDIN, check_inputs, read_pieces
from src.dataset.corpus.tokenization import InvalidLineReport, cached_tokenizer, split, tokenize_piece
from src.dataset.hashing import splitmix64
from src.dataset.tokenizer import Tokenizer
from src.dataset.workers import map_in_order, usable_cores
from src.errors import UserError
from src.files import file_lock

PREVIEW_TOKENS = 60
MAX_WORKERS_PER_CORE = 8  # a typing error in --workers must not fill the memory with processes


@contextmanager
def temporary_folder(prefix: Path) -> Iterator[Path]:
    """An empty folder next to the output, deleted at the end, used by one process at a time."""
    lock = with_ending(prefix, ".making.lock")
    try:
        with file_lock(lock, wait=False):
            folder = with_ending(prefix, ".making")
            shutil.rmtree(folder, ignore_errors=True)  # left by a killed process
            folder.mkdir(parents=True)
            try:
                yield folder
            finally:
                shutil.rmtree(folder)
                lock.unlink()  # while it is held: `file_lock` notices that the file of its name is another one
    except BlockingIOError as error:
        raise UserError(
            "another make_data is writing this file",
            given=with_ending(prefix, ".bin"),
            advice="wait, or use another --out",
        ) from error


def write_dataset(shuffle: ExternalShuffle, prefix: Path, dtype: np.dtype, n_epoch: int) -> None:
    total = shuffle.n_tokens * n_epoch
    progress = tqdm(total=total, desc=f"writing {prefix.name}", unit="token", unit_scale=True)
    with BinIdxWriter(prefix, dtype) as out, progress:
        for tokens, sizes in shuffle.shuffled():
            out.add_bytes(tokens, sizes)
            progress.update(len(tokens) // dtype.itemsize)


def build_dataset(args: argparse.Namespace, prefix: Path, heldout: Path, tokenizer: Tokenizer) -> InvalidLineReport:
    """Reads, tokenizes and shuffles the inputs; writes `prefix` and, with --holdout, `heldout`."""
    dtype = token_dtype(tokenizer.vocab_size)
    if tokenizer.text_of_0:
        print(
            f"note: id 0, which ends each document, is the text {tokenizer.text_of_0!r} in this tokenizer: "
            "the model can't distinguish the two"
        )
    # A document is held out when its 64-bit hash is below this.
    threshold = np.uint64(int(args.holdout * 2**64))
    report = InvalidLineReport(stop=args.on_error == "stop")
    total = check_inputs(args.inputs)  # before anything is written
    tokenize = partial(
        tokenize_piece,
        tokenizer_name=args.tokenizer,
        field=args.field,
        parse_special=parses_special_tokens(args.special_tokens),
    )
    progress = tqdm(total=total or None, desc="tokenizing", unit="B", unit_scale=True)
    with temporary_folder(prefix) as folder, progress:
        train = ExternalShuffle(folder, "train", dtype.itemsize, args.n_epoch, args.seed)
        held_out = ExternalShuffle(folder, "heldout", dtype.itemsize, 1, args.seed)
        for part in map_in_order(tokenize, read_pieces(args.inputs, args.field), args.workers):
            report.add(part.invalid)
            if threshold:
                # By a hash of the text, so that all copies of a document are on the same side.
                selected = splitmix64(part.digests, args.seed, "holdout") < threshold
                held_out_part, part = split(part, selected, dtype.itemsize)
                held_out.add(held_out_part.tokens, held_out_part.sizes, held_out_part.ordinals)
            train.add(part.tokens, part.sizes, part.ordinals)
            progress.set_postfix_str(f"{train.n_tokens + held_out.n_tokens:,} tokens", refresh=False)
            progress.update(part.end - progress.n if total else 0)
        progress.close()
        for shuffle, name in ((train, "documents"), (held_out, "held-out documents")):
            if not shuffle.n_documents and (threshold or shuffle is train):
                raise UserError(f"no {name}; {report.summary()}", given=" ".join(args.inputs))
        if threshold:
            # First, so that an interruption leaves no held-out data of an earlier call: the new training data may
            # contain its documents.
            with_ending(heldout, ".idx").unlink(missing_ok=True)
        elif with_ending(heldout, ".idx").exists():
            print(
                f"note: {heldout}.bin exists from before; if an earlier --holdout wrote it, {prefix}.bin now contains "
                "its documents"
            )
        write_dataset(train, prefix, dtype, args.n_epoch)
        if threshold:
            write_dataset(held_out, heldout, dtype, 1)
    return report


def preview(data: MMapIndexedDataset, number: int, tokenizer: Tokenizer) -> str:
    ids = data[number].tolist()
    ellipsis = " ..." if len(ids) > PREVIEW_TOKENS else ""
    return f"document {number}, {len(ids)} tokens: {tokenizer.decode(ids[:PREVIEW_TOKENS])!r}{ellipsis}"


def build_parser() -> argparse.ArgumentParser:
    parser = create_parser(__doc__)
    parser.add_argument(
        "inputs", nargs="+", metavar="FILE", help=f"{' '.join(ENDINGS)}, or - for JSON lines from standard input"
    )
    parser.add_argument("n_epoch", type=int, metavar="N_EPOCH", help="number of shuffled copies of the documents")
    parser.add_argument("ctx_len", type=int, metavar="CTX_LEN", help="tokens per window, for the flags in the output")
    add_tokenizer(parser)
    parser.add_argument("--out", help="output name without .bin [the name of the first input without its ending]")
    add_field(parser)
    add_special_tokens(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of documents [0]")
    parser.add_argument(
        "--holdout",
        type=float,
        default=0.0,
        help="share of the documents written to OUT-heldout.bin instead, for example 0.01 [0]",
    )
    parser.add_argument(
        "--workers", type=int, default=usable_cores(), help="processes [number of cores; here %(default)s]"
    )
    parser.add_argument(
        "--on_error", choices=["skip", "stop"], default="skip", help="what to do at an invalid line [skip]"
    )
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for the first value out of range."""
    for name in ("n_epoch", "ctx_len"):
        if getattr(args, name) < 1:
            raise UserError(given=f"{name.upper()} {getattr(args, name)}", expected="at least 1")
    max_workers = MAX_WORKERS_PER_CORE * usable_cores()
    if not 1 <= args.workers <= max_workers:
        expected = f"1 to {max_workers}, {MAX_WORKERS_PER_CORE} for each of {usable_cores()} cores"
        raise UserError(flag="workers", given=args.workers, expected=expected)
    if not 0 <= args.holdout < 1:
        raise UserError(flag="holdout", given=args.holdout, expected="a share from 0 to below 1, for example 0.01")
    if args.out is None and args.inputs[0] == STDIN:
        raise UserError(flag="out", expected="a name, because the text comes from standard input")
    if not output_prefix(args).name:
        check_inputs(args.inputs)  # "." is a folder as an input, too
        raise UserError("is a folder", flag="out", given=args.out, expected="the name of a file")


def output_prefix(args: argparse.Namespace) -> Path:
    """The output path without .bin: --out, or the first input without its ending."""
    name = args.out or args.inputs[0]
    # Longest ending first, so that .jsonl.gz is removed as a whole.
    for ending in (".bin", ".idx") if args.out else sorted(ENDINGS, key=len, reverse=True):
        if name.lower().endswith(ending):
            return Path(name[: -len(ending)])
    return Path(name)


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(arguments)
    with exit_on_user_error(parser):
        check_arguments(args)
        prefix = output_prefix(args)
        heldout = with_ending(prefix, "-heldout")
        try:
            tokenizer = cached_tokenizer(args.tokenizer)
            tokenizer.decode_bytes([])  # builds the decoding table before the workers are forked, which then share it
            report = build_dataset(args, prefix, heldout, tokenizer)
        except OSError as error:
            sys.exit(f"{parser.prog}: {error.filename or prefix}: {error.strerror}; {prefix}.bin was not written")
        except KeyboardInterrupt:
            sys.exit(f"interrupted; {prefix}.bin was not written")
        # Read back from disk: what is shown is what training will read.
        data = MMapIndexedDataset(prefix)
        for number in (0, len(data) - 1):
            print(preview(data, number, tokenizer))
        print(report.summary())
        if args.holdout:
            held_out = MMapIndexedDataset(heldout)
            print(f"{held_out.bin_path}: {len(held_out)} documents, {held_out.n_tokens} tokens")
        print(f"{data.bin_path}: {len(data)} documents, {data.n_tokens} tokens of type {data.dtype}")
        try:
            prime = magic_prime(data.n_tokens, args.ctx_len)
        except UserError as error:
            error.problem += f" ({data.bin_path} is complete all the same)"
            raise
    # Last, so that scripts can take it with `tail -n 1`.
    print(f"--my_exit_tokens {data.n_tokens} --magic_prime {prime} --ctx_len {args.ctx_len}")


if __name__ == "__main__":
    main()

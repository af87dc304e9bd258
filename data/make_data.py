"""Text to tokens for pretraining: python data/make_data.py FILE.jsonl N_EPOCH CTX_LEN

Tokenises the {"text": ...} lines, ends every document with token 0, shuffles them N_EPOCH times, each time differently,
and writes FILE.bin/.idx. The last line it prints are the flags for train.py. The result depends on the input, the
tokenizer, N_EPOCH and --seed only. It appears under its name when it is whole; after a kill, the same call starts anew
and takes away what was left. The input may be larger than memory, one document may not (about 60 bytes a token).
"""

import argparse
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from src.dataset import BinIdxWriter, MMapIndexedDataset, magic_prime
from src.dataset.binidx import token_dtype, with_ending
from src.dataset.documents import Broken, broken, read_documents
from src.dataset.external_shuffle import ExternalShuffle, scramble
from src.dataset.text_input import ENDINGS, STDIN, Piece, check_inputs, read_pieces
from src.dataset.tokenizer import Tokenizer, load_tokenizer
from src.dataset.workers import map_in_order, usable_cores
from src.files import file_lock

SHOWN_BROKEN = 5
PREVIEW_TOKENS = 60
MOST_WORKERS = 8  # for each core: a slip of the finger must not take all memory


class Tokenised(NamedTuple):
    """The documents of one piece of the input."""

    tokens: bytes
    sizes: npt.NDArray[np.int32]
    ordinals: npt.NDArray[np.uint64]  # line numbers over all inputs
    digests: npt.NDArray[np.uint64]  # of the texts
    broken: list[Broken]
    end: int  # bytes of input read


load_once = lru_cache(1)(load_tokenizer)  # forked workers find it loaded


def tokenise(piece: Piece, tokenizer_name: str, field: str) -> Tokenised:
    """Runs in the workers: encodes the texts of a piece and checks that the ids give each text back."""
    tokenizer = load_once(tokenizer_name)
    dtype = token_dtype(tokenizer.vocab_size).newbyteorder("<")
    parts, sizes, ordinals, digests, faults = [], [], [], [], []
    texts: dict[int, str] = {}
    for index, text in read_documents(piece, field):
        if isinstance(text, Broken):
            faults.append((index, text))
        else:
            texts[index] = text
    for (index, text), ids in zip(texts.items(), tokenizer.encode_batch(list(texts.values())), strict=True):
        data = text.encode()
        if tokenizer.decode_bytes(ids) != data:
            faults.append((index, broken(piece, index, "tokens that do not give the text back", text)))
            continue
        ids.append(0)
        parts.append(np.array(ids, dtype).tobytes())
        sizes.append(len(ids))
        ordinals.append(piece.ordinal + index)
        digests.append(zlib.crc32(data))
    return Tokenised(
        b"".join(parts),
        np.array(sizes, np.int32),
        np.array(ordinals, np.uint64),
        np.array(digests, np.uint64),
        [fault for _, fault in sorted(faults)],
        piece.end,
    )


class BrokenLines:
    """Counts what gave no document; the first of them is fatal when `fatal`."""

    def __init__(self, fatal: bool) -> None:
        self._fatal = fatal
        self._reasons: Counter[str] = Counter()

    def report(self, faults: list[Broken]) -> None:
        for fault in faults:
            if self._fatal:
                raise ValueError(f"{fault} (--on_error skip counts and leaves out such lines)")
            self._reasons[fault.reason] += 1
            if self._reasons.total() <= SHOWN_BROKEN:
                tqdm.write(f"left out: {fault}", file=sys.stderr)

    def summary(self) -> str:
        by_reason = ", ".join(f"{count} with {reason}" for reason, count in self._reasons.most_common())
        return f"{self._reasons.total()} lines left out{': ' if by_reason else ''}{by_reason}"


def split(part: Tokenised, chosen: npt.NDArray[np.bool_], itemsize: int) -> tuple[Tokenised, Tokenised]:
    """The documents that are chosen, and the others."""
    ends = np.cumsum(part.sizes, dtype=np.int64) * itemsize
    halves = []
    for of_half in (chosen, ~chosen):
        where = np.flatnonzero(of_half)
        tokens = b"".join(part.tokens[ends[i] - part.sizes[i] * itemsize : ends[i]] for i in where)
        halves.append(part._replace(tokens=tokens, sizes=part.sizes[where], ordinals=part.ordinals[where]))
    return halves[0], halves[1]


@contextmanager
def work_folder(prefix: Path) -> Iterator[Path]:
    """A folder beside the output, empty at first and gone at the end, for one process at a time."""
    lock = with_ending(prefix, ".making.lock")
    try:
        with file_lock(lock, wait=False):
            folder = with_ending(prefix, ".making")
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
            folder.mkdir(parents=True)
            try:
                yield folder
            finally:
                shutil.rmtree(folder)
                lock.unlink()
    except BlockingIOError as error:
        raise ValueError(f"Another make_data is writing {prefix}.bin at the moment.") from error


def write(shuffle: ExternalShuffle, prefix: Path, dtype: np.dtype, n_epoch: int) -> None:
    total = shuffle.n_tokens * n_epoch
    bar = tqdm(total=total, desc=f"writing {prefix.name}", unit="token", unit_scale=True)
    with BinIdxWriter(prefix, dtype) as out, bar:
        for tokens, sizes in shuffle.shuffled():
            out.add_bytes(tokens, sizes)
            bar.update(len(tokens) // dtype.itemsize)


def make(args: argparse.Namespace, prefix: Path, heldout: Path, tokenizer: Tokenizer) -> BrokenLines:
    """Reads, tokenises and shuffles the inputs and writes `prefix` and, with --holdout, `heldout`."""
    dtype = token_dtype(tokenizer.vocab_size)
    if tokenizer.text_of_0:
        print(
            f"note: id 0, which ends each document, is the text {tokenizer.text_of_0!r} in this tokenizer: the model can't tell them apart"
        )
    limit = np.uint64(int(args.holdout * 2**64))
    lines = BrokenLines(args.on_error == "stop")
    total = check_inputs(args.inputs)
    work = partial(tokenise, tokenizer_name=args.tokenizer, field=args.field)
    bar = tqdm(total=total or None, desc="tokenising", unit="B", unit_scale=True)
    with work_folder(prefix) as folder, bar:
        train = ExternalShuffle(folder, "train", dtype.itemsize, args.n_epoch, args.seed)
        rest = ExternalShuffle(folder, "heldout", dtype.itemsize, 1, args.seed)
        for part in map_in_order(work, read_pieces(args.inputs, args.field), args.workers):
            lines.report(part.broken)
            if limit:
                # By the text's digest, so that equal documents are on one side.
                held, part = split(part, scramble(part.digests, args.seed, "holdout") < limit, dtype.itemsize)
                rest.add(held.tokens, held.sizes, held.ordinals)
            train.add(part.tokens, part.sizes, part.ordinals)
            bar.set_postfix_str(f"{train.n_tokens + rest.n_tokens:,} tokens", refresh=False)
            bar.update(part.end - bar.n if total else 0)
        bar.close()
        for shuffle, what in ((train, "documents"), (rest, "held-out documents")):
            if not shuffle.n_documents and (limit or shuffle is train):
                raise ValueError(f"There are no {what} in {' '.join(args.inputs)}; {lines.summary()}.")
        if limit:  # whoever is stopped between the two leaves no held-out data of an earlier call, which the new training data may hold
            with_ending(heldout, ".idx").unlink(missing_ok=True)
        elif with_ending(heldout, ".idx").exists():
            print(
                f"note: {heldout}.bin was there before; if an earlier --holdout made it, its documents are in {prefix}.bin now"
            )
        write(train, prefix, dtype, args.n_epoch)
        if limit:
            write(rest, heldout, dtype, 1)
    return lines


def preview(data: MMapIndexedDataset, number: int, tokenizer: Tokenizer) -> str:
    ids = data[number].tolist()
    more = " ..." if len(ids) > PREVIEW_TOKENS else ""
    return f"document {number}, {len(ids)} tokens: {tokenizer.decode(ids[:PREVIEW_TOKENS])!r}{more}"


def parse(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "inputs", nargs="+", metavar="FILE", help=f"{' '.join(ENDINGS)}, or - for JSON lines from stdin"
    )
    parser.add_argument("n_epoch", type=int, metavar="N_EPOCH", help="how often the documents are repeated, reshuffled")
    parser.add_argument("ctx_len", type=int, metavar="CTX_LEN", help="tokens per window, for the flags it prints")
    parser.add_argument("--tokenizer", default="world", help="world, or a Hugging Face tokenizer folder [world]")
    parser.add_argument("--out", help="name of the result without .bin [the first input's without its ending]")
    parser.add_argument("--field", default="text", help="the text's field or column [text]")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another order [0]")
    parser.add_argument(
        "--holdout",
        type=float,
        default=0.0,
        help="share of the documents that is kept aside in OUT-heldout.bin: 0.01 is one in a hundred [0]",
    )
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes [the cores; here %(default)s]")
    parser.add_argument("--on_error", choices=["skip", "stop"], default="skip", help="what a broken line does [skip]")
    args = parser.parse_args(arguments)
    if args.n_epoch < 1 or args.ctx_len < 1 or args.workers < 1:
        parser.error("N_EPOCH, CTX_LEN and --workers must be 1 or more.")
    if args.workers > MOST_WORKERS * usable_cores():
        parser.error(
            f"--workers {args.workers}: expected at most {MOST_WORKERS * usable_cores()}, {MOST_WORKERS} for each of {usable_cores()} cores."
        )
    if not 0 <= args.holdout < 1:
        parser.error(f"--holdout {args.holdout}: must be 0 or more and less than 1, as 0.01 for a hundredth.")
    if args.out is None and args.inputs[0] == STDIN:
        parser.error("--out NAME is needed when the text comes from standard input.")
    return parser, args


def output_prefix(args: argparse.Namespace) -> Path:
    name = args.out or args.inputs[0]
    for ending in (".bin", ".idx") if args.out else sorted(ENDINGS, key=len, reverse=True):
        if name.lower().endswith(ending):
            return Path(name[: -len(ending)])
    return Path(name)


def main(arguments: list[str] | None = None) -> None:
    parser, args = parse(arguments)
    prefix = output_prefix(args)
    if not prefix.name:
        parser.error(f"{args.out or args.inputs[0]}: a folder; expected a file name.")
    heldout = with_ending(prefix, "-heldout")
    try:
        tokenizer = load_once(args.tokenizer)
        tokenizer.decode_bytes([])  # reads what decoding needs before the workers are forked, so that they share it
        lines = make(args, prefix, heldout, tokenizer)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        sys.exit(f"{parser.prog}: {error.filename or prefix}: {error.strerror}; {prefix}.bin is not written.")
    except KeyboardInterrupt:
        sys.exit(f"Stopped; {prefix}.bin is not written.")
    data = MMapIndexedDataset(prefix)
    for number in (0, len(data) - 1):
        print(preview(data, number, tokenizer))
    print(lines.summary())
    if args.holdout:
        rest = MMapIndexedDataset(heldout)
        print(f"{rest.bin_path}: {len(rest)} documents, {rest.n_tokens} tokens")
    print(f"{data.bin_path}: {len(data)} documents, {data.n_tokens} tokens of type {data.dtype}")
    try:
        prime = magic_prime(data.n_tokens, args.ctx_len)
    except ValueError as error:
        parser.error(f"{data.bin_path} is written, but: {error}")
    print(f"--my_exit_tokens {data.n_tokens} --magic_prime {prime} --ctx_len {args.ctx_len}")


if __name__ == "__main__":
    main()

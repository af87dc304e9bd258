"""Measures how well a model predicts text that it wasn't trained on.

python -m src.inference.evaluate MODEL --data held-out[.bin | .txt | .jsonl]      loss, perplexity, bits per byte
python -m src.inference.evaluate MODEL --data D --by_position --ctx_len 8192      loss by position in the context
python -m src.inference.evaluate MODEL --data D --needle 256,4096                 a number in the text, asked for later
python -m src.inference.evaluate MODEL --last_word lambada.jsonl                  accuracy of predicting the last word
python -m src.inference.evaluate MODEL --answers conversations.jsonl              answers that are word for word right
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from src.dataset.binidx import MMapIndexedDataset, with_ending
from src.dataset.corpus.documents import EMPTY_LINE, EMPTY_TEXT, read_documents
from src.dataset.corpus.text_input import JSON_LINES, Piece, read_pieces
from src.dataset.needle import NeedleMaker
from src.dataset.tokenizer import Tokenizer
from src.errors import UserError
from src.inference.adaptation import NOTHING, Adaptation, model_name
from src.inference.answers import answers_report
from src.inference.arguments import adaptation_from, add_model_arguments, picture_from
from src.inference.last_words import MAX_EXPONENT, last_words
from src.inference.load import UnknownTokenizerError, find_model, find_tokenizer, load_model
from src.inference.needle import find_needles, needle_table
from src.inference.position_loss import PositionLoss, loss_by_position, position_table, write_by_position
from src.inference.scoring import LOGIT_ROWS
from src.inference.windows import Tokens, stack_windows, windows
from src.model import RWKV7
from src.terminal import prepare_output, show

BY_POSITION = "by_position.png"


@dataclass(frozen=True)
class HeldOutLoss:
    """`loss`: mean cross entropy in nats over `tokens` predicted tokens."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < MAX_EXPONENT else math.inf

    def bits_per_byte(self, n_bytes: int) -> float:
        """loss * tokens / (ln 2 * n_bytes), where the predicted text has `n_bytes`: comparable between tokenizers."""
        return self.loss * self.tokens / (math.log(2) * n_bytes) if n_bytes else math.nan


def heldout_loss(
    model: RWKV7,
    data: MMapIndexedDataset | Tokens,
    ctx_len: int,
    max_windows: int | None = None,
    micro_bsz: int = 8,
) -> HeldOutLoss:
    """Mean cross entropy over independent windows of `data` (binidx, or a flat array of ids), without gradients.

    The windows depend on the length of `data` only, and each starts from the model's initial state, as in training.
    Raises UserError for ids outside the model's vocabulary.
    """
    tokens = data.tokens if isinstance(data, MMapIndexedDataset) else data
    selected = list(windows(len(tokens), ctx_len, max_windows))
    total, count = 0.0, 0
    for first in range(0, len(selected), micro_bsz):
        batch = stack_windows(tokens, selected[first : first + micro_bsz], model.config.vocab_size)
        total += _summed_loss(model, batch)
        count += batch.shape[0] * (batch.shape[1] - 1)
    return HeldOutLoss(total / count, count)


@torch.no_grad()
def _summed_loss(model: RWKV7, batch: Tensor) -> float:
    """Summed cross entropy of batch[:, 1:], each token given those before it in its row; batch int64 [B, T+1]."""
    batch = batch.to(model.emb.weight.device)
    hidden, _ = model.hidden(batch[:, :-1])
    # Chunks of rows bound the memory of the logits; the sum over them is taken in float64.
    rows, targets = hidden.flatten(0, 1).split(LOGIT_ROWS), batch[:, 1:].flatten().split(LOGIT_ROWS)
    parts = [F.cross_entropy(model.head(x).float(), y, reduction="sum") for x, y in zip(rows, targets, strict=True)]
    return float(torch.stack(parts).cpu().double().sum())  # mps has no float64


def read_texts(path: Path, flag: str) -> Iterator[str]:
    """The documents of a file, empty ones left out: the "text" of each line of a .jsonl (.gz, .zst), or the whole file.

    Raises UserError with `flag` when the file can't be read, and with the line when one isn't valid.
    """
    name = str(path)
    try:
        # Read by the functions that prepare training data, so that equal files give equal tokens.
        is_json_lines = name.lower().endswith(JSON_LINES)
        for piece in read_pieces([name], "text") if is_json_lines else [Piece(name, 1, 0, [path.read_bytes()], 0)]:
            for _, text in read_documents(piece, "text"):
                if isinstance(text, str):
                    yield text
                elif text.reason not in (EMPTY_LINE, EMPTY_TEXT):
                    raise UserError(f"{text.reason}: {text.excerpt}", flag=flag, given=text.location)
    except OSError as error:
        raise UserError(
            f"can't be read ({error.strerror})", flag=flag, given=path, advice="check its permissions"
        ) from error


def encode_texts(texts: Iterable[str], tokenizer: Tokenizer) -> Tokens:
    """The ids of all texts, int64, each text followed by 0, as the end of a document is marked in training data."""
    return np.fromiter((token for text in texts for token in (*tokenizer.encode_as_text(text), 0)), np.int64)


def is_binidx(path: Path) -> bool:
    """Whether `--data` names token ids: any existing X.bin makes X binidx. Raises UserError when there is no file."""
    binidx = path.suffix in (".bin", ".idx") or with_ending(path, ".bin").is_file()
    if not binidx and not path.is_file():
        expected = "binidx data (X, X.bin), a text file or a .jsonl of texts"
        raise UserError("no such file", flag="data", given=path, expected=expected)
    return binidx


def read_tokens(path: Path, tokenizer: Tokenizer | None) -> Tokens:
    """The ids in binidx data, or those of a file of texts by `tokenizer`: of a .jsonl or of a single document.

    Raises UserError, about --data, when the file can't be read, or holds texts and there is no tokenizer.
    """
    if is_binidx(path):
        # Mapped, not read: only the selected windows are.
        dataset = MMapIndexedDataset(path)
        for warning in dataset.warnings:
            show(f"WARNING: {warning}", file=sys.stderr)
        return dataset.tokens
    if tokenizer is None:
        raise UserError("a file of texts", flag="data", given=path, advice="name the model's --tokenizer, too")
    return encode_texts(read_texts(path, "data"), tokenizer)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m src.inference.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    # Exclusive, as each is a measure of its own with its own kind of file.
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--last_word", help='.jsonl (.gz, .zst) of {"text": ...}: predict the last words (LAMBADA)')
    data.add_argument(
        "--data", help='held-out binidx (X, X.bin), text (.txt, .py, ...) or .jsonl (.gz, .zst) of {"text": ...}'
    )
    parser.add_argument(
        "--by_position", action="store_true", help="the loss of --data by position, and a picture of it"
    )
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="MODEL",
        help="another line in that picture, without --adapter and --state",
    )
    parser.add_argument("--picture", default=BY_POSITION, help=".png or .svg of --by_position [%(default)s]")
    parser.add_argument(
        "--needle", default="", metavar="N,...", help="share of numbers found N tokens of --data after they were named"
    )
    parser.add_argument("--needle_texts", type=int, default=20, help="texts for each of --needle [%(default)s]")
    data.add_argument("--answers", help="conversations, as for --data_type sft, with pictures or sounds too")
    parser.add_argument("--media_folder", default="", help="--answers: folder of the media; default: that of the file")
    parser.add_argument("--examples", default="", help="--answers: draw some media with their answers into this .png")
    parser.add_argument("--ctx_len", type=int, default=512, help="tokens per window [%(default)s]")
    parser.add_argument(
        "--max_windows", type=int, default=None, help="most windows or answers, evenly spaced; default: all"
    )
    parser.add_argument("--micro_bsz", type=int, default=8, help="windows per batch [%(default)s]")
    prepare_output()
    options = parser.parse_args(argv)
    try:
        for name in ("ctx_len", "max_windows", "micro_bsz", "needle_texts"):
            if getattr(options, name) is not None and getattr(options, name) < 1:
                raise UserError(flag=name, given=getattr(options, name), expected="at least 1")
        show(_report_of(options)(options))
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


def _report_of(options: argparse.Namespace) -> Callable[[argparse.Namespace], str]:
    """The measure that is asked for. Raises UserError for flags that would be ignored."""
    if options.by_position and options.needle:
        raise UserError("cannot be combined with --by_position", flag="needle", given=options.needle)
    for name, given in (("by_position", options.by_position), ("needle", options.needle)):
        if given and not options.data:
            raise UserError("needs --data", flag=name, advice="leave --last_word and --answers out")
    if options.compare and not options.by_position:
        raise UserError("needs --by_position", flag="compare", given=options.compare[0])
    for name in ("media_folder", "examples"):
        if getattr(options, name) and not options.answers:
            raise UserError("needs --answers", flag=name, given=getattr(options, name), advice="leave it out")
    if options.answers:
        return _answers_report
    if options.last_word:
        return _last_word_report
    return _by_position_report if options.by_position else _needle_report if options.needle else _loss_report


def _open(name: str, options: argparse.Namespace, given: Adaptation) -> tuple[str, RWKV7, Tokenizer | None]:
    """(name, model, its tokenizer, None where --data holds ids and none is found) of a MODEL with `given`."""
    weights, adaptation = find_model(name, given)
    model = load_model(weights, options.dtype, options.device, adaptation)
    try:
        tokenizer = find_tokenizer(weights, model.config.vocab_size, options.tokenizer, adaptation)
    except UnknownTokenizerError:
        # that holds ids: without a tokenizer only bits per byte are unknown
        if not is_binidx(Path(options.data)):
            raise
        tokenizer = None
    return model_name(weights, adaptation), model, tokenizer


def _by_position_report(options: argparse.Namespace) -> str:
    picture = picture_from(options, "picture")  # for its errors, before minutes of work
    results: list[tuple[str, PositionLoss]] = []
    # --adapter and --state are of MODEL: what it is compared with is often MODEL without them
    models = [(options.model, adaptation_from(options)), *((name, NOTHING) for name in options.compare)]
    for given, adaptation in models:
        name, model, tokenizer = _open(given, options, adaptation)
        tokens = read_tokens(Path(options.data), tokenizer)
        result = loss_by_position(model, tokens, options.ctx_len, options.max_windows, options.micro_bsz)
        results.append((name, result))
    table = position_table(results)
    write_by_position(results, picture)
    return f"{table}\n\nwrote {picture}"


def _needle_report(options: argparse.Namespace) -> str:
    parts = [part.strip() for part in options.needle.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(flag="needle", given=options.needle, expected="numbers of tokens, such as 256,4096")
    name, model, tokenizer = _open(options.model, options, adaptation_from(options))
    if tokenizer is None:
        raise UserError("the question is text", flag="needle", advice="name the model's --tokenizer, too")
    maker = NeedleMaker(read_tokens(Path(options.data), tokenizer), tokenizer.encode_as_text)
    results = find_needles(model, maker, [int(part) for part in parts], options.needle_texts)
    return f"{name}, {options.needle_texts} texts for each distance in tokens:\n{needle_table(results)}"


def _loss_report(options: argparse.Namespace) -> str:
    name, model, tokenizer = _open(options.model, options, adaptation_from(options))
    tokens = read_tokens(Path(options.data), tokenizer)
    result = heldout_loss(model, tokens, options.ctx_len, options.max_windows, options.micro_bsz)
    # Reported as an error, as a script that reads the loss would take "nan" for a result.
    if not math.isfinite(result.loss):
        raise UserError(
            f"its loss is {result.loss}",
            given=options.model,
            advice="the weights contain values that are not finite, or are too large for --dtype: try fp32",
        )
    # Of the text and not of the loss's tokens: a tokenizer with longer tokens has a higher loss for the same text.
    if tokenizer is None:
        bits = "bits per byte unknown without --tokenizer"
    else:
        selected = windows(len(tokens), options.ctx_len, options.max_windows)
        n_bytes = sum(text_bytes(tokens[window][1:], tokenizer) for window in selected)  # of the predicted tokens
        bits = f"bits per byte {result.bits_per_byte(n_bytes):.4f}"
    measures = f"loss {result.loss:.4f}, perplexity {result.perplexity:.4f}, {bits}"
    return f"{name} on {options.data}: {measures}, {result.tokens:,} tokens"


def _last_word_report(options: argparse.Namespace) -> str:
    weights, adaptation = find_model(options.model, adaptation_from(options))
    path = Path(options.last_word)
    if not path.is_file() or not path.name.lower().endswith(JSON_LINES):
        problem = "not a .jsonl file" if path.is_file() else "no such file"
        expected = 'a .jsonl (.gz, .zst) of {"text": ...}'
        raise UserError(problem, flag="last_word", given=path, expected=expected)
    model = load_model(weights, options.dtype, options.device, adaptation)
    tokenizer = find_tokenizer(weights, model.config.vocab_size, options.tokenizer, adaptation)
    result = last_words(model, tokenizer, read_texts(path, "last_word"))
    measures = f"accuracy {result.accuracy:.4f}, perplexity {result.perplexity:.4f}"
    return f"{model_name(weights, adaptation)} on {path}: {measures}, {result.texts:,} texts"


def _answers_report(options: argparse.Namespace) -> str:
    weights, adaptation = find_model(options.model, adaptation_from(options))
    model = load_model(weights, options.dtype, options.device, adaptation)
    tokenizer = find_tokenizer(weights, model.config.vocab_size, options.tokenizer, adaptation)
    return answers_report(options, model, tokenizer)


def text_bytes(ids: Tokens, tokenizer: Tokenizer) -> int:
    """The length in bytes of the text that `ids` decode to."""
    # 0 ends a document and has no bytes. Where the vocabulary uses it for text as well, the two can't be distinguished.
    text = ids if tokenizer.text_of_0 else ids[ids != 0]
    return len(tokenizer.decode_bytes(text.tolist()))


if __name__ == "__main__":
    sys.exit(main())

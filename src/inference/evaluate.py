"""Measures how well a model predicts text that it wasn't trained on.

python -m src.inference.evaluate MODEL --data held-out[.bin | .txt | .jsonl]      loss, perplexity, bits per byte
python -m src.inference.evaluate MODEL --last_word lambada.jsonl                  accuracy of predicting the last word
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from src.dataset.binidx import MMapIndexedDataset, with_ending
from src.dataset.corpus.documents import EMPTY_LINE, EMPTY_TEXT, read_documents
from src.dataset.corpus.text_input import JSON_LINES, Piece, read_pieces
from src.dataset.tokenizer import Tokenizer
from src.errors import UserError
from src.inference.adaptation import model_name
from src.inference.arguments import adaptation_from, add_model_arguments
from src.inference.load import UnknownTokenizerError, find_model, find_tokenizer, load_model
from src.inference.scoring import LOGIT_ROWS, score_continuations
from src.model import RWKV7
from src.terminal import prepare_output, show

Tokens = npt.NDArray[Any]
# exp overflows float64 above 709.
MAX_EXPONENT = 700.0


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


def windows(n_tokens: int, ctx_len: int, max_windows: int | None = None, flag: str = "data") -> Iterator[slice]:
    """Windows of ctx_len + 1 tokens that overlap by one; with `max_windows`, so many of them, evenly spaced.

    A shorter remainder is left out, unless there are no more tokens than that. Raises UserError, about `flag`, for less
    than two tokens.
    """
    if n_tokens < 2:
        raise UserError(
            f"the data has {n_tokens} tokens", flag=flag, expected="at least 2: one to read and one to predict"
        )
    # The overlap of one token makes every token but the first a target exactly once.
    ctx_len = min(ctx_len, n_tokens - 1)
    count = (n_tokens - 1) // ctx_len
    # Evenly spaced rather than the first ones: a file may be sorted.
    selected = count if max_windows is None else min(count, max_windows)
    for i in range(selected):
        start = i * count // selected * ctx_len
        yield slice(start, start + ctx_len + 1)


def stack_windows(tokens: Tokens, selected: Iterable[slice], vocab_size: int) -> Tensor:
    """These windows of `tokens`, int64 [B, T + 1]. Raises UserError for ids outside the model's vocabulary."""
    # int64 before the comparison: an unsigned dtype of a file can't hold a negative id, a flat array can.
    batch = np.stack([tokens[window] for window in selected]).astype(np.int64)
    if batch.min() < 0 or batch.max() >= vocab_size:
        raise UserError(
            f"the data has token id {batch.min() if batch.min() < 0 else batch.max()}",
            flag="data",
            expected=f"ids below the model's vocabulary size of {vocab_size}",
            advice="use the tokenizer that the model was trained with",
        )
    return torch.from_numpy(batch)


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
    return float(torch.stack(parts).double().sum())


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


@dataclass(frozen=True)
class LastWords:
    """`accuracy`: share of texts whose last word greedy decoding predicts; `perplexity` of these words, per word."""

    accuracy: float
    perplexity: float
    texts: int


def last_words(model: RWKV7, tokenizer: Tokenizer, texts: Iterable[str]) -> LastWords:
    """Prediction of each text's last word from the words before it (LAMBADA). Raises UserError for a single word."""
    pairs = []
    # As LAMBADA is scored elsewhere: the space belongs to the word, and a text starts after the end of a document (0).
    for text in texts:
        context, _, word = text.rstrip().rpartition(" ")
        if not context or not word:
            raise UserError("the text has a single word", flag="last_word", given=repr(text))
        pairs.append(([0, *tokenizer.encode_as_text(context)], tokenizer.encode_as_text(" " + word)))
    if not pairs:
        raise UserError("the file contains no texts", flag="last_word")
    scores = score_continuations(model, pairs)
    # Perplexity per word, as LAMBADA's is given: a word may consist of several tokens.
    mean_loss = -sum(score.log_probability for score in scores) / len(scores)
    accuracy = sum(score.greedy for score in scores) / len(scores)
    return LastWords(accuracy, math.exp(min(mean_loss, MAX_EXPONENT)), len(scores))


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
    parser.add_argument("--ctx_len", type=int, default=512, help="tokens per window [%(default)s]")
    parser.add_argument("--max_windows", type=int, default=None, help="most windows, evenly spaced; default: all")
    parser.add_argument("--micro_bsz", type=int, default=8, help="windows per batch [%(default)s]")
    prepare_output()
    options = parser.parse_args(argv)
    try:
        for name in ("ctx_len", "max_windows", "micro_bsz"):
            if getattr(options, name) is not None and getattr(options, name) < 1:
                raise UserError(flag=name, given=getattr(options, name), expected="at least 1")
        show(_last_word_report(options) if options.last_word else _loss_report(options))
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


def _loss_report(options: argparse.Namespace) -> str:
    weights, adaptation = find_model(options.model, adaptation_from(options))
    model = load_model(weights, options.dtype, options.device, adaptation)
    path, vocab_size = Path(options.data), model.config.vocab_size
    tokenizer: Tokenizer | None = None
    try:
        tokenizer = find_tokenizer(weights, vocab_size, options.tokenizer, adaptation)
    except UnknownTokenizerError:
        if not is_binidx(path):  # that holds ids: without a tokenizer only bits per byte are unknown
            raise
    tokens = read_tokens(path, tokenizer)
    result = heldout_loss(model, tokens, options.ctx_len, options.max_windows, options.micro_bsz)
    # Reported as an error, as a script that reads the loss would take "nan" for a result.
    if not math.isfinite(result.loss):
        raise UserError(
            f"its loss is {result.loss}",
            given=weights,
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
    return f"{model_name(weights, adaptation)} on {options.data}: {measures}, {result.tokens:,} tokens"


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


def text_bytes(ids: Tokens, tokenizer: Tokenizer) -> int:
    """The length in bytes of the text that `ids` decode to."""
    # 0 ends a document and has no bytes. Where the vocabulary uses it for text as well, the two can't be distinguished.
    text = ids if tokenizer.text_of_0 else ids[ids != 0]
    return len(tokenizer.decode_bytes(text.tolist()))


if __name__ == "__main__":
    sys.exit(main())

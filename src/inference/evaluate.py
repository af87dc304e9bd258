"""How well a model predicts text that it was not trained on.

python -m src.inference.evaluate MODEL --data held-out[.bin | .txt | .jsonl]      loss, perplexity, bits per byte
python -m src.inference.evaluate MODEL --last_word lambada.jsonl                  how often the last word is foreseen
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
from src.inference.load import add_model_arguments, find_tokenizer, find_weights, load_model
from src.inference.scoring import LOGIT_ROWS, score_continuations
from src.model import RWKV7

Tokens = npt.NDArray[Any]


@dataclass(frozen=True)
class HeldOutLoss:
    """`loss`: mean cross entropy in nats over `tokens` predicted tokens."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_byte(self, n_bytes: int) -> float:
        """For text whose predicted part is `n_bytes` long: comparable between tokenizers."""
        return self.loss * self.tokens / (math.log(2) * n_bytes) if n_bytes else math.nan


def windows(n_tokens: int, ctx_len: int, max_windows: int | None = None) -> Iterator[slice]:
    """ctx_len + 1 tokens each, without a gap (a window's last token is the next one's first), or `max_windows` of these evenly spaced.

    A remainder shorter than that is left out, unless it is all there is. ValueError for less than two tokens.
    """
    if n_tokens < 2:
        raise UserError(f"--data has {n_tokens} tokens; expected at least 2, one to read and one to predict")
    ctx_len = min(ctx_len, n_tokens - 1)
    count = (n_tokens - 1) // ctx_len
    chosen = count if max_windows is None else min(count, max_windows)
    for i in range(chosen):
        start = i * count // chosen * ctx_len
        yield slice(start, start + ctx_len + 1)


def heldout_loss(
    model: RWKV7,
    data: MMapIndexedDataset | Tokens,
    ctx_len: int,
    max_windows: int | None = None,
    micro_bsz: int = 8,
) -> HeldOutLoss:
    """Mean loss over independent windows of `data` (binidx, or a flat array of ids): always the same ones, without gradient.

    Each window starts from an empty state, as in training. ValueError for ids that the model doesn't have.
    """
    tokens = data.tokens if isinstance(data, MMapIndexedDataset) else data
    chosen = list(windows(len(tokens), ctx_len, max_windows))
    total, count = 0.0, 0
    for first in range(0, len(chosen), micro_bsz):
        batch = np.stack([tokens[window] for window in chosen[first : first + micro_bsz]]).astype(np.int64)
        if batch.min() < 0 or batch.max() >= model.config.vocab_size:
            wrong = batch.min() if batch.min() < 0 else batch.max()
            raise UserError(
                f"--data has token id {wrong}, the model {model.config.vocab_size} rows: it was made with another tokenizer"
            )
        total += _summed_loss(model, torch.from_numpy(batch))
        count += batch.shape[0] * (batch.shape[1] - 1)
    return HeldOutLoss(total / count, count)


@torch.no_grad()
def _summed_loss(model: RWKV7, batch: Tensor) -> float:
    """Cross entropy of batch[:, 1:] given what stands before, summed; batch int64 [B, T+1]."""
    batch = batch.to(model.emb.weight.device)
    hidden, _ = model.hidden(batch[:, :-1])
    rows, targets = hidden.flatten(0, 1).split(LOGIT_ROWS), batch[:, 1:].flatten().split(LOGIT_ROWS)
    parts = [F.cross_entropy(model.head(x).float(), y, reduction="sum") for x, y in zip(rows, targets, strict=True)]
    return float(torch.stack(parts).double().sum())


def read_texts(path: Path, flag: str) -> Iterator[str]:
    """The documents of a file, without the empty ones: in a .jsonl (.gz, .zst) the "text" of each line, any other file is one.

    ValueError that names `flag` and the line when one is no text, or the file can't be read.
    """
    name = str(path)
    try:
        lines = name.lower().endswith(JSON_LINES)
        for piece in read_pieces([name], "text") if lines else [Piece(name, 1, 0, [path.read_bytes()], 0)]:
            for _, text in read_documents(piece, "text"):
                if isinstance(text, str):
                    yield text
                elif text.reason not in (EMPTY_LINE, EMPTY_TEXT):
                    raise UserError(f"{flag} {text}")
    except OSError as error:
        raise UserError(
            f"{flag} {path}: can't be read ({error.strerror}); make it readable, or name another file"
        ) from error


def encode_texts(texts: Iterable[str], tokenizer: Tokenizer) -> Tokens:
    """The ids of all texts in a row, each followed by 0."""
    return np.fromiter((token for text in texts for token in (*tokenizer.encode(text), 0)), np.int64)


@dataclass(frozen=True)
class LastWords:
    """`accuracy`: share of texts whose last word is what the model would write; `perplexity` of these words, per word."""

    accuracy: float
    perplexity: float
    texts: int


def last_words(model: RWKV7, tokenizer: Tokenizer, texts: Iterable[str]) -> LastWords:
    """Whether greedy decoding writes each text's last word after the rest of it (LAMBADA). ValueError for a text of one word."""
    pairs = []
    for text in texts:
        context, _, word = text.rstrip().rpartition(" ")
        if not context or not word:
            raise UserError(f"--last_word: {text!r} has no word before its last one")
        pairs.append(([0, *tokenizer.encode(context)], tokenizer.encode(" " + word)))
    if not pairs:
        raise UserError("--last_word: there are no texts in it")
    scores = score_continuations(model, pairs)
    mean = sum(score.log_probability for score in scores) / len(scores)
    return LastWords(sum(score.greedy for score in scores) / len(scores), math.exp(min(-mean, 700.0)), len(scores))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m src.inference.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    judged = parser.add_mutually_exclusive_group(required=True)
    judged.add_argument("--last_word", help='.jsonl (.gz, .zst) of {"text": ...}: is the last word foreseen (LAMBADA)')
    judged.add_argument(
        "--data", help='held-out binidx (X, X.bin), text (.txt, .py, ...) or .jsonl (.gz, .zst) of {"text": ...}'
    )
    parser.add_argument("--ctx_len", type=int, default=512, help="tokens that a window is read with [%(default)s]")
    parser.add_argument("--max_windows", type=int, default=None, help="evenly spaced; default: all")
    parser.add_argument("--micro_bsz", type=int, default=8, help="windows at once [%(default)s]")
    options = parser.parse_args(argv)
    try:
        for name in ("ctx_len", "max_windows", "micro_bsz"):
            if getattr(options, name) is not None and getattr(options, name) < 1:
                raise UserError(f"--{name} {getattr(options, name)}: expected at least 1")
        print(_last_word_report(options) if options.last_word else _report(options))
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


def _report(options: argparse.Namespace) -> str:
    weights = find_weights(options.model)
    model = load_model(weights, options.dtype, options.device)
    path, vocab_size = Path(options.data), model.config.vocab_size
    is_binidx = path.suffix in (".bin", ".idx") or with_ending(path, ".bin").is_file()
    if not is_binidx and not path.is_file():
        raise UserError(
            f"--data {path}: no such file; expected binidx data (X, X.bin), a text file or a .jsonl of texts"
        )
    tokenizer: Tokenizer | None = None
    try:
        tokenizer = find_tokenizer(weights, vocab_size, options.tokenizer)
    except ValueError:
        if options.tokenizer or not is_binidx:
            raise
    if is_binidx:
        tokens: Tokens = MMapIndexedDataset(path).tokens
    else:
        assert tokenizer is not None
        tokens = encode_texts(read_texts(path, "--data"), tokenizer)
    result = heldout_loss(model, tokens, options.ctx_len, options.max_windows, options.micro_bsz)
    if not math.isfinite(result.loss):
        raise UserError(
            f"{weights}: its loss is {result.loss}: the weights hold numbers that are not finite, or overflow in --dtype; try fp32"
        )
    if tokenizer is None:
        bits = "(bits per byte: needs --tokenizer)"
    else:
        n_bytes = sum(
            _bytes(tokens[w][1:], tokenizer) for w in windows(len(tokens), options.ctx_len, options.max_windows)
        )
        bits = f"bits per byte {result.bits_per_byte(n_bytes):.4f}"
    return f"{weights} on {options.data}: loss {result.loss:.4f}, perplexity {result.perplexity:.4f}, {bits}, {result.tokens:,} tokens"


def _last_word_report(options: argparse.Namespace) -> str:
    weights, path = find_weights(options.model), Path(options.last_word)
    if not path.is_file() or not path.name.lower().endswith(JSON_LINES):
        what = "not lines of JSON by its name" if path.is_file() else "no such file"
        raise UserError(f'--last_word {path}: {what}; expected a .jsonl (.gz, .zst) of {{"text": ...}}')
    model = load_model(weights, options.dtype, options.device)
    tokenizer = find_tokenizer(weights, model.config.vocab_size, options.tokenizer)
    result = last_words(model, tokenizer, read_texts(path, "--last_word"))
    return f"{weights} on {path}: accuracy {result.accuracy:.4f}, perplexity {result.perplexity:.4f}, {result.texts:,} texts"


def _bytes(ids: Tokens, tokenizer: Tokenizer) -> int:
    text = ids if tokenizer.text_of_0 else ids[ids != 0]  # 0 ends a document; in some vocabularies it is text as well
    return len(tokenizer.decode_bytes(text.tolist()))


if __name__ == "__main__":
    sys.exit(main())

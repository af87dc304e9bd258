"""Log-probabilities of given continuations, for multiple-choice tasks, last-word prediction and whole texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from src.inference.decoder import check_tokens
from src.model import RWKV7, State

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of its continuation

TOKENS_PER_PASS = 4096  # bounds the memory of activations
# Rows of logits at a time: with V = 65,536 in fp32 this is 256 MB, and all rows of a pass would be 1 GB.
LOGIT_ROWS = 1024


@dataclass(frozen=True)
class Score:
    """Of a continuation after its context: `log_probability` in nats; `greedy`: whether each token is the most
    likely."""

    log_probability: float
    greedy: bool


def score_continuations(model: RWKV7, pairs: Sequence[Pair]) -> list[Score]:
    """A Score for each (context, continuation) of token ids.

    Pairs are packed into rows of up to TOKENS_PER_PASS tokens, each pair with a separate state. A longer pair is
    processed in chunks with the state carried over, so that memory doesn't grow with its length. Raises UserError for
    an empty context or continuation and for ids outside the vocabulary.
    """
    for number, (context, continuation) in enumerate(pairs):
        for tokens, what in ((context, "context"), (continuation, "continuation")):
            check_tokens(tokens, model.config.vocab_size, f"{what} {number}")
    scores: list[Score] = []
    for row in _rows(pairs):
        scores += _score_row(model, row)
    return scores


def _rows(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """The pairs in order, in groups of at most TOKENS_PER_PASS tokens (or of one pair)."""
    row: list[Pair] = []
    length = 0
    for context, continuation in pairs:
        added = len(context) + len(continuation) - 1  # the last token is predicted and not read
        if row and length + added > TOKENS_PER_PASS:
            yield row
            row, length = [], 0
        row.append((context, continuation))
        length += added
    if row:
        yield row


@torch.no_grad()
def _score_row(model: RWKV7, pairs: list[Pair]) -> list[Score]:
    device = model.emb.weight.device
    packed: list[int] = []
    bounds: list[int] = [0]
    predicting: list[int] = []  # positions whose logits predict a token of a continuation ...
    targets: list[int] = []  # ... and that token
    for context, continuation in pairs:
        first = len(packed) + len(context) - 1  # the context's last token predicts the continuation's first
        packed += [*context, *continuation[:-1]]
        bounds.append(len(packed))
        predicting += range(first, len(packed))
        targets += continuation
    # A single pair needs no bounds, and without them it can be split into chunks.
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device) if len(pairs) > 1 else None
    positions, target = torch.tensor(predicting, device=device), torch.tensor(targets, device=device)
    state: State | None = None
    results: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(packed), TOKENS_PER_PASS):  # one iteration, unless it is a single long pair
        chunk = packed[start : start + TOKENS_PER_PASS]
        hidden, state = model.hidden(torch.tensor([chunk], device=device), state, cu_seqlens)
        in_chunk = (positions >= start) & (positions < start + len(chunk))
        results.append(_score_tokens(model, hidden[0, positions[in_chunk] - start], target[in_chunk]))
    log_p, greedy = map(torch.cat, zip(*results, strict=True))
    lengths = [len(continuation) for _, continuation in pairs]
    by_pair = zip(log_p.split(lengths), greedy.split(lengths), strict=True)
    return [Score(float(p.sum()), bool(most_likely.all())) for p, most_likely in by_pair]


def _score_tokens(model: RWKV7, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) and whether it is the most likely token, [T] each, for hidden [T, C], targets int64 [T]."""
    log_p, greedy = [], []
    for x, y in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        logits = model.head(x).float()  # [rows, V]
        log_p.append(torch.log_softmax(logits, dim=-1).gather(1, y.unsqueeze(1)).squeeze(1))
        greedy.append(logits.argmax(-1) == y)
    # float64 for the sum over a text: in fp32 thousands of terms would cost digits. On the CPU: mps has no float64.
    return torch.cat(log_p).cpu().double(), torch.cat(greedy).cpu()

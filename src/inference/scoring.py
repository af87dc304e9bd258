"""How likely a model finds given continuations: what multiple choice, last words and whole texts are judged by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from src.inference.decoder import check_tokens
from src.model import RWKV7, State

TOKENS_AT_ONCE = 4096
LOGIT_ROWS = 1024  # rows of logits that exist at once


@dataclass(frozen=True)
class Score:
    """`log_probability` (nats) of a continuation after its context; `greedy`: each of its tokens is the likeliest in its place."""

    log_probability: float
    greedy: bool


def score_continuations(model: RWKV7, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
    """A Score for each (context, continuation), token ids. Pairs are packed into rows, each with a state of its own; one that is longer
    than a row is read in pieces, with the state carried, so that activations don't grow with its length.

    ValueError for an empty context or continuation and for ids outside the vocabulary.
    """
    for number, (context, continuation) in enumerate(pairs):
        for tokens, what in ((context, "context"), (continuation, "continuation")):
            check_tokens(tokens, model.config.vocab_size, f"{what} {number}")
    scores: list[Score] = []
    for pack in _packs(pairs):
        scores += _score_pack(model, pack)
    return scores


def _packs(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[list[tuple[Sequence[int], Sequence[int]]]]:
    pack: list[tuple[Sequence[int], Sequence[int]]] = []
    length = 0
    for context, continuation in pairs:
        more = len(context) + len(continuation) - 1
        if pack and length + more > TOKENS_AT_ONCE:
            yield pack
            pack, length = [], 0
        pack.append((context, continuation))
        length += more
    if pack:
        yield pack


@torch.no_grad()
def _score_pack(model: RWKV7, pack: list[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
    device = model.emb.weight.device
    packed: list[int] = []
    bounds: list[int] = [0]
    places: list[int] = []
    targets: list[int] = []
    for context, continuation in pack:
        first = len(packed) + len(context) - 1  # where the continuation's first token is predicted
        packed += [*context, *continuation[:-1]]
        bounds.append(len(packed))
        places += range(first, len(packed))
        targets += continuation
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device) if len(pack) > 1 else None
    place, target = torch.tensor(places, device=device), torch.tensor(targets, device=device)
    state: State | None = None
    judged: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(packed), TOKENS_AT_ONCE):  # once, unless it is a single long pair
        piece = packed[start : start + TOKENS_AT_ONCE]
        hidden, state = model.hidden(torch.tensor([piece], device=device), state, cu_seqlens)
        here = (place >= start) & (place < start + len(piece))
        judged.append(_judge(model, hidden[0, place[here] - start], target[here]))
    log_p, greedy = map(torch.cat, zip(*judged, strict=True))
    lengths = [len(continuation) for _, continuation in pack]
    parts = zip(log_p.split(lengths), greedy.split(lengths), strict=True)
    return [Score(float(p.sum()), bool(likeliest.all())) for p, likeliest in parts]


def _judge(model: RWKV7, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) in float64 and whether it is the likeliest, for hidden [T, C], targets [T]."""
    log_p, greedy = [], []
    for x, y in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        logits = model.head(x).float()
        log_p.append(torch.log_softmax(logits, dim=-1).gather(1, y.unsqueeze(1)).squeeze(1).double())
        greedy.append(logits.argmax(-1) == y)
    return torch.cat(log_p).cpu(), torch.cat(greedy).cpu()

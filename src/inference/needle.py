"""Whether a model still knows, after a distance, a number that a text named once: `evaluate MODEL --needle`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from src.dataset.needle import NeedleMaker
from src.inference.scoring import score_continuations
from src.model import RWKV7


@dataclass(frozen=True)
class Found:
    """`texts` texts with the fact `distance` tokens before the question: the share that greedy decoding answers, and
    the mean log-probability of the answer in nats."""

    distance: int
    texts: int
    found: float
    log_probability: float


def find_needles(model: RWKV7, maker: NeedleMaker, distances: Sequence[int], texts: int) -> list[Found]:
    """A `Found` for each distance, over texts 0 .. texts - 1 of `maker`."""
    results = []
    for distance in distances:
        needles = [maker.test(number, distance) for number in range(texts)]
        scores = score_continuations(model, [(needle.prompt, needle.answer) for needle in needles])
        found = sum(score.greedy for score in scores) / texts
        results.append(Found(distance, texts, found, sum(score.log_probability for score in scores) / texts))
    return results


def needle_table(results: Sequence[Found]) -> str:
    """One line for each distance."""
    head = f"{'distance':>9}  {'found':>6}  log p of the answer"
    return "\n".join([head, *(f"{r.distance:>9,}  {r.found:>6.0%}  {r.log_probability:.2f}" for r in results)])

"""From logits to the next token: temperature, top-p, top-k and repetition penalties, as in other RWKV programs."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from src.errors import UserError

# fp32 rounds temperatures below about 1e-45 to 0, and 0 would be divided by 0. Long before, one token has all
# probability.
GREEDY_BELOW = 1e-6
FEW = 1024  # top_p is tried with tokens of a probability of at least (1 - top_p) / FEW
SUM_ERROR = 1e-4  # of a sum of probabilities in fp32, at most
SEED_LIMIT = 2**63  # torch.Generator takes int64


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Raises UserError, naming the setting as a flag, for a value out of range.

    temperature        p becomes p^(1/temperature), normalised; 0 (below 1e-6): always the most likely token
    top_p              draw from the most likely tokens with this total probability (before the temperature); 1: all
    top_k              draw from this many most likely tokens; 0: all
    presence_penalty   subtracted from the logit of every token generated so far
    frequency_penalty  subtracted from it once more for each time the token was generated, ...
    penalty_decay      ... where every further token multiplies these counts by this
    """

    temperature: float = 1.0
    top_p: float = 0.85
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 0.996

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def __post_init__(self) -> None:
        limits = {
            "temperature": (0.0, math.inf, "0 (greedy) or more"),
            "top_p": (0.0, 1.0, "0 to 1"),
            "top_k": (0, math.inf, "0 (off) or a number of tokens"),
            "penalty_decay": (0.0, 1.0, "0 to 1"),
        }
        for field in fields(self):
            value = getattr(self, field.name)
            lowest, highest, expected = limits.get(field.name, (-math.inf, math.inf, "a finite number"))
            if not math.isfinite(value) or not lowest <= value <= highest:
                raise UserError(flag=field.name, given=value, expected=expected)


def probabilities(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """For logits [V] on a CPU, the ids int64 [K] of the tokens that may be drawn, and their probabilities fp32 [K].

    top_p and then top_k select from softmax(logits), and the temperature is applied to what they leave: the order of
    the `rwkv` package, so that settings carry over.
    """
    logits = logits.float()
    if sampling.is_greedy:
        return _most_likely(logits), logits.new_ones(1)
    return _select(torch.softmax(logits, dim=-1), sampling)


def _most_likely(logits: Tensor) -> Tensor:
    return torch.tensor([int(logits.numpy().argmax())])  # NumPy's takes a seventh of torch's time


def _select(p: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """`probabilities` of softmax(logits) = p."""
    if sampling.top_p < 1:
        p, ids = _nucleus(p.numpy(), sampling.top_p)
        if sampling.top_k:
            p, ids = p[: sampling.top_k], ids[: sampling.top_k]
    elif 0 < sampling.top_k < p.numel():
        p, ids = p.topk(sampling.top_k)
    else:
        ids = torch.arange(p.numel())
    if sampling.temperature != 1:
        # Relative to the largest: p^(1/temperature) itself would underflow in every element at low temperatures.
        p = torch.exp((p.log() - p.max().log()) / sampling.temperature)
    return ids, p / p.sum()


def _nucleus(p: npt.NDArray[np.float32], top_p: float) -> tuple[Tensor, Tensor]:
    """The most likely tokens with a total probability of `top_p`, in descending order: probabilities and ids.

    Sorting the whole vocabulary is slow: all tokens of at least a certain probability are sorted, so that the order of
    equally likely ones is that of all. NumPy, whose calls of this size take a third of torch's time.
    """
    # Few tokens first, which usually suffice. Those below the second limit add up to less than 1 - top_p: not needed.
    for limit in ((1 - top_p) / FEW, (1 - top_p) / p.size):
        ids = np.flatnonzero(p >= limit)
        some = p[ids]
        if float(some.sum(dtype=np.float64)) > top_p + SUM_ERROR:
            break
    order = np.argsort(-some, kind="stable")
    some = some[order]
    sums = some.cumsum(dtype=np.float64).astype(np.float32)
    keep = int((sums < np.float32(top_p)).sum()) + 1  # including the token whose sum reaches top_p
    return torch.from_numpy(some[:keep]), torch.from_numpy(ids[order[:keep]])


class Sampler:
    """Draws the tokens of one sequence: the settings, a random generator, and counts of the tokens generated so far.

    seed           None: a random one
    uncounted_ids  tokens that don't increase the count of `frequency_penalty`: spaces and digits have to repeat
    """

    def __init__(self, sampling: Sampling, seed: int | None = None, uncounted_ids: Collection[int] = ()) -> None:
        self.sampling, self.uncounted_ids = sampling, frozenset(uncounted_ids)
        self._random = torch.Generator()
        if seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(seed)
        # The tokens generated so far, how often (decayed), and where each is in these arrays.
        self._ids, self._counts = np.zeros(0, np.int64), np.zeros(0, np.float32)
        self._places: dict[int, int] = {}

    def __call__(self, logits: Tensor) -> int:
        """The next token for logits [V] of any device and dtype. Raises UserError when they are not finite."""
        [token] = draw([self], logits.detach().to("cpu", torch.float32, copy=True).unsqueeze(0))
        if isinstance(token, UserError):
            raise token
        return token

    @property
    def _has_penalties(self) -> bool:
        return self.sampling.presence_penalty != 0 or self.sampling.frequency_penalty != 0

    def _penalise(self, logits: Tensor) -> None:
        if self._has_penalties:
            numbers, sampling = logits.numpy(), self.sampling
            frequency = np.float32(sampling.frequency_penalty) * self._counts
            numbers[self._ids] = numbers[self._ids] - np.float32(sampling.presence_penalty) - frequency

    def _count(self, token: int) -> None:
        if not self._has_penalties:
            return
        self._counts *= np.float32(self.sampling.penalty_decay)  # before the new token is counted, which thus counts 1
        if token not in self._places:
            self._places[token] = len(self._places)
            self._ids, self._counts = np.append(self._ids, token), np.append(self._counts, np.float32(0))
        self._counts[self._places[token]] += token not in self.uncounted_ids

    def _draw(self, ids: Tensor, p: Tensor) -> int:
        token = int(ids[torch.multinomial(p, 1, generator=self._random)])
        self._count(token)
        return token


def draw(samplers: Sequence[Sampler], logits: Tensor) -> list[int | UserError]:
    """The next token of each sequence for logits fp32 [B, V] on the CPU, which are overwritten.

    Each is the one that its sampler alone would draw, to the bit. A row of logits that are not finite has an error.
    """
    for sampler, row in zip(samplers, logits, strict=True):
        sampler._penalise(row)
    # One pass in parallel over the rows: softmax is the larger part of the time.
    p = logits if all(sampler.sampling.is_greedy for sampler in samplers) else torch.softmax(logits, dim=-1)
    tokens: list[int | UserError] = []
    for sampler, row, row_p in zip(samplers, logits, p, strict=True):
        # the sum first, as it is quicker: it is not finite where one of them isn't
        if not math.isfinite(float(row.sum())) and not bool(row.isfinite().all()):
            advice = "the weights are damaged, or too large for --dtype: try fp32"
            tokens.append(UserError("the model's logits are not finite", advice=advice))
        elif sampler.sampling.is_greedy:
            tokens.append(sampler._draw(_most_likely(row), torch.ones(1)))
        else:
            tokens.append(sampler._draw(*_select(row_p, sampler.sampling)))
    return tokens

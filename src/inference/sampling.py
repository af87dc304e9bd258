"""From logits to the next token: temperature, top-p, top-k and repetition penalties, as in other RWKV programs."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from src.errors import UserError

# fp32 rounds temperatures below about 1e-45 to 0, and 0 would be divided by 0. Long before, one token has all
# probability.
GREEDY_BELOW = 1e-6
FEW = 512  # tokens that top_p is tried with
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
    """For logits [V], the ids int64 [K] of the tokens that may be drawn, and their probabilities fp32 [K].

    top_p and then top_k select from softmax(logits), and the temperature is applied to what they leave: the order of
    the `rwkv` package, so that settings carry over.
    """
    logits = logits.float()
    if sampling.temperature < GREEDY_BELOW:
        return logits.argmax().unsqueeze(0), logits.new_ones(1)
    p = torch.softmax(logits, dim=-1)
    ids = None
    if sampling.top_p < 1:
        # Sorting the whole vocabulary is slow. Tokens below (1 - top_p) / V add up to less than 1 - top_p: none is
        # needed.
        ids = (p >= (1 - sampling.top_p) / p.numel()).nonzero().squeeze(1)
        p = p[ids]
        # Of these a few usually suffice; equally likely ones stay together, so that the order is that of all.
        if p.numel() > FEW:
            chosen = p >= p.topk(FEW).values[-1]
            if float(p[chosen].sum(dtype=torch.float64)) > sampling.top_p + SUM_ERROR:
                p, ids = p[chosen], ids[chosen]
        p, order = p.sort(descending=True, stable=True)
        keep = int((p.cumsum(0) < sampling.top_p).sum()) + 1  # including the token whose sum reaches top_p
        p, ids = p[:keep], ids[order[:keep]]
    if 0 < sampling.top_k < p.numel():
        p, order = p.topk(sampling.top_k)
        ids = order if ids is None else ids[order]
    if ids is None:
        ids = torch.arange(p.numel(), device=p.device)
    if sampling.temperature != 1:
        # Relative to the largest: p^(1/temperature) itself would underflow in every element at low temperatures.
        p = torch.exp((p.log() - p.max().log()) / sampling.temperature)
    return ids, p / p.sum()


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
        # fp32 [V] each, allocated with the first logits: 1 for tokens generated so far; how often, decayed.
        self._present = self._counts = torch.zeros(0)

    def __call__(self, logits: Tensor) -> int:
        """The next token for logits [V] of any device and dtype. Raises UserError when they are not finite."""
        logits = logits.detach().to("cpu", torch.float32)  # a seed gives the same draws on every device
        # the sum first, as it is quicker: it is not finite where one of them isn't
        if not math.isfinite(float(logits.sum())) and not bool(logits.isfinite().all()):
            raise UserError(
                "the model's logits are not finite",
                advice="the weights are damaged, or too large for --dtype: try fp32",
            )
        ids, p = probabilities(self._penalise(logits), self.sampling)
        token = int(ids[torch.multinomial(p, 1, generator=self._random)])
        self._count(token)
        return token

    @property
    def _has_penalties(self) -> bool:
        return self.sampling.presence_penalty != 0 or self.sampling.frequency_penalty != 0

    def _penalise(self, logits: Tensor) -> Tensor:
        if not self._has_penalties:
            return logits
        if not self._counts.numel():
            self._present, self._counts = torch.zeros_like(logits), torch.zeros_like(logits)
        return logits - self.sampling.presence_penalty * self._present - self.sampling.frequency_penalty * self._counts

    def _count(self, token: int) -> None:
        if not self._has_penalties:
            return
        self._counts *= self.sampling.penalty_decay  # before the new token is counted, which thus counts 1
        self._counts[token] += token not in self.uncounted_ids
        self._present[token] = 1

"""From logits to the next token, as users of RWKV know it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from src.errors import UserError

# Temperatures that fp32 rounds to 0 would divide 0 by 0; long before that the likeliest token is as good as certain.
GREEDY_BELOW = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Everything is a ValueError that names the setting when it is out of range.

    temperature        p becomes p^(1/temperature); 0, and anything below 1e-6: always the likeliest token
    top_p              draw from the likeliest tokens that together reach this probability (before the temperature); 1: all
    top_k              draw from this many likeliest tokens; 0: all
    presence_penalty   taken from the logit of every token that has been written
    frequency_penalty  taken from it once more for each time that it has been written, ...
    penalty_decay      ... where each time counts this much less with every further token
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
            least, most, words = limits.get(field.name, (-math.inf, math.inf, "a finite number"))
            if not math.isfinite(value) or not least <= value <= most:
                raise UserError(f"{field.name} {value}: expected {words}")


def probabilities(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may come next and their probabilities: ids int64 [K] and p fp32 [K], summing to 1, for logits [V].

    top_p and top_k look at softmax(logits), the temperature is applied to what they leave; the same order as in the `rwkv` package.
    """
    p = torch.softmax(logits.float(), dim=-1)
    if sampling.temperature < GREEDY_BELOW:
        best = p.argmax()
        return best.unsqueeze(0), p.new_ones(1)
    ids = None
    if sampling.top_p < 1:
        # Tokens below (1 - top_p) / V have together less than 1 - top_p, so none of them is needed: sort only the others.
        ids = (p >= (1 - sampling.top_p) / p.numel()).nonzero().squeeze(1)
        p, order = p[ids].sort(descending=True, stable=True)
        keep = int((p.cumsum(0) < sampling.top_p).sum()) + 1  # the first sum that reaches top_p belongs to it
        p, ids = p[:keep], ids[order[:keep]]
    if 0 < sampling.top_k < p.numel():
        p, order = p.topk(sampling.top_k)
        ids = order if ids is None else ids[order]
    if ids is None:
        ids = torch.arange(p.numel(), device=p.device)
    if sampling.temperature != 1:
        p = torch.exp(
            (p.log() - p.max().log()) / sampling.temperature
        )  # relative to the best: can't underflow as a whole
    return ids, p / p.sum()


class Sampler:
    """Draws one sequence's tokens: settings, a random source of its own, and what has been written so far.

    seed None: another one each time. `uncounted_ids` don't add to the frequency (blanks and digits have to repeat).
    """

    def __init__(self, sampling: Sampling, seed: int | None = None, uncounted_ids: Collection[int] = ()) -> None:
        self.sampling, self.uncounted_ids = sampling, frozenset(uncounted_ids)
        self._random = torch.Generator()
        if seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(seed)
        self._written = self._counts = torch.zeros(
            0
        )  # fp32 [V] each: 1 for what has been written; how often, with the decay

    def __call__(self, logits: Tensor) -> int:
        """The next token for logits [V] of any device and dtype. ValueError when they are not numbers."""
        logits = logits.detach().to("cpu", torch.float32)  # the same draws on every device
        if not bool(logits.isfinite().all()):
            raise UserError(
                "the model's logits are not finite: the weights are damaged, or --dtype is too narrow for them"
            )
        ids, p = probabilities(self._penalised(logits), self.sampling)
        token = int(ids[torch.multinomial(p, 1, generator=self._random)])
        self._remember(token)
        return token

    @property
    def _penalises(self) -> bool:
        return self.sampling.presence_penalty != 0 or self.sampling.frequency_penalty != 0

    def _penalised(self, logits: Tensor) -> Tensor:
        if not self._penalises:
            return logits
        if not self._counts.numel():
            self._written, self._counts = torch.zeros_like(logits), torch.zeros_like(logits)
        return logits - self.sampling.presence_penalty * self._written - self.sampling.frequency_penalty * self._counts

    def _remember(self, token: int) -> None:
        if not self._penalises:
            return
        self._counts *= self.sampling.penalty_decay
        self._counts[token] += token not in self.uncounted_ids
        self._written[token] = 1

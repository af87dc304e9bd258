"""A fact in a long text: a number that is named once, and asked for after a distance. For tests, and to train on.

    filler "The pass key is 48213. Remember it: 48213." filler "What is the pass key? The pass key is" -> " 48213"

The number is drawn for each text, so it can be known from the text alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = list[int]
Tokens = npt.NDArray[Any]

FACT = "\nThe pass key is {number}. Remember it: {number}.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
ANSWER = " {number}"
DIGITS = 5
NEAR = 4  # tokens: the shortest distance in texts to train on


@dataclass(frozen=True)
class Needle:
    """A text that ends with the question (`prompt`), and the ids that answer it. `distance`: tokens between the end of
    the fact and the question."""

    prompt: Ids
    answer: Ids
    distance: int


class NeedleMaker:
    """Makes texts out of `filler` (token ids of any text) and facts encoded by `encode`. Text n is a function of
    (seed, n)."""

    def __init__(self, filler: Tokens, encode: Callable[[str], Sequence[int]], seed: int = 0) -> None:
        assert len(filler) > 0
        self.filler, self.encode, self.seed = filler, encode, seed
        self.question = list(encode(QUESTION))

    def test(self, number: int, distance: int, before: int = 64) -> Needle:
        """Text `number`: `before` tokens, the fact, `distance` tokens, the question."""
        draw = random.Random(f"{self.seed} {number} {distance}")
        fact, answer = self._fact(draw)
        start = draw.randrange(len(self.filler))
        prompt = [*self._take(start, before), *fact, *self._take(start + before, distance), *self.question]
        return Needle(prompt, answer, distance)

    def document(self, number: int, length: int) -> Ids:
        """Text `number` of `length` tokens to train on: the fact at its beginning, and the question with its answer
        again and again after it, at distances that grow by half.

        In one half of the texts the first distance is short; in the other it is anywhere up to `length`, so that there
        is no answer on the way that could be remembered instead of the fact.
        """
        draw = random.Random(f"{self.seed} document {number}")
        fact, answer = self._fact(draw)
        start = draw.randrange(len(self.filler))
        ids = [*self._take(start, draw.randrange(32)), *fact]
        room = length - len(ids) - len(self.question) - len(answer)
        place, gap = start, NEAR if draw.random() < 0.5 else draw.randint(NEAR, max(NEAR, 2 * room // 3))
        while len(ids) < length:
            taken = draw.randint(gap, gap + gap // 2)
            ids += [*self._take(place, taken), *self.question, *answer]
            place, gap = place + taken, gap + gap // 2
        return ids[:length]

    def _fact(self, draw: random.Random) -> tuple[Ids, Ids]:
        number = "".join(str(draw.randrange(10)) for _ in range(DIGITS))
        return list(self.encode(FACT.format(number=number))), list(self.encode(ANSWER.format(number=number)))

    def _take(self, start: int, count: int) -> Ids:
        """`count` ids of the filler from `start` on, around its end."""
        size = len(self.filler)
        places = np.arange(start, start + count) % size
        return [int(i) for i in self.filler[places]]

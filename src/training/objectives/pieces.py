"""A batch cut along its positions: pieces, each of which is computed from the state at the end of the one before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Some positions of every row of a batch.

    tokens, targets  int64 [B, n]
    bounds           0, ends of documents, n: of a packed row (B = 1), where document states are kept apart; else None
    continues        whether the first document (without bounds: every row) began before the piece
    """

    tokens: Tensor
    targets: Tensor
    bounds: tuple[int, ...] | None
    continues: bool

    @property
    def documents(self) -> int:
        """The number of states that the piece begins with."""
        return self.tokens.shape[0] if self.bounds is None else len(self.bounds) - 1

    @property
    def cu_seqlens(self) -> Tensor | None:
        """`bounds` as the recurrence takes them: int32 [documents + 1] on the device of the tokens."""
        if self.bounds is None:
            return None
        return torch.tensor(self.bounds, dtype=torch.int32, device=self.tokens.device)

    def split(self, size: int) -> list[Piece]:
        """This piece in pieces of `size` positions, the last one perhaps shorter."""
        length = self.tokens.shape[1]
        return [self._between(begin, min(begin + size, length)) for begin in range(0, length, size)]

    def part(self, number: int, count: int) -> Piece:
        """Part `number` of `count` parts of equal length."""
        length = self.tokens.shape[1]
        return self._between(number * length // count, (number + 1) * length // count)

    def _between(self, begin: int, end: int) -> Piece:
        bounds, continues = None, self.continues or begin > 0
        if self.bounds is not None:
            inner = [bound - begin for bound in self.bounds if begin < bound < end]
            bounds = tuple(dict.fromkeys([0, *inner, end - begin]))  # of documents without tokens nothing is left
            continues = begin not in self.bounds if begin > 0 else self.continues
        return Piece(self.tokens[:, begin:end], self.targets[:, begin:end], bounds, continues)


def whole(tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> Piece:
    """A batch as one piece. Reads the bounds on the host."""
    bounds = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    return Piece(tokens, targets, bounds, continues=False)

"""Which conversations share a row: best-fit decreasing on the lengths, and the order of the rows in each epoch."""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from src.dataset.external_shuffle import scramble

Indices = npt.NDArray[np.int64]


class Packing(NamedTuple):
    """Row i holds the conversations `members[bounds[i] : bounds[i + 1]]`."""

    members: Indices
    bounds: Indices

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def row(self, index: int) -> Indices:
        return self.members[self.bounds[index] : self.bounds[index + 1]]


def pack(lengths: npt.NDArray[np.integer], capacity: int, seed: int) -> Packing:
    """Rows of at most `capacity` positions: best-fit decreasing, all conversations of a length at once.

    Each length, the longest first, goes where it leaves the least room: for ten million conversations that is some
    thousand array operations. `seed` decides who among equals goes where. Lengths are 1 .. capacity. Usual mixes fill
    98 % and more; where nearly all are longer than half a row, no packing of whole conversations can fill it.
    """
    by_chance = scramble(np.arange(len(lengths), dtype=np.uint64), seed, "pack")
    order = np.lexsort((by_chance, -lengths.astype(np.int64)))
    counts = np.bincount(lengths, minlength=capacity + 1)
    row_of = np.empty(len(lengths), np.int64)  # of order[i]
    open_rows: dict[int, Indices] = {}  # by the room that is left
    rooms: list[int] = []  # the keys, ascending
    placed = n_rows = 0
    for length in range(capacity, 0, -1):
        waiting = int(counts[length])
        while waiting:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms.pop(at)
                rows = open_rows.pop(room)
            else:
                room, rows = capacity, np.arange(n_rows, n_rows + -(-waiting // (capacity // length)))
                n_rows += len(rows)
            taken, left = rows[:waiting], rows[waiting:]
            row_of[placed : placed + len(taken)] = taken
            placed, waiting = placed + len(taken), waiting - len(taken)
            for some, space in ((taken, room - length), (left, room)):
                if len(some) and space:
                    if space in open_rows:
                        open_rows[space] = np.concatenate([open_rows[space], some])
                    else:
                        open_rows[space] = some
                        insort(rooms, space)
    bounds = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=n_rows))])
    return Packing(order[np.argsort(row_of, kind="stable")], bounds)


def one_each(count: int) -> Packing:
    """Every conversation in a row of its own."""
    return Packing(np.arange(count), np.arange(count + 1))


def epoch_order(n_rows: int, seed: int, epoch: int) -> Indices:
    """The rows in the order of an epoch: a permutation that (seed, epoch) alone decides."""
    return np.argsort(scramble(np.arange(n_rows, dtype=np.uint64), seed, "epoch", epoch), kind="stable")

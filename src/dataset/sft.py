"""Fine-tuning samples: rows of ctx_len positions that hold whole conversations, each with its own state.

    row      inputs  [T]   conversation | conversation | ... | padding
             targets [T]   the next token where the assistant wrote it, else -100
             cu_seqlens [D + 1]   0, the end of each conversation, T (without packing 0, T)

Row `index` of epoch `e` is a pure function of (seed, e, index): like pretraining, a run can be cut and continued anywhere.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from src.dataset.packing import Indices, Packing, epoch_order, one_each, pack
from src.dataset.sample_order import nth_kept_sample, sample_number
from src.dataset.sft_cache import Conversations
from src.errors import UserError

IGNORED = -100  # a target that doesn't count
_TOKENS_AT_ONCE = 1 << 22  # counted at once


class SftBatch(NamedTuple):
    """inputs, targets int64 [T] (a batch: [1, rows * T]); cu_seqlens int32 [documents + 1]."""

    inputs: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor


def collate(rows: list[SftBatch]) -> SftBatch:
    """Rows become one row, because a row boundary is nothing but another document boundary: B = 1."""
    starts = np.cumsum([0] + [len(row.inputs) for row in rows]).tolist()
    bounds = [row.cu_seqlens[1:] + start for row, start in zip(rows, starts[:-1], strict=True)]
    return SftBatch(
        torch.cat([row.inputs for row in rows])[None],
        torch.cat([row.targets for row in rows])[None],
        torch.cat([torch.zeros(1, dtype=torch.int32), *bounds]),
    )


def collate_shares(samples: list[tuple[SftBatch, float]]) -> tuple[torch.Tensor, ...]:
    """A micro batch of an `SftDataset`: inputs, targets, cu_seqlens, and the weight fp32 [] of its mean loss in its step.

    The plain mean of the weighted losses of a step's micro batches, over all ranks, is the mean over every token that counts in
    the step: however many processes and micro batches it is cut into.
    """
    batch = collate([row for row, _ in samples])
    mean = samples[0][1]
    weight = float((batch.targets != IGNORED).sum()) / mean if mean else 1.0
    return *batch, torch.tensor(weight)


class SftRows:
    """The rows that a file's conversations make at one ctx_len; what each of them holds is settled here, once.

    ctx_len    positions of a row; a conversation of n tokens takes n - 1, with count_all n
    packing    True: as many conversations as go into a row; False: one a row, padded with token 0
    truncate   what becomes of a longer one: "end" cuts its end off (and leaves it out where that takes every answer),
               "drop" leaves it out, "error" is a ValueError
    count_all  every position counts, prompts and padding too (a conversation's last token and padding have the target
               0): only for comparing with runs that did that
    seed       decides who shares a row, and the order of the rows

    n_cut, n_dropped (conversations) and n_filled (positions that hold a token) tell what became of the file.
    """

    def __init__(
        self,
        conversations: Conversations,
        ctx_len: int,
        *,
        packing: bool = True,
        truncate: str = "end",
        count_all: bool = False,
        seed: int = 0,
    ) -> None:
        self.conversations = conversations
        self.ctx_len = ctx_len
        self.packing = packing
        self.count_all = count_all
        self.seed = seed
        positions = conversations.data.sizes.astype(np.int64) - (0 if count_all else 1)
        too_long = positions > ctx_len
        if too_long.any() and truncate == "error":
            first = int(np.flatnonzero(too_long)[0])
            raise UserError(
                f"--ctx_len {ctx_len}: {int(too_long.sum())} of {len(positions)} conversations are longer, the first is "
                f"number {first} with {positions[first]}. Raise --ctx_len, or choose --truncate end or drop."
            )
        kept = np.ones_like(too_long) if count_all and truncate == "end" else ~too_long
        if truncate == "end" and not count_all:
            for index in np.flatnonzero(too_long).tolist():  # the others have an answer, or they would not be there
                kept[index] = (conversations.data[index][1 : ctx_len + 1] >= 0).any()
        used = np.flatnonzero(kept)
        self.n_cut = int(too_long[used].sum())
        self.n_dropped = len(positions) - len(used)
        if not len(used):
            raise UserError(
                f"--ctx_len {ctx_len}: no conversation has an answer within it; use a larger --ctx_len or other data."
            )
        lengths = np.minimum(positions[used], ctx_len)
        self.n_filled = int(lengths.sum())
        rows = pack(lengths, ctx_len, seed) if packing else one_each(len(used))
        self._rows = Packing(used[rows.members], rows.bounds)
        self._order: tuple[int, Indices] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def filled(self) -> float:
        """The part of all positions that holds a token."""
        return self.n_filled / (len(self) * self.ctx_len)

    @cached_property
    def counted(self) -> npt.NDArray[np.int32]:
        """How many targets of each row count. Reads all conversations once: a quarter of a minute for a billion tokens."""
        if self.count_all:
            return np.full(len(self), self.ctx_len, np.int32)
        data = self.conversations.data
        bounds = np.concatenate([[0], np.cumsum(data.sizes, dtype=np.int64)])
        of_each = np.empty(len(data), np.int32)
        first = 0
        while first < len(data):
            last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + _TOKENS_AT_ONCE, "right")) - 1)
            before = np.concatenate([[0], np.cumsum(data.tokens[bounds[first] : bounds[last]] >= 0, dtype=np.int32)])
            begins = bounds[first:last] - bounds[first] + 1  # the first token is never a target
            ends = np.minimum(begins + self.ctx_len, bounds[first + 1 : last + 1] - bounds[first])
            of_each[first:last] = before[ends] - before[begins]
            first = last
        return np.add.reduceat(of_each[self._rows.members], self._rows.bounds[:-1])

    def sample(self, n: int) -> SftBatch:
        """The n-th row of a run (0, 1, 2, ...), which goes through all rows again and again, each time in other order."""
        return self.row(self.number(n))

    def number(self, n: int) -> int:
        """The place in the packing of the n-th row of a run."""
        epoch, index = divmod(n, len(self))
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self), self.seed, epoch))
        return int(self._order[1][index])

    def row(self, number: int) -> SftBatch:
        """One row, by its place in the packing."""
        inputs = np.zeros(self.ctx_len, np.int64)
        targets = np.full(self.ctx_len, 0 if self.count_all else IGNORED, np.int64)
        ends = [0]
        for index in self._rows.row(number):
            ids, counts = self.conversations.read(int(index))
            following = np.where(counts, ids, IGNORED)
            if self.count_all:
                ids = following = np.append(ids, 0)
            length = min(len(ids) - 1, self.ctx_len)
            begin, end = ends[-1], ends[-1] + length
            inputs[begin:end] = ids[:length]
            targets[begin:end] = following[1 : length + 1]
            ends.append(end)
        if not self.packing:
            # padding follows its conversation, as in the runs that --packing 0 is compared with
            ends = [0, self.ctx_len]
        elif ends[-1] < self.ctx_len:
            ends.append(self.ctx_len)
        return SftBatch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.tensor(ends, dtype=torch.int32))


class SftDataset(Dataset[tuple[SftBatch, float]]):
    """What one rank reads: item i is one row, and the tokens that count in a micro batch of its step, on average (0: its step is one
    micro batch). To be loaded with `collate_fn=collate_shares`.

    first_sample   number of the run's row at which this start begins, over all ranks
    n_samples      how many rows this rank reads: its length, a multiple of the micro batch
    skipped_samples          rows left out for good, (first, count): the later ones move up
    micro_bsz      rows of a micro batch
    micro_batches  of a step, on each rank
    """

    def __init__(
        self,
        rows: SftRows,
        first_sample: int,
        n_samples: int,
        rank: int,
        world_size: int,
        skipped_samples: Sequence[tuple[int, int]] = (),
        micro_bsz: int = 1,
        micro_batches: int = 1,
    ) -> None:
        assert 0 <= rank < world_size
        self.rows = rows
        self.micro_bsz, self.micro_batches = micro_bsz, micro_batches
        self._mean_of_step: tuple[int, float] = (-1, 0.0)
        self.first_sample = first_sample
        self.n_samples = n_samples
        self.rank = rank
        self.world_size = world_size
        self.skipped_samples = tuple(skipped_samples)
        if micro_batches * world_size > 1:
            rows.counted  # noqa: B018 (here, once, and not in each of the loader's processes)

    def __len__(self) -> int:
        return self.n_samples

    def __getitem__(self, index: int) -> tuple[SftBatch, float]:
        if not 0 <= index < self.n_samples:
            raise IndexError(f"row {index} of {self.n_samples}")
        n = sample_number(index, self.first_sample, self.rank, self.world_size)
        return self.rows.sample(nth_kept_sample(n, self.skipped_samples)), self._mean_counted(index)

    def _mean_counted(self, index: int) -> float:
        """Every rank counts all rows of the step: that needs no word between them, and a loader can do it ahead of time."""
        shares = self.micro_batches * self.world_size
        if shares == 1:
            return 0.0
        step = index // (self.micro_bsz * self.micro_batches)
        if self._mean_of_step[0] != step:
            first = self.first_sample + step * self.micro_bsz * shares
            numbers = [
                self.rows.number(nth_kept_sample(n, self.skipped_samples))
                for n in range(first, first + self.micro_bsz * shares)
            ]
            self._mean_of_step = (step, int(self.rows.counted[numbers].sum(dtype=np.int64)) / shares)
        return self._mean_of_step[1]

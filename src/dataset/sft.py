"""Fine-tuning samples: rows of ctx_len positions that hold whole conversations, each with its own state.

    row      inputs  [T]   conversation | conversation | ... | padding
             targets [T]   the next token where the assistant wrote it, else -100
             cu_seqlens [D + 1]   0, the end of each conversation, T (without packing 0, T)
    media        with an encoder: its prepared inputs, concatenated, and the lengths of the parts

Row `index` of epoch `e` is a pure function of (seed, e, index), so a run can stop and resume at any row.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from src.dataset.media_tokens import whole_media
from src.dataset.packing import Indices, Packing, epoch_order, one_per_row, pack
from src.dataset.sample_order import nth_kept_sample, sample_number
from src.dataset.sft_cache import Conversations
from src.errors import UserError

IGNORED = -100  # a target without loss: the default `ignore_index` of torch's cross_entropy
_COUNTED_TOKENS = 1 << 22  # tokens per block when counting targets: the running sum takes 16 MiB


class SftBatch(NamedTuple):
    """One row: inputs, targets int64 [T]; or a batch: [1, rows * T]. cu_seqlens int32 [documents + 1].

    `media`: with an encoder (prepared inputs [n, ...], lengths int64 [media]), else ().
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    media: tuple[torch.Tensor, ...] = ()

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """inputs, targets, cu_seqlens, and those of `media`."""
        return (*self[:3], *self.media)


def collate(rows: list[SftBatch]) -> SftBatch:
    """Concatenates rows to a batch of size 1: a row boundary is just another document boundary in cu_seqlens."""
    starts = np.cumsum([0] + [len(row.inputs) for row in rows]).tolist()
    bounds = [row.cu_seqlens[1:] + start for row, start in zip(rows, starts[:-1], strict=True)]
    return SftBatch(
        torch.cat([row.inputs for row in rows])[None],
        torch.cat([row.targets for row in rows])[None],
        torch.cat([torch.zeros(1, dtype=torch.int32), *bounds]),
        tuple(torch.cat(parts) for parts in zip(*(row.media for row in rows), strict=True)),
    )


def collate_shares(samples: list[tuple[SftBatch, float]]) -> tuple[torch.Tensor, ...]:
    """Collates a micro batch of an `SftDataset`: inputs, targets, cu_seqlens, the loss weight, fp32 [], and media.

        weight = targets with loss in this micro batch / mean of that number over the micro batches of the step

    The mean of weight * (mean loss of a micro batch) over the micro batches of a step, on all ranks, is the mean loss
    over all targets of the step. It doesn't depend on the number of processes and micro batches.
    """
    batch = collate([row for row, _ in samples])
    mean = samples[0][1]
    # 0: the step is this micro batch, or no target of the step has a loss.
    weight = float((batch.targets != IGNORED).sum()) / mean if mean else 1.0
    return *batch[:3], torch.tensor(weight), *batch.media


class MediaInputs(Protocol):
    """What is handed in of an encoder."""

    @property
    def blank(self) -> torch.Tensor:
        """An input like those of media; none of it is used."""

    def __call__(self, name: str, tokens: int) -> torch.Tensor:
        """The prepared input [n, ...] of a medium that takes so many tokens."""


class SftRows:
    """The conversations of a file arranged into rows of one ctx_len; the arrangement is computed in the constructor.

    ctx_len    positions per row; a conversation of n tokens takes n - 1, with count_all n
    packing    True: several conversations share a row; False: one conversation per row, padded with token 0
    truncate   conversations longer than ctx_len: "end" cuts their end off (and drops those left without an answer),
               "drop" drops them, "error" raises a UserError
    count_all  every position has a loss, prompts and padding included (the target of a conversation's last token and of
               padding is 0); only for comparison with trainers that do so
    count_text every token of a conversation has a loss, the prompts' too; padding has none
    seed       decides which conversations share a row, and the order of the rows
    media      of an encoder: (name, number of tokens) of a medium -> its input; None, where there are no media

    n_cut, n_dropped   number of conversations truncated and dropped
    n_filled           number of positions that hold a token
    """

    def __init__(
        self,
        conversations: Conversations,
        ctx_len: int,
        *,
        packing: bool = True,
        truncate: str = "end",
        count_all: bool = False,
        count_text: bool = False,
        seed: int = 0,
        media: MediaInputs | None = None,
    ) -> None:
        self.media = media
        self.conversations = conversations
        self.ctx_len = ctx_len
        self.packing = packing
        self.count_all, self.count_text = count_all, count_text
        self.seed = seed
        # n tokens make n - 1 pairs of input and target; count_all adds a target 0 after the last token.
        positions = conversations.data.sizes.astype(np.int64) - (0 if count_all else 1)
        used_positions = np.minimum(positions, ctx_len)
        too_long = positions > ctx_len
        if too_long.any() and truncate == "error":
            first = int(np.flatnonzero(too_long)[0])
            raise UserError(
                f"{int(too_long.sum())} of {len(positions)} conversations are longer; the first is number {first} with "
                f"{positions[first]} positions",
                flag="ctx_len",
                given=ctx_len,
                advice="increase --ctx_len, or use --truncate end or drop",
            )
        if conversations.media is not None:  # a cut within a medium is one before it
            for index in np.flatnonzero(too_long).tolist():
                ids, _ = conversations.read(index)
                counts = [count for _, count in conversations.media_of(index)]
                used_positions[index] = whole_media(ids, counts, ctx_len)[0]
        counts_any = count_all or count_text
        kept = np.ones_like(too_long) if counts_any and truncate == "end" else ~too_long
        if truncate == "end" and not counts_any:  # else every conversation has targets, however short it is cut
            # Only the cut ones: the cache holds no conversation without an answer.
            for index in np.flatnonzero(too_long).tolist():
                kept[index] = (conversations.data[index][1 : used_positions[index] + 1] >= 0).any()
        used = np.flatnonzero(kept)
        self.n_cut = int(too_long[used].sum())
        self.n_dropped = len(positions) - len(used)
        if not len(used):
            raise UserError(
                "no conversation has an answer within this length",
                flag="ctx_len",
                given=ctx_len,
                advice="increase --ctx_len or use other data",
            )
        self._positions = used_positions  # of each conversation, as far as it is used
        lengths = used_positions[used]
        self.n_filled = int(lengths.sum())
        rows = pack(lengths, ctx_len, seed) if packing else one_per_row(len(used))
        self._rows = Packing(used[rows.members], rows.bounds)
        self._order: tuple[int, Indices] = (-1, np.empty(0, np.int64))  # epoch, its order: see `packed_row`

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def filled(self) -> float:
        """The fraction of positions that hold a token."""
        return self.n_filled / (len(self) * self.ctx_len)

    @cached_property
    def target_counts(self) -> npt.NDArray[np.int32]:
        """Number of targets with a loss of each row, int32 [rows]. Reads all conversations once, at the first use."""
        if self.count_all:
            return np.full(len(self), self.ctx_len, np.int32)
        data = self.conversations.data
        bounds = np.concatenate([[0], np.cumsum(data.sizes, dtype=np.int64)])
        counts = np.empty(len(data), np.int32)  # by conversation
        first = 0
        while first < len(data):
            last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + _COUNTED_TOKENS, "right")) - 1)
            # Counts of a conversation are differences of a running sum; tokens with a loss are >= 0, see sft_cache.
            is_counted = data.read(int(bounds[first]), int(bounds[last])) >= 0
            before = np.concatenate([[0], np.cumsum(is_counted, dtype=np.int32)])
            begins = bounds[first:last] - bounds[first] + 1  # + 1: the first token is never a target
            ends = np.minimum(begins + self._positions[first:last], bounds[first + 1 : last + 1] - bounds[first])
            counts[first:last] = ends - begins if self.count_text else before[ends] - before[begins]
            first = last
        return np.add.reduceat(counts[self._rows.members], self._rows.bounds[:-1])

    def sample(self, n: int) -> SftBatch:
        """The n-th row of a run (0, 1, 2, ...), which reads all rows in every epoch, each time in another order."""
        return self.row(self.packed_row(n))

    def packed_row(self, n: int) -> int:
        """Index in the packing of the n-th row of a run."""
        epoch, index = divmod(n, len(self))
        if self._order[0] != epoch:  # kept, because sorting millions of rows for each sample would be slow
            self._order = (epoch, epoch_order(len(self), self.seed, epoch))
        return int(self._order[1][index])

    def first_conversation(self, number: int) -> int:
        """The conversation that a row, by its index in the packing, begins with."""
        return int(self._rows.row(number)[0])

    def row(self, number: int) -> SftBatch:
        """One row by its index in the packing."""
        inputs = np.zeros(self.ctx_len, np.int64)
        targets = np.full(self.ctx_len, 0 if self.count_all else IGNORED, np.int64)
        ends = [0]
        media: list[tuple[str, int]] = []
        for index in self._rows.row(number):
            ids, counts = self.conversations.read(int(index))
            following = ids if self.count_text else np.where(counts, ids, IGNORED)
            if self.count_all:
                ids = following = np.append(ids, 0)
            length = int(self._positions[index])
            if self.media is not None:
                of_this = self.conversations.media_of(int(index))
                media += of_this[: whole_media(ids, [count for _, count in of_this], length)[1]]
            begin, end = ends[-1], ends[-1] + length
            inputs[begin:end] = ids[:length]
            targets[begin:end] = following[1 : length + 1]
            ends.append(end)
        if not self.packing:
            # Padding continues its conversation, as in the trainers that --packing 0 is compared with.
            ends = [0, self.ctx_len]
        elif ends[-1] < self.ctx_len:  # padding is a document of its own, not a continuation
            ends.append(self.ctx_len)
        row = SftBatch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.tensor(ends, dtype=torch.int32))
        if self.media is None:
            return row
        inputs_of_media = [self.media(name, count) for name, count in media]
        lengths_of_media = torch.tensor([len(part) for part in inputs_of_media], dtype=torch.int64)
        return row._replace(media=(torch.cat([self.media.blank[:0], *inputs_of_media]), lengths_of_media))


class SftDataset(Dataset[tuple[SftBatch, float]]):
    """The rows of one rank, for a DataLoader with `collate_fn=collate_shares`.

    Item i is (row, mean number of targets with a loss per micro batch of its step); the mean is 0 where the step is a
    single micro batch.

    first_sample     number of the first row of the run to read, over all ranks
    n_samples        number of rows that this rank reads, a multiple of `micro_bsz`
    skipped_samples  ranges (first, count) of rows that are never read; later rows take their places
    micro_bsz        rows per micro batch
    micro_batches    micro batches per step on each rank
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
        self._step_mean: tuple[int, float] = (-1, 0.0)
        self.first_sample = first_sample
        self.n_samples = n_samples
        self.rank = rank
        self.world_size = world_size
        self.skipped_samples = tuple(skipped_samples)
        if micro_batches * world_size > 1:
            rows.target_counts  # noqa: B018 (computed here once, not in every loader process)

    def __len__(self) -> int:
        return self.n_samples

    def __getitem__(self, item: int) -> tuple[SftBatch, float]:
        if not 0 <= item < self.n_samples:
            raise IndexError(f"row {item} of {self.n_samples}")
        n = sample_number(item, self.first_sample, self.rank, self.world_size)
        return self.rows.sample(nth_kept_sample(n, self.skipped_samples)), self._mean_target_count(item)

    def _mean_target_count(self, item: int) -> float:
        """Mean number of targets with a loss over all micro batches of the step, on all ranks."""
        # Each rank counts the rows of all ranks: no communication, and loader processes can do it ahead of time.
        shares = self.micro_batches * self.world_size
        if shares == 1:
            return 0.0
        # Steps are counted from `first_sample`, which is always the beginning of a step.
        step = item // (self.micro_bsz * self.micro_batches)
        if self._step_mean[0] != step:
            first = self.first_sample + step * self.micro_bsz * shares
            numbers = [
                self.rows.packed_row(nth_kept_sample(n, self.skipped_samples))
                for n in range(first, first + self.micro_bsz * shares)
            ]
            self._step_mean = (step, int(self.rows.target_counts[numbers].sum(dtype=np.int64)) / shares)
        return self._step_mean[1]

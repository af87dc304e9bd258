"""Pretraining samples: windows of ctx_len + 1 tokens of a token file, in the order of `sample_order`."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from src.dataset.binidx import MMapIndexedDataset
from src.dataset.sample_order import check_magic_prime, nth_kept_sample, sample_number, sample_offset
from src.errors import UserError


class PretrainDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The samples of one rank: item i is (inputs, targets), int64 [ctx_len] each, targets shifted by one token.

    path             the dataset: X, X.bin or X.idx
    prime            the magic prime of this data and ctx_len, as of `magic_prime(tokens, ctx_len)`
    first_sample     number of the first sample of the run to read, over all ranks
    n_samples        number of samples that this rank reads, a multiple of `micro_bsz`
    skipped_samples  ranges (first, count) of samples that are never read; later samples take their places
    vocab_size       upper bound of the ids; reading an id outside of 0 .. vocab_size - 1 is a UserError

    Immutable after construction: any item can be read at any time, in any process.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        ctx_len: int,
        prime: int,
        first_sample: int,
        n_samples: int,
        micro_bsz: int,
        rank: int,
        world_size: int,
        vocab_size: int,
        skipped_samples: Sequence[tuple[int, int]] = (),
    ) -> None:
        assert 0 <= rank < world_size
        assert n_samples % micro_bsz == 0, "a rank reads complete micro batches"
        self.data = MMapIndexedDataset(path)  # pickled by its path, so loader processes map the same file
        # Before the first sample: a wrong prime would read past the end of the data, or the same windows twice.
        check_magic_prime(prime, self.data.n_tokens, ctx_len)
        self.ctx_len = ctx_len
        self.prime = prime
        self.first_sample = first_sample
        self.n_samples = n_samples
        self.rank = rank
        self.world_size = world_size
        self.vocab_size = vocab_size
        self.skipped_samples = tuple(skipped_samples)

    def __len__(self) -> int:
        return self.n_samples

    def __getitem__(self, item: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= item < self.n_samples:
            raise IndexError(f"sample {item} of {self.n_samples}")
        n = nth_kept_sample(sample_number(item, self.first_sample, self.rank, self.world_size), self.skipped_samples)
        offset = sample_offset(n, self.prime, self.ctx_len)
        # A copy, because the map is read-only and embeddings take int32 or int64 ids.
        window = self.data.read(offset, offset + self.ctx_len + 1).astype(np.int64)
        # Here, because the embedding would fail with an index error on a CPU and with a device assert on a GPU.
        if window.max() >= self.vocab_size or window.min() < 0:
            self.data.check_unchanged()  # a file that was written over has any number
            index = int(np.flatnonzero((window >= self.vocab_size) | (window < 0))[0])
            raise UserError(
                f"{self.data.bin_path} has token id {window[index]} at position {offset + index}",
                flag="vocab_size",
                given=self.vocab_size,
                advice="use the vocabulary size of the tokenizer that created the data",
            )
        tokens = torch.from_numpy(window)
        return tokens[:-1], tokens[1:]  # two views of one window


def collate_documents(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """Windows one after another in a row, in which each document is apart: inputs and targets int64 [1, B T], the
    bounds cu_seqlens int32 [D + 1], and the weight of the row in its step, fp32 [], which is 1.

    A document ends with its token 0, or with the window.
    """
    inputs = torch.stack([tokens for tokens, _ in samples])
    is_end = inputs == 0
    is_end[:, -1] = True
    ends = is_end.flatten().nonzero().flatten() + 1
    bounds = torch.cat([torch.zeros(1, dtype=torch.int32), ends.to(torch.int32)])
    targets = torch.cat([targets for _, targets in samples])
    return inputs.view(1, -1), targets[None], bounds, torch.tensor(1.0)

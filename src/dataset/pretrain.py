"""Pretraining samples: windows of ctx_len + 1 tokens from a flat token file, in the order of `sampling`."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from src.dataset.binidx import MMapIndexedDataset
from src.dataset.sample_order import check_magic_prime, nth_kept_sample, sample_number, sample_offset
from src.errors import UserError


class PretrainDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """What one rank reads: item i is (inputs, targets), int64 [ctx_len] each, targets one token further on.

    path          the dataset, X or X.bin or X.idx
    prime         the magic prime of this data and ctx_len (`magic_prime(tokens, ctx_len)`)
    first_sample  number of the run's sample at which this start begins, over all ranks
    n_samples     how many samples this rank reads: its length, a multiple of `micro_bsz`
    skipped_samples         samples left out for good, (first, count): the later ones move up
    vocab_size    every id must be below it; otherwise a ValueError names the id and where it stands

    Nothing changes after construction: any item can be read at any time, in any process.
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
        assert n_samples % micro_bsz == 0, "a rank reads whole micro batches"
        self.data = MMapIndexedDataset(path)
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

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= index < self.n_samples:
            raise IndexError(f"sample {index} of {self.n_samples}")
        n = nth_kept_sample(sample_number(index, self.first_sample, self.rank, self.world_size), self.skipped_samples)
        offset = sample_offset(n, self.prime, self.ctx_len)
        window = self.data.tokens[offset : offset + self.ctx_len + 1].astype(np.int64)
        if window.max() >= self.vocab_size or window.min() < 0:
            at = int(np.flatnonzero((window >= self.vocab_size) | (window < 0))[0])
            raise UserError(
                f"{self.data.bin_path} holds the id {window[at]} at token {offset + at}, outside of --vocab_size "
                f"{self.vocab_size}: give the vocabulary size of the tokenizer that made this data."
            )
        tokens = torch.from_numpy(window)
        return tokens[:-1], tokens[1:]

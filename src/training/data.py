"""What a run reads: pretraining windows or conversations, each as numbered samples that any process can read from anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from src.config import RunConfig
from src.dataset.binidx import MMapIndexedDataset
from src.dataset.pretrain import PretrainDataset
from src.dataset.sample_order import check_magic_prime, magic_prime, sample_offset
from src.dataset.sft import SftDataset, SftRows, collate_shares
from src.dataset.sft_cache import Conversations, look_at_conversations, open_conversations
from src.errors import UserError

# windows of the data whose ids are compared with vocab_size before the start; every batch is checked later
SAMPLED_WINDOWS = 256
SkippedSamples = Sequence[tuple[int, int]]


class Samples(Protocol):
    """The numbered samples of a run."""

    prime: int  # of the order; 0 where there is none
    once: int  # positions of one pass over the data
    identity: str  # the same for the same data, wherever the file lies
    words: str  # for the summary
    collate: Any  # how a list of samples becomes a batch; None: stacked as they are

    def dataset(
        self, first: int, count: int, rank: int, world_size: int, skipped_samples: SkippedSamples, vocab_size: int
    ) -> Dataset:
        """The `count` samples of one rank, from the run's sample `first` on, without those in `skipped_samples`."""
        ...

    def check_ids(self, vocab_size: int) -> None:
        """Raises ValueError when the data doesn't fit the vocabulary, as far as a quick look tells."""
        ...

    def largest_id(self) -> int: ...

    def place(self, sample: int) -> str:
        """Where a sample lies, for someone who wants to look at it."""
        ...


class PretrainSamples:
    """Windows of a binidx file in the order of the magic prime."""

    collate = None

    def __init__(self, config: RunConfig) -> None:
        self.config, self.data = config, MMapIndexedDataset(config.data_file)
        self.prime = config.magic_prime or magic_prime(self.data.n_tokens, config.ctx_len)
        check_magic_prime(self.prime, self.data.n_tokens, config.ctx_len)
        self.once = self.data.n_tokens
        ends = hashlib.sha256(self.data.tokens[:1_000_000].tobytes() + self.data.tokens[-1_000_000:].tobytes())
        self.identity = f"{self.data.n_tokens} tokens {ends.hexdigest()[:16]}"
        self.words = f"{config.data_file}, {self.data.n_tokens:,} tokens, magic prime {self.prime:,}"

    def dataset(
        self, first: int, count: int, rank: int, world_size: int, skipped_samples: SkippedSamples, vocab_size: int
    ) -> Dataset:
        c = self.config
        return PretrainDataset(
            c.data_file, c.ctx_len, self.prime, first, count, c.micro_bsz, rank, world_size, vocab_size, skipped_samples
        )

    def check_ids(self, vocab_size: int) -> None:
        for at, ids in self.sampled_windows():
            largest = int(ids.max())
            if largest >= vocab_size:
                raise UserError(
                    f"--data_file {self.config.data_file}: token id {largest} near position {at:,} doesn't fit --vocab_size "
                    f"{vocab_size}; the data was made with another tokenizer: give its --vocab_size, or make the data anew"
                )

    def sampled_windows(self) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """(position, ids [ctx_len]) of SAMPLED_WINDOWS windows, spread over the data."""
        last = max(0, self.data.n_tokens - self.config.ctx_len)
        for at in np.linspace(0, last, SAMPLED_WINDOWS).astype(np.int64).tolist():
            yield at, self.data.tokens[at : at + self.config.ctx_len]

    def largest_id(self) -> int:
        tokens = self.data.tokens
        return max(int(tokens[i : i + (1 << 24)].max()) for i in range(0, len(tokens), 1 << 24))

    def place(self, sample: int) -> str:
        return f"token {sample_offset(sample, self.prime, self.config.ctx_len):,} of {self.config.data_file}"


class SftSamples:
    """Conversations, packed into rows of ctx_len positions; only what the assistant wrote counts, unless --sft_loss all."""

    collate = staticmethod(collate_shares)
    prime = 0

    def __init__(self, config: RunConfig, conversations: Conversations | None = None) -> None:
        self.config = config
        conversations = conversations or open_conversations(config.data_file, config.tokenizer)
        seed = max(0, config.random_seed)  # an order that isn't asked for is the same at every start
        self.rows = SftRows(
            conversations,
            config.ctx_len,
            packing=bool(config.packing),
            truncate=config.truncate,
            count_all=config.sft_loss == "all",
            seed=seed,
        )
        self.once = len(self.rows) * config.ctx_len
        sizes = hashlib.sha256(conversations.data.sizes.tobytes() + conversations.data.tokens[:1_000_000].tobytes())
        self.identity = f"{len(conversations.data)} conversations {sizes.hexdigest()[:16]} order {seed}"
        left_out = sum(conversations.left_out.values())
        self.words = (
            f"{config.data_file}, {len(conversations.data):,} conversations in {len(self.rows):,} rows, "
            f"{self.rows.filled:.0%} of the positions filled; {self.rows.n_cut:,} cut, {self.rows.n_dropped:,} too long, "
            f"{left_out:,} lines unusable"
        )

    def dataset(
        self, first: int, count: int, rank: int, world_size: int, skipped_samples: SkippedSamples, vocab_size: int
    ) -> Dataset:
        c = self.config
        return SftDataset(
            self.rows, first, count, rank, world_size, skipped_samples, c.micro_bsz, c.accumulate_grad_batches
        )

    def check_ids(self, vocab_size: int) -> None:
        largest = self.largest_id()
        if largest >= vocab_size:
            raise UserError(
                f"--tokenizer {self.config.tokenizer}: its token {largest} doesn't fit --vocab_size {vocab_size} of the model; "
                "fine-tune with the tokenizer that the model was trained with"
            )

    def largest_id(self) -> int:
        coded = self.rows.conversations.data.tokens
        return max(
            int(np.where(part < 0, ~part, part).max()) for part in np.array_split(coded, 1 + len(coded) // (1 << 24))
        )

    def place(self, sample: int) -> str:
        return f"row {sample % len(self.rows)} of epoch {sample // len(self.rows)} of {self.config.data_file}"


def open_samples(config: RunConfig) -> Samples:
    """The data of a run. Raises ValueError naming the flag when it is missing, damaged, or doesn't fit the settings."""
    return SftSamples(config) if config.data_type == "sft" else PretrainSamples(config)


def peek_samples(config: RunConfig) -> tuple[Samples, float]:
    """As `open_samples`, leaving nothing behind: conversations that were not tokenised before are only looked at, in which case the share
    of the file that was seen is below 1."""
    if config.data_type != "sft":
        return PretrainSamples(config), 1.0
    conversations, share = look_at_conversations(config.data_file, config.tokenizer)
    return SftSamples(config, conversations), share

"""Training and held-out samples: pretraining windows or conversations, numbered, so that any process reads any of them.

The order is a pure function of the sample number; no loader has a state. See src/dataset/sample_order.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from src.config import PLACEHOLDER, RunConfig
from src.dataset.binidx import MMapIndexedDataset
from src.dataset.control_tokens import parses_special_tokens
from src.dataset.media_reader import MediaReader
from src.dataset.pretrain import PretrainDataset, collate_documents
from src.dataset.sample_order import check_magic_prime, magic_prime, sample_offset
from src.dataset.sft import IGNORED, SftBatch, SftDataset, SftRows, collate, collate_shares
from src.dataset.sft_cache import Conversations, look_at_conversations, open_conversations
from src.dataset.unusable_lines import unusable_warning
from src.errors import UserError
from src.inference.windows import windows
from src.multimodal.config import media_of, reader_of
from src.multimodal.media_input import MediaInput

# Windows whose ids are compared with vocab_size before the start, spread over the data; every batch is checked when it
# is read.
SAMPLED_WINDOWS = 256
SkippedSamples = Sequence[tuple[int, int]]  # (first sample, count)
Batch = tuple[Tensor, ...]


class Samples(Protocol):
    """The numbered samples of a run."""

    prime: int  # of the order; 0 where there is none
    tokens_per_epoch: int  # positions of one pass over the data
    identity: str  # equal for equal data, wherever the file lies
    order_seed: int | None  # of the shuffle; None where the order has no seed
    summary: str
    warnings: Sequence[str]  # what is damaged in the files, and how they are read all the same

    @property
    def collate(self) -> Callable[[list[Any]], Any] | None:
        """How a list of samples becomes a batch; None: stacked as they are."""
        ...

    def dataset(
        self, first: int, count: int, rank: int, world_size: int, skipped_samples: SkippedSamples, vocab_size: int
    ) -> Dataset:
        """The `count` samples of one rank, from the run's sample `first` on, without those in `skipped_samples`."""
        ...

    def check_ids(self, vocab_size: int) -> None:
        """Raises UserError when the data doesn't fit the vocabulary, as far as a quick look tells."""
        ...

    def largest_id(self) -> int: ...

    def check_unchanged(self) -> None:
        """Raises DataFileError when a file was truncated or replaced since it was opened."""
        ...

    def locate(self, sample: int) -> str:
        """Where a sample lies in the data, for people."""
        ...


class PretrainSamples:
    """Windows of a binidx file in the order of the magic prime."""

    order_seed: int | None = None

    @property
    def collate(self) -> Callable[[list[Any]], Any] | None:
        return collate_documents if self.config.document_states else None

    def __init__(self, config: RunConfig) -> None:
        self.config, self.data = config, MMapIndexedDataset(config.data_file)
        # given, it is checked all the same: a wrong one reads some windows twice and others never
        self.prime = config.magic_prime or magic_prime(self.data.n_tokens, config.ctx_len)
        check_magic_prime(self.prime, self.data.n_tokens, config.ctx_len)
        self.tokens_per_epoch = self.data.n_tokens
        # both ends: hashing all of a large file would delay every start by minutes
        n_tokens = self.data.n_tokens
        first, last = self.data.read(0, 1_000_000), self.data.read(max(0, n_tokens - 1_000_000), n_tokens)
        ends = hashlib.sha256(first.tobytes() + last.tobytes())
        self.identity = f"{self.data.n_tokens} tokens {ends.hexdigest()[:16]}"
        self.summary = f"{config.data_file}, {self.data.n_tokens:,} tokens, magic prime {self.prime:,}"
        self.warnings: Sequence[str] = self.data.warnings

    def dataset(
        self, first: int, count: int, rank: int, world_size: int, skipped_samples: SkippedSamples, vocab_size: int
    ) -> Dataset:
        c = self.config
        return PretrainDataset(
            c.data_file, c.ctx_len, self.prime, first, count, c.micro_bsz, rank, world_size, vocab_size, skipped_samples
        )

    def check_ids(self, vocab_size: int) -> None:
        for position, ids in self.sampled_windows():
            largest, smallest = int(ids.max()), int(ids.min())
            if smallest < 0:
                raise UserError(
                    f"token id {smallest} near position {position:,} is below 0",
                    flag="data_file",
                    given=self.config.data_file,
                    advice="it is not a data set for pretraining; a cache of conversations (X.jsonl.sft) is used by "
                    "--data_type sft --data_file X.jsonl",
                )
            if largest >= vocab_size:
                raise UserError(
                    f"token id {largest} near position {position:,} doesn't fit --vocab_size {vocab_size}",
                    flag="data_file",
                    given=self.config.data_file,
                    advice="the data was made with another tokenizer: give its --vocab_size, or make the data again",
                )

    def sampled_windows(self) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """(position, ids [ctx_len]) of SAMPLED_WINDOWS windows, evenly spaced."""
        last = max(0, self.data.n_tokens - self.config.ctx_len)
        for position in np.linspace(0, last, SAMPLED_WINDOWS).astype(np.int64).tolist():
            yield position, self.data.read(position, position + self.config.ctx_len)

    def largest_id(self) -> int:
        return max(int(piece.max()) for piece in _pieces(self.data))

    def check_unchanged(self) -> None:
        self.data.check_unchanged()

    def locate(self, sample: int) -> str:
        return f"token {sample_offset(sample, self.prime, self.config.ctx_len):,} of {self.config.data_file}"


class SftSamples:
    """Conversations, packed into rows of ctx_len positions. Only the assistant's answers count, unless --sft_loss
    all."""

    prime = 0
    order_seed: int | None
    warnings: Sequence[str] = ()  # its binidx files are caches that this project writes

    @property
    def collate(self) -> Callable[[list[Any]], Any] | None:
        return collate_shares

    def __init__(self, config: RunConfig, conversations: Conversations | None = None) -> None:
        self.config = config
        reader = media_reader(config)
        conversations = conversations or open_conversations(
            config.data_file,
            config.tokenizer,
            parse_special=parses_special_tokens(config.special_tokens),
            think=config.think,
            reader=reader,
        )
        media = media_of(config)
        self.media = MediaInput(media, reader) if media is not None and reader is not None else None
        # Without --random_seed each start draws one; the order must not change with it, or a resumed run would read
        # other rows.
        self.order_seed = max(0, config.random_seed)
        self.rows = SftRows(
            conversations,
            config.ctx_len,
            packing=bool(config.packing),
            truncate=config.truncate,
            count_all=config.sft_loss == "all",
            count_text=config.sft_loss == "text",
            seed=self.order_seed,
            media=self.media,
        )
        self.tokens_per_epoch = len(self.rows) * config.ctx_len
        sizes = hashlib.sha256(conversations.data.sizes.tobytes() + conversations.data.read(0, 1_000_000).tobytes())
        self.identity = f"{len(conversations.data)} conversations {sizes.hexdigest()[:16]} order {self.order_seed}"
        self.unusable_warning = unusable_warning(conversations.left_out, len(conversations.data))
        unusable = sum(conversations.left_out.values())
        self.summary = (
            f"{config.data_file}, {len(conversations.data):,} conversations in {len(self.rows):,} rows, "
            f"{self.rows.filled:.0%} of the positions filled; {self.rows.n_cut:,} truncated, "
            f"{self.rows.n_dropped:,} too long, {unusable:,} lines unusable"
        )

    def dataset(
        self, first: int, count: int, rank: int, world_size: int, skipped_samples: SkippedSamples, vocab_size: int
    ) -> Dataset:
        c = self.config
        accumulate = c.accumulate_grad_batches
        return SftDataset(self.rows, first, count, rank, world_size, skipped_samples, c.micro_bsz, accumulate)

    def check_ids(self, vocab_size: int) -> None:
        largest = self.largest_id()
        if largest >= vocab_size:
            raise UserError(
                f"its token {largest} doesn't fit --vocab_size {vocab_size} of the model",
                flag="tokenizer",
                given=self.config.tokenizer,
                advice="fine-tune with the tokenizer that the model was trained with",
            )

    def largest_id(self) -> int:
        return self.rows.conversations.largest_id()

    def check_unchanged(self) -> None:
        self.rows.conversations.data.check_unchanged()

    def locate(self, sample: int) -> str:
        return f"row {sample % len(self.rows)} of epoch {sample // len(self.rows)} of {self.config.data_file}"


def _pieces(data: MMapIndexedDataset) -> Iterator[npt.NDArray[Any]]:
    """All tokens, 16 M at a time."""
    for start in range(0, data.n_tokens, 1 << 24):
        yield data.read(start, start + (1 << 24))


def media_reader(config: RunConfig) -> MediaReader | None:
    """How the pictures or sounds of a run's conversations are read; None where it has no encoder. Raises UserError."""
    media = media_of(config)
    if media is None:
        return None
    folder = config.media_folder or str(Path(config.data_file).parent)
    return reader_of(media, folder, is_strict=config.broken_media == "stop")


def open_samples(config: RunConfig) -> Samples:
    """The data of a run. Raises UserError when it is missing, damaged, or doesn't fit the settings."""
    return SftSamples(config) if config.data_type == "sft" else PretrainSamples(config)


def peek_samples(config: RunConfig) -> tuple[Samples, float]:
    """As `open_samples`, without writing a cache: of conversations that were not tokenised before only the first are
    read.

    The second result is the share of the file that was read, below 1 in that case.
    """
    if config.data_type != "sft":
        return PretrainSamples(config), 1.0
    parse_special = parses_special_tokens(config.special_tokens)
    reader = media_reader(config)
    conversations, share = look_at_conversations(
        config.data_file, config.tokenizer, parse_special, config.think, reader
    )
    return SftSamples(config, conversations), share


def _collated(rows: list[SftBatch]) -> Batch:
    return collate(rows).tensors


class SamplePrompt(NamedTuple):
    """The beginning of a sample, how the data go on, and of a front end: the input of the whole row, of which the first
    rows are the prompt's, and the files in the prompt."""

    ids: list[int]
    continuation: list[int]
    media: tuple[Tensor, ...] = ()
    files: tuple[Path, ...] = ()


class HeldOut:
    """The samples of --val_data_file that are evaluated: --val_windows of them, evenly spaced, the same ones every
    time.

    Raises UserError, before any training time is spent, when the file can't be read.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._sample: Callable[[int], Batch]
        self.warnings: Sequence[str] = ()
        if config.data_type == "binidx":
            self._data = MMapIndexedDataset(config.val_data_file)
            self.warnings = self._data.warnings
            self._windows = list(windows(self._data.n_tokens, config.ctx_len, config.val_windows, flag="val_data_file"))
            self._collate: Callable[[list[Any]], Any] = torch.utils.data.default_collate
            if config.document_states:
                self._collate = collate_documents
            self.count = len(self._windows)
            self._sample = self._window
        else:
            # fixed, so that two runs with other settings are measured on the same rows
            changed = {"data_file": config.val_data_file, "truncate": "end", "random_seed": 0}
            self.rows: SftRows = SftSamples(replace(config, **changed)).rows  # type: ignore[arg-type]
            self._data = self.rows.conversations.data
            self._sample, self._collate = self._row, _collated  # type: ignore[assignment]
            self.count = min(len(self.rows), config.val_windows)

    def check_ids(self, vocab_size: int) -> None:
        """Raises UserError when a token of these samples doesn't fit the vocabulary."""
        for number in range(self.count):
            inputs, targets, *packed = self._sample(number)
            largest = max(int(inputs.max()), int(targets.max()))
            # The targets of conversations are negative where they don't count.
            smallest = int(inputs.min()) if packed else min(int(inputs.min()), int(targets.min()))
            if smallest < (PLACEHOLDER if self.config.encoder else 0):
                raise UserError(
                    f"token id {smallest} is below 0",
                    flag="val_data_file",
                    given=self.config.val_data_file,
                    expected="data made with the tokenizer of the training data",
                )
            if largest >= vocab_size:
                raise UserError(
                    f"token id {largest} doesn't fit --vocab_size {vocab_size}",
                    flag="val_data_file",
                    given=self.config.val_data_file,
                    expected="data made with the tokenizer of the training data",
                )

    def check_unchanged(self) -> None:
        """Raises DataFileError when a file was truncated or replaced since it was opened."""
        self._data.check_unchanged()

    def _window(self, number: int) -> Batch:
        window = self._windows[number]
        ids = torch.from_numpy(self._data.read(window.start, window.stop).astype(np.int64))
        return ids[:-1], ids[1:]

    def _row(self, number: int) -> SftBatch:
        return self.rows.row(number * len(self.rows) // self.count)

    def batches(self, rank: int, world_size: int) -> Iterator[Batch]:
        """A rank's share. Every rank gets the same number of batches, all of one shape, since a forward pass may be
        collective: what is missing is filled with samples that don't count."""
        per_rank = -(-self.count // world_size)
        size = min(self.config.micro_bsz, per_rank)
        for first in range(0, per_rank, size):
            batch = []
            for i in range(first, first + size):
                number = i * world_size + rank
                is_filler = number >= self.count or i >= per_rank
                inputs, targets, *packed = self._sample(0 if is_filler else number)
                if is_filler:
                    targets = torch.full_like(targets, IGNORED)
                batch.append(SftBatch(inputs, targets, *packed) if packed else (inputs, targets))  # type: ignore[arg-type]
            yield tuple(self._collate(batch))  # type: ignore[arg-type]

    def prompts(self, count: int, max_tokens: int) -> Iterator[SamplePrompt]:
        """`count` samples: of a window its first tokens, at most `max_tokens`; of a conversation its first question."""
        for i in range(min(count, self.count)):
            number = i * self.count // min(count, self.count)
            inputs, targets, *packed = self._sample(number)
            first = int((targets >= 0).int().argmax()) + 1 if packed else min(max_tokens, len(inputs) - 1)
            last = first
            while last < len(targets) and targets[last] >= 0:
                last += 1
            prompt = SamplePrompt(inputs[:first].tolist(), targets[first - 1 : last].tolist())
            if self.config.encoder:
                prompt = self._with_media(prompt, number, packed[1])  # type: ignore[arg-type]
            yield prompt

    def _with_media(self, prompt: SamplePrompt, number: int, media: tuple[Tensor, ...]) -> SamplePrompt:
        index = self.rows.first_conversation(number * len(self.rows) // self.count)
        source, names, places = self.rows.media, [], prompt.ids.count(PLACEHOLDER)
        assert isinstance(source, MediaInput)
        for name, tokens in self.rows.conversations.media_of(index):
            if places > 0:
                names.append(source.reader.path(name))
                places -= tokens
        return prompt._replace(media=media, files=tuple(names))

"""Is the data what the run takes it for: ids within the vocabulary, documents that end, readable text by the tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch

from src import run_folder
from src.config import RunConfig
from src.dataset.sft_cache import look_at_conversations
from src.dataset.tokenizer import WORLD_VOCAB_SIZE, Tokenizer, load_tokenizer
from src.training.data import SAMPLED_WINDOWS, HeldOut, PretrainSamples, Samples, SftSamples
from src.training.preflight.checklist import Checklist, Finding

SHOWN_TEXT = 160  # characters of the decoded window
SAMPLED_DOCUMENTS = 200
STRANGE_TEXT = 0.05  # share of unreadable characters from which a tokenizer is thought to be the wrong one


def check_data(checks: Checklist, config: RunConfig, samples: Samples, share: float, vocab_size: int) -> None:
    """What --data_file holds, of which `share` was seen. Raises ValueError when its ids don't fit the vocabulary."""
    checks.found(
        "data",
        samples.summary + f"; the first {share:.1%} of the file, the rest is tokenised at the start" * (share < 1),
    )
    ends, (ids, largest) = document_ends(samples), _sampled_ids(samples)
    checks.take(Finding("", f"{ends.detail}; ids {ids}, vocabulary {vocab_size:,}", ends.to_do))
    samples.check_ids(vocab_size)
    tokenizer = _tokenizer(config, vocab_size)
    if tokenizer is None:
        checks.found("", "give --tokenizer to see a piece of it as text")
    else:
        _check_text(checks, tokenizer, _first_window(config, samples), vocab_size, largest)


def look_at_held_out(config: RunConfig, vocab_size: int) -> str:
    """What --val_data_file holds, in words. Raises ValueError when it can't be read, or its ids don't fit the vocabulary."""
    if config.data_type == "sft":  # to look at all of it would leave its tokens behind
        conversations, _ = look_at_conversations(config.val_data_file, config.tokenizer)
        return f"{config.val_data_file}, {len(conversations.data):,} conversations looked at"
    held_out = HeldOut(config)
    held_out.check_ids(vocab_size)
    return f"{config.val_data_file}, {held_out.count} windows"


def document_ends(samples: Samples) -> Finding:
    """Whether documents end with token 0; of conversations, how many tokens are answers."""
    if isinstance(samples, SftSamples):
        found = samples.rows.conversations
        return Finding("", f"{found.answer_tokens:,} tokens of {len(found.data.tokens):,} are answers")
    assert isinstance(samples, PretrainSamples)
    data = samples.data
    documents = len(data.doc_idx) - 1
    sampled = np.unique(np.linspace(0, documents - 1, min(documents, SAMPLED_DOCUMENTS)).astype(np.int64))
    last = [data[int(data.doc_idx[d + 1]) - 1] for d in sampled.tolist() if data.doc_idx[d + 1] > data.doc_idx[d]]
    open_ends = sum(1 for item in last if len(item) == 0 or item[-1] != 0)
    if not open_ends:
        return Finding("", f"{documents:,} documents, token 0 ends them")
    return Finding(
        "",
        f"{documents:,} documents",
        f"--data_file {data.prefix}: {open_ends} of {len(last)} documents looked at don't end with token 0, so the model can't learn where texts "
        "end; make the data with data/make_data.py",
    )


def _check_text(checks: Checklist, tokenizer: Tokenizer, window: list[int], vocab_size: int, largest: int) -> None:
    """`window` as text, and whether this is the tokenizer that made it; `largest` is the largest id seen in the data."""
    if tokenizer.vocab_size > vocab_size:
        checks.to_do.append(
            f"--vocab_size {vocab_size}: the tokenizer {tokenizer.name} has {tokenizer.vocab_size} entries; use that, or a multiple of 64 above"
        )
    wrong_tokenizer = (
        f"--tokenizer {tokenizer.name}: the data is no readable text with it; name the one that made --data_file"
    )
    if max(window) >= tokenizer.vocab_size:
        checks.to_do.append(wrong_tokenizer)
        return
    text = tokenizer.decode(window)
    checks.found("text", f"{text[:SHOWN_TEXT]!r}, by the tokenizer {tokenizer.name}")
    if text.count("\N{REPLACEMENT CHARACTER}") > STRANGE_TEXT * len(text):
        checks.to_do.append(wrong_tokenizer)
    if largest < vocab_size // 2:
        checks.found(
            "",
            f"the largest id seen is {largest:,}: much of the vocabulary is never used; is it the tokenizer of this data?",
        )


def _sampled_ids(samples: Samples) -> tuple[str, int]:
    """The ids of some windows, spread over the data: in words, and the largest."""
    if not isinstance(samples, PretrainSamples):
        return f"up to {(largest := samples.largest_id()):,}", largest
    ends = [(int(ids.min()), int(ids.max())) for _, ids in samples.sampled_windows()]
    smallest, largest = min(low for low, _ in ends), max(high for _, high in ends)
    return f"{smallest:,} to {largest:,} in {SAMPLED_WINDOWS} windows", largest


def _tokenizer(config: RunConfig, vocab_size: int) -> Tokenizer | None:
    """That of the flags, of the run in --proj_dir, or World where the vocabulary has its size."""
    name = config.tokenizer or run_folder.read_run(Path(config.proj_dir)).get("tokenizer", "")
    if not name and vocab_size == WORLD_VOCAB_SIZE and importlib.util.find_spec("pyrwkv_tokenizer"):
        name = "world"
    return load_tokenizer(name) if name else None


def _first_window(config: RunConfig, samples: Samples) -> list[int]:
    """The ids that the run begins with."""
    item = samples.dataset(0, config.micro_bsz, 0, 1, (), 1 << 62)[0]
    while not isinstance(item, torch.Tensor):  # inputs come first, and rows of conversations bring more with them
        item = item[0]
    return item.tolist()[: 2 * SHOWN_TEXT]

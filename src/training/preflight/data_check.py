"""Checks the data: ids within the vocabulary, an end token after each document, readable text with the tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch

from src import run_folder
from src.config import RunConfig
from src.dataset.control_tokens import parses_special_tokens
from src.dataset.sft_cache import look_at_conversations
from src.dataset.tokenizer import WORLD_VOCAB_SIZE, Tokenizer, load_tokenizer
from src.training.data import SAMPLED_WINDOWS, HeldOut, PretrainSamples, Samples, SftSamples
from src.training.preflight.checklist import Checklist, Finding

PREVIEW_CHARACTERS = 160  # of the text that the run begins with
SAMPLED_DOCUMENTS = 200  # read one by one from the file, so all of a large one would take minutes
# The share of undecodable characters above which the tokenizer counts as the wrong one. Not 0: a window may begin or
# end inside of a character.
MAX_UNDECODABLE_SHARE = 0.05


def check_data(checks: Checklist, config: RunConfig, samples: Samples, share: float, vocab_size: int) -> None:
    """Report what --data_file holds, of which `share` was read. Raises UserError when ids exceed the vocabulary."""
    part = f"; the first {share:.1%} of the file, the rest is tokenized when the run starts" if share < 1 else ""
    checks.report("data", samples.summary + part)
    for warning in samples.warnings:
        checks.report("", f"WARNING: {warning}")
    ends, (ids, largest) = check_document_ends(samples), _sampled_ids(samples)
    checks.add(Finding("", f"{ends.detail}; ids {ids}, vocabulary {vocab_size:,}", ends.problem))
    samples.check_ids(vocab_size)
    tokenizer = _tokenizer(config, vocab_size)
    if tokenizer is None:
        checks.report("", "give --tokenizer for a preview of the text")
    else:
        _check_text(checks, tokenizer, _first_window(config, samples), vocab_size, largest)


def check_held_out(config: RunConfig, vocab_size: int) -> str:
    """A summary of --val_data_file. Raises UserError when it can't be read, or its ids don't fit the vocabulary."""
    if config.data_type == "sft":  # opening all of it would write a cache file, and a check writes nothing
        parse_special = parses_special_tokens(config.special_tokens)
        conversations, _ = look_at_conversations(config.val_data_file, config.tokenizer, parse_special, config.think)
        return f"{config.val_data_file}, {len(conversations.data):,} conversations read"
    held_out = HeldOut(config)
    held_out.check_ids(vocab_size)
    return f"{config.val_data_file}, {held_out.count} windows"


def check_document_ends(samples: Samples) -> Finding:
    """Whether documents end with token 0; of conversations, how many tokens are answers."""
    if isinstance(samples, SftSamples):
        conversations = samples.rows.conversations
        return Finding("", f"{conversations.answer_tokens:,} tokens of {len(conversations.data.tokens):,} are answers")
    assert isinstance(samples, PretrainSamples)
    data = samples.data
    documents = len(data.doc_idx) - 1
    sampled = np.unique(np.linspace(0, documents - 1, min(documents, SAMPLED_DOCUMENTS)).astype(np.int64))
    last = [data[int(data.doc_idx[d + 1]) - 1] for d in sampled.tolist() if data.doc_idx[d + 1] > data.doc_idx[d]]
    without_end = sum(1 for item in last if len(item) == 0 or item[-1] != 0)
    if not without_end:
        return Finding("", f"{documents:,} documents, all {len(last)} sampled ones end with token 0")
    return Finding(
        "",
        f"{documents:,} documents",
        f"--data_file {data.prefix}: {without_end} of {len(last)} sampled documents don't end with token 0, so the "
        "model can't learn where texts end; make the data with data/make_data.py",
    )


def _check_text(checks: Checklist, tokenizer: Tokenizer, window: list[int], vocab_size: int, largest: int) -> None:
    """Print the ids in `window` as text, and check that `tokenizer` made them. `largest` is the largest sampled id."""
    if tokenizer.largest_id >= vocab_size:
        # The data may use few of its ids, but a chat with the model would use others.
        checks.problems.append(
            f"--vocab_size {vocab_size}: the tokenizer {tokenizer.name} has ids up to {tokenizer.largest_id}; use "
            f"{tokenizer.vocab_size}, or the next multiple of 64"
        )
    wrong_tokenizer = (
        f"--tokenizer {tokenizer.name}: the data is not readable text with it; give the one that made --data_file"
    )
    if max(window) >= tokenizer.vocab_size:
        checks.problems.append(wrong_tokenizer)
        return
    text = tokenizer.decode(window)
    checks.report("text", f"{text[:PREVIEW_CHARACTERS]!r}, decoded by the tokenizer {tokenizer.name}")
    if text.count("\N{REPLACEMENT CHARACTER}") > MAX_UNDECODABLE_SHARE * len(text):
        checks.problems.append(wrong_tokenizer)
    if largest < vocab_size // 2:
        # no problem for certain: a small data set may use only the frequent ids of its tokenizer, which come first
        checks.report(
            "",
            f"the largest sampled id is {largest:,}, and much of the vocabulary is unused; is it the data's tokenizer?",
        )


def _sampled_ids(samples: Samples) -> tuple[str, int]:
    """The range of the ids in some windows, evenly spaced over the data, as text; and the largest."""
    if not isinstance(samples, PretrainSamples):
        return f"up to {(largest := samples.largest_id()):,}", largest
    ranges = [(int(ids.min()), int(ids.max())) for _, ids in samples.sampled_windows()]
    smallest, largest = min(low for low, _ in ranges), max(high for _, high in ranges)
    return f"{smallest:,} to {largest:,} in {SAMPLED_WINDOWS} windows", largest


def _tokenizer(config: RunConfig, vocab_size: int) -> Tokenizer | None:
    """That of --tokenizer, else of the run in --proj_dir, else World's where the vocabulary has its size."""
    name = config.tokenizer or run_folder.read_run(Path(config.proj_dir)).get("tokenizer", "")
    if not name and vocab_size == WORLD_VOCAB_SIZE and importlib.util.find_spec("pyrwkv_tokenizer"):
        name = "world"
    return load_tokenizer(name) if name else None


def _first_window(config: RunConfig, samples: Samples) -> list[int]:
    """The ids that the run begins with."""
    item = samples.dataset(0, config.micro_bsz, 0, 1, (), 1 << 62)[0]
    # Pretraining gives (inputs, targets), conversations give rows of several tensors: the inputs come first in both.
    while not isinstance(item, torch.Tensor):
        item = item[0]
    return item.tolist()[: 2 * PREVIEW_CHARACTERS]  # most tokens decode to at least half a character

"""Pretraining windows: the right tokens on any number of ranks, and ids outside of the vocabulary raise."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from src.dataset import BinIdxWriter, magic_prime, sample_offset
from src.dataset.pretrain import PretrainDataset
from src.errors import UserError

TOKENS = 1000
CTX_LEN = 8
PRIME = magic_prime(TOKENS, CTX_LEN)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    with BinIdxWriter(tmp_path / "x", np.uint16) as out:
        out.add_document(np.arange(TOKENS))
    return tmp_path / "x"


def dataset(path: Path, n_samples: int = PRIME, first: int = 0, rank: int = 0, world: int = 1, vocab: int = TOKENS):
    return PretrainDataset(path, CTX_LEN, PRIME, first, n_samples, 1, rank, world, vocab)


def test_windows_follow_the_formula_of_the_order(data: Path) -> None:
    for n, (inputs, targets) in enumerate(DataLoader(dataset(data), batch_size=None)):
        start = sample_offset(n, PRIME, CTX_LEN)
        assert inputs.tolist() == list(range(start, start + CTX_LEN))
        assert targets.tolist() == list(range(start + 1, start + CTX_LEN + 1))
        assert inputs.dtype == targets.dtype == torch.int64


def test_items_are_readable_in_any_order_up_to_the_length(data: Path) -> None:
    windows = dataset(data, n_samples=10)
    assert torch.equal(windows[7][0], list(windows)[7][0])
    with pytest.raises(IndexError):
        windows[10]


@pytest.mark.parametrize("workers", [0, 2])
def test_four_ranks_after_a_restart_read_the_samples_of_one(data: Path, workers: int) -> None:
    alone = [inputs[0].item() for inputs, _ in dataset(data, 40)]
    ranks = [
        [inputs[0].item() for inputs in batch]
        for rank in range(4)
        for batch, _ in DataLoader(dataset(data, 5, 20, rank, 4), batch_size=5, num_workers=workers)
    ]
    assert [start for step in zip(*ranks, strict=True) for start in step] == alone[20:]


@pytest.mark.parametrize(("kind", "bad"), [("uint16", 64), ("int32", -1)])
def test_ids_outside_of_the_vocabulary_raise_with_their_position(tmp_path: Path, kind: str, bad: int) -> None:
    ids = np.full(TOKENS, 63)
    ids[500] = bad
    with BinIdxWriter(tmp_path / "x", kind) as out:
        out.add_document(ids)
    with pytest.raises(UserError) as caught:
        list(dataset(tmp_path / "x", vocab=64))
    assert (caught.value.flag, caught.value.given) == ("vocab_size", 64)
    assert f"token id {bad} at position 500" in caught.value.problem
    assert str(tmp_path / "x.bin") in caught.value.problem


def test_a_wrong_prime_raises_before_the_first_sample(data: Path) -> None:
    with pytest.raises(UserError) as caught:
        PretrainDataset(data, CTX_LEN, 89, 0, 1, 1, 0, 1, TOKENS)
    assert (caught.value.flag, caught.value.given) == ("magic_prime", 89)
    assert str(PRIME) in caught.value.expected


def test_the_smallest_possible_data(tmp_path: Path) -> None:
    with BinIdxWriter(tmp_path / "x", np.uint16) as out:
        out.add_document(np.arange(3 * CTX_LEN))
    windows = PretrainDataset(tmp_path / "x", CTX_LEN, 2, 0, 4, 2, 0, 1, TOKENS)
    assert [inputs[0].item() for inputs, _ in windows] == [8, 0, 8, 0]

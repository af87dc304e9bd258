"""Fixtures that several test files share; helpers that are plain functions are in training_runs.py."""

from pathlib import Path

import numpy as np
import pytest

from src.dataset.binidx import BinIdxWriter


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6,000 tokens of a language that can be learned: each document counts upwards from a random number."""
    prefix = tmp_path_factory.mktemp("data") / "count"
    numbers = np.random.default_rng(0)
    with BinIdxWriter(prefix, np.uint16) as writer:
        for _ in range(200):
            first = int(numbers.integers(1, 30))
            writer.add_document([first + i for i in range(29)] + [0])
    return prefix

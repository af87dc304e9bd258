"""From files to samples: binidx (token files), sampling (their order), pretrain, tokenizer."""

from src.dataset.binidx import BinIdxWriter, MMapIndexedDataset
from src.dataset.sample_order import magic_prime, sample_offset

__all__ = ["BinIdxWriter", "MMapIndexedDataset", "magic_prime", "sample_offset"]

"""From files to samples: binidx (token files), sampling (their order), pretrain, tokenizer."""

from .binidx import BinIdxWriter, MMapIndexedDataset
from .sampling import magic_prime, sample_offset

__all__ = ["BinIdxWriter", "MMapIndexedDataset", "magic_prime", "sample_offset"]

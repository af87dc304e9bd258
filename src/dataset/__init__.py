"""From files to samples: token files, the order of samples, conversations and their packing, tokenizers."""

from src.dataset.binidx import BinIdxWriter, MMapIndexedDataset
from src.dataset.sample_order import magic_prime, sample_offset

# The names that scripts outside of this project import.
__all__ = ["BinIdxWriter", "MMapIndexedDataset", "magic_prime", "sample_offset"]

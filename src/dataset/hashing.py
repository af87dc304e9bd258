"""Keyed 64-bit hashes of integers: the source of every reproducible shuffle of documents, conversations and rows."""

import hashlib

import numpy as np
import numpy.typing as npt


def splitmix64(numbers: npt.NDArray[np.uint64], *key: object) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each number, uint64 of the same shape; different keys give independent hashes.

    The finalizer of SplitMix64 (Steele, Lea and Flood, 2014), started at the BLAKE2b hash of `repr(key)`. Sorting by it
    gives a permutation that depends on the key alone, and not on numpy's version as `Generator.permutation` may.
    """
    # repr rather than hash(): Python randomizes the hashes of strings in every process.
    start = np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "<u8")
    # Wraps around modulo 2^64, which is silent for arrays; the constants are those of the paper.
    x = start + numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

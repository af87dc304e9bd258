"""The order of samples as pure functions of the sample number, so that data loaders have no state to save.

    offset(n) = (F * (n + 1)^3 mod P) * ctx_len,      F = int(P * (sqrt(5) - 1) / 2)

offset(n) is the first token of sample n; a sample is a window of ctx_len + 1 tokens. P, the "magic prime", is the
largest prime with P mod 3 = 2 below the number of slots (tokens // ctx_len). If P mod 3 = 2, cubing modulo P is a
permutation of 0 .. P-1, so P consecutive samples read P different slots. Formula and prime are those of RWKV-LM.
"""

import math
from collections.abc import Sequence

from src.errors import UserError

# With these bases the Miller-Rabin test is exact below 3.3e24 (Sorenson and Webster, 2015).
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


def is_prime(n: int) -> bool:
    """Whether `n` is prime: the deterministic Miller-Rabin test, exact for n < 3.3e24."""
    if n < 2:
        return False
    for p in _WITNESSES:
        if n % p == 0:
            return n == p
    odd, twos = n - 1, 0  # n - 1 = odd * 2^twos
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in _WITNESSES:
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def magic_prime(tokens: int, ctx_len: int) -> int:
    """The largest prime P with P mod 3 = 2 and P <= tokens // ctx_len - 1.

    UserError for --ctx_len when the data has fewer than three windows: then no such prime exists.
    """
    if ctx_len < 1:
        raise UserError(flag="ctx_len", given=ctx_len, expected="at least 1")
    slots = tokens // ctx_len
    # One slot is kept free, because the targets of a window reach one token into the next slot.
    for candidate in range(slots - 1, 1, -1):
        if candidate % 3 == 2 and is_prime(candidate):
            return candidate
    raise UserError(
        f"the data has only {tokens} tokens",
        flag="ctx_len",
        given=ctx_len,
        expected=f"at least 3 * ctx_len = {3 * ctx_len} tokens",
        advice=f"use --ctx_len {tokens // 3} or less, or more data" if tokens >= 3 else "use more data",
    )


def check_magic_prime(prime: int, tokens: int, ctx_len: int) -> None:
    """UserError for --magic_prime, naming the right prime, unless `prime` fits data of this size.

    Accepted: a prime P with P mod 3 = 2, 0.9 * slots < P and P * ctx_len + 1 <= tokens; and always the result of
    `magic_prime`, which on small data, where primes are sparse, may be below 0.9 * slots.
    """
    best = magic_prime(tokens, ctx_len)
    slots = tokens // ctx_len
    if prime == best:  # before the other checks: on small data the best prime may skip more than a tenth
        return
    if not is_prime(prime):
        problem = "not a prime"
    elif prime % 3 != 2:
        # Cubing would not be a permutation: several samples would read the same slot and others none.
        problem = f"its remainder modulo 3 is {prime % 3} and must be 2"
    elif prime * ctx_len + 1 > tokens:
        problem = "too large: its last windows are beyond the end of the data"
    elif 10 * prime <= 9 * slots:
        # Integers, so that the limit is exact for any file size.
        problem = f"too small: it skips more than a tenth of the {slots} windows"
    else:
        return
    raise UserError(
        problem,
        flag="magic_prime",
        given=prime,
        expected=f"{best} for {tokens} tokens and --ctx_len {ctx_len}",
        advice="0 computes it from the data",
    )


def sample_offset(n: int, prime: int, ctx_len: int) -> int:
    """Position of the first token of sample `n` (0, 1, 2, ... counted from the first step of the run)."""
    # In float64 as in RWKV-LM: another rounding would give another order.
    factor = int(prime * (math.sqrt(5) - 1) / 2)
    return factor * pow(n + 1, 3, prime) % prime * ctx_len


def sample_number(local_index: int, first_sample: int, rank: int, world_size: int) -> int:
    """Number of the sample that `rank` of `world_size` ranks reads as its `local_index`-th after `first_sample`.

    Row j of micro batch k (of A, each of m rows) in step s reads n = (s * A + k) * m * W + j * W + r on rank r of W.
    With local_index = (s * A + k) * m + j, which numbers the rows of one rank, this is n = local_index * W + r for all
    m and A. So the set of samples of a step doesn't depend on the number of ranks.
    """
    return first_sample + local_index * world_size + rank


def nth_kept_sample(n: int, skipped_samples: Sequence[tuple[int, int]]) -> int:
    """Number of the n-th sample (from 0) of a run that never reads `skipped_samples`.

    skipped_samples   ranges as (first sample, number of samples), in ascending order and disjoint
    """
    for first, count in skipped_samples:
        # `n` already counts the ranges before this one, so it compares with sample numbers.
        if n < first:
            break
        n += count
    return n

"""Which window of the data is sample n: pure functions of whole numbers, so that no loader has a state.

    offset(n) = (F * (n + 1)^3 mod P) * ctx_len,      F = int(P * (sqrt(5) - 1) / 2)

P, the "magic prime", is the largest prime with P mod 3 = 2 below the number of slots (tokens // ctx_len).
Where P mod 3 = 2, cubing permutes 0 .. P-1, so P samples in a row read P different slots.
"""

import math
from collections.abc import Sequence

from src.errors import UserError

# With these bases the Miller-Rabin test makes no mistake below 3.3e24 (Sorenson and Webster, 2015).
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


def is_prime(n: int) -> bool:
    """Whether `n` is prime; exact for every n that a file can have."""
    if n < 2:
        return False
    for p in _WITNESSES:
        if n % p == 0:
            return n == p
    odd, twos = n - 1, 0
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

    ValueError when the data has fewer than three windows of `ctx_len`: then there is no such prime.
    """
    if ctx_len < 1:
        raise UserError(f"--ctx_len {ctx_len}: must be at least 1.")
    slots = tokens // ctx_len
    for candidate in range(slots - 1, 1, -1):
        if candidate % 3 == 2 and is_prime(candidate):
            return candidate
    advice = f"use --ctx_len {tokens // 3} or less, or more data" if tokens >= 3 else "use more data"
    raise UserError(f"--ctx_len {ctx_len}: {tokens} tokens are too few, at least {3 * ctx_len} are needed: {advice}.")


def check_magic_prime(prime: int, tokens: int, ctx_len: int) -> None:
    """ValueError, with the right prime in it, unless `prime` visits (nearly) all of this data and nothing beyond it.

    Accepted: a prime P with P mod 3 = 2, 0.9 * slots < P and P * ctx_len + 1 <= tokens; and on small data, where
    primes lie far apart, the best one whatever its distance.
    """
    best = magic_prime(tokens, ctx_len)
    slots = tokens // ctx_len
    if prime == best:
        return
    if not is_prime(prime):
        fault = "is not a prime"
    elif prime % 3 != 2:
        fault = f"leaves {prime % 3} when divided by 3, it must leave 2"
    elif prime * ctx_len + 1 > tokens:
        fault = "is too large, its last windows lie beyond the end of the data"
    elif 10 * prime <= 9 * slots:
        fault = f"is too small, it would leave out more than a tenth of the {slots} windows"
    else:
        return
    raise UserError(
        f"--magic_prime {prime} {fault}. For {tokens} tokens and --ctx_len {ctx_len} it is --magic_prime {best} "
        f"(or 0: worked out from the data)."
    )


def sample_offset(n: int, prime: int, ctx_len: int) -> int:
    """Position of the first token of sample `n` (0, 1, 2, ... counted from the very first step of the run)."""
    factor = int(prime * (math.sqrt(5) - 1) / 2)
    return factor * pow(n + 1, 3, prime) % prime * ctx_len


def sample_number(local_index: int, first_sample: int, rank: int, world_size: int) -> int:
    """Which sample of the run rank `rank` of `world_size` reads as its `local_index`-th after `first_sample`.

    Step s, accumulated batch k of A, row j of a micro batch m reads n = (s * A + k) * m * W + j * W + r; as the rows
    of a rank are counted through by local_index = (s * A + k) * m + j, that is n = local_index * W + r whatever m and
    A are: the samples of one step are the same on any number of ranks.
    """
    return first_sample + local_index * world_size + rank


def nth_kept_sample(n: int, skipped_samples: Sequence[tuple[int, int]]) -> int:
    """The n-th sample of a run that leaves out some for good: `skipped_samples` are (first sample, count), sorted, without overlap."""
    for first, count in skipped_samples:
        if n < first:
            break
        n += count
    return n

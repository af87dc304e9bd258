"""The order of samples: published primes, every slot once, the same samples on any number of ranks."""

import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.dataset import magic_prime, sample_offset
from src.dataset.hashing import splitmix64
from src.dataset.sample_order import check_magic_prime, is_prime, nth_kept_sample, sample_number
from src.errors import UserError

PUBLISHED = {
    "minipile": (1498226207, 512, 2926181),
    "pretrain_hq": (441795307, 512, 862811),
    "sft_512": (1843253579, 512, 3600053),
    "sft_1024": (1430197426, 1024, 1396673),
    "sft_2048": (2398644915, 2048, 1171199),
}


@pytest.mark.parametrize(("tokens", "ctx_len", "prime"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_primes(tokens: int, ctx_len: int, prime: int) -> None:
    assert magic_prime(tokens, ctx_len) == prime
    check_magic_prime(prime, tokens, ctx_len)


def test_is_prime_agrees_with_trial_division() -> None:
    expected = [n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1)) for n in range(5000)]
    assert [is_prime(n) for n in range(5000)] == expected


@pytest.mark.parametrize("n", [3215031751, 3825123056546413051, 2152302898747])  # to many bases
def test_is_prime_rejects_strong_pseudoprimes(n: int) -> None:
    assert not is_prime(n)


@given(slots=st.integers(3, 3000), ctx_len=st.integers(1, 64), extra=st.integers(0, 63))
def test_one_pass_reads_every_slot_once_within_the_data(slots: int, ctx_len: int, extra: int) -> None:
    tokens = slots * ctx_len + extra % ctx_len
    prime = magic_prime(tokens, ctx_len)
    assert prime % 3 == 2
    assert is_prime(prime)
    assert not any(is_prime(p) for p in range(prime + 1, slots) if p % 3 == 2)
    offsets = [sample_offset(n, prime, ctx_len) for n in range(prime)]
    assert sorted(offsets) == [slot * ctx_len for slot in range(prime)]
    assert max(offsets) + ctx_len + 1 <= tokens
    assert sample_offset(prime, prime, ctx_len) == offsets[0], "the second pass repeats the order of the first"


def test_no_overflow_beyond_int64() -> None:
    prime, n = 2926181, 2_100_000_000
    factor = int(prime * (math.sqrt(5) - 1) / 2)
    assert (n + 1) ** 3 > 1 << 63
    assert sample_offset(n, prime, 512) == (factor * (n + 1) ** 3 % prime) * 512


@given(micro_bsz=st.integers(1, 6), world=st.integers(1, 8), accumulate=st.integers(1, 4), first=st.integers(0, 10**12))
def test_a_step_reads_the_same_samples_on_any_number_of_ranks(
    micro_bsz: int, world: int, accumulate: int, first: int
) -> None:
    per_rank = micro_bsz * accumulate
    for step in range(3):
        read = [
            sample_number(step * per_rank + i, first, rank, world) for rank in range(world) for i in range(per_rank)
        ]
        start = first + step * per_rank * world
        assert sorted(read) == list(range(start, start + per_rank * world))


def test_the_formula_of_accumulated_micro_batches() -> None:
    m, world, accumulate = 3, 4, 2
    for s, k, j, r in [(0, 0, 0, 0), (5, 1, 2, 3), (7, 0, 1, 2)]:
        local = (s * accumulate + k) * m + j
        assert sample_number(local, 0, r, world) == (s * accumulate + k) * m * world + j * world + r


@pytest.mark.parametrize(
    ("prime", "problem"),
    [(2926180, "not a prime"), (2926177, "modulo 3"), (3600053, "too large"), (862811, "too small")],
)
def test_a_wrong_prime_raises_and_names_the_right_one(prime: int, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        check_magic_prime(prime, 1498226207, 512)
    assert (caught.value.flag, caught.value.given) == ("magic_prime", prime)
    assert problem in caught.value.problem
    assert "2926181" in caught.value.expected


@pytest.mark.parametrize("prime", [101, 1013, 104729])
@pytest.mark.parametrize("ctx_len", [2, 16, 512])
def test_both_bounds_of_an_accepted_prime(prime: int, ctx_len: int) -> None:
    """0.9 slots < P and P ctx_len + 1 <= tokens, to the token."""
    most = 10 * prime // 9  # slots: 10 P = 9 slots is impossible, as P is no multiple of 9
    best = magic_prime(most * ctx_len, ctx_len)
    assert best > prime  # otherwise it would be accepted for that
    check_magic_prime(prime, most * ctx_len + ctx_len - 1, ctx_len)
    with pytest.raises(UserError, match="too small"):
        check_magic_prime(prime, (most + 1) * ctx_len, ctx_len)
    check_magic_prime(prime, prime * ctx_len + 1, ctx_len)
    assert max(sample_offset(n, prime, ctx_len) for n in range(min(prime, 2000))) + ctx_len + 1 <= prime * ctx_len + 1
    with pytest.raises(UserError, match="too large"):
        check_magic_prime(prime, prime * ctx_len, ctx_len)


@settings(max_examples=30)
@given(ctx_len=st.integers(1, 512), tokens=st.integers(0, 1535))
def test_too_little_data_raises_with_the_required_amount(ctx_len: int, tokens: int) -> None:
    if tokens >= 3 * ctx_len:
        check_magic_prime(magic_prime(tokens, ctx_len), tokens, ctx_len)
        return
    with pytest.raises(UserError) as caught:
        magic_prime(tokens, ctx_len)
    assert (caught.value.flag, caught.value.given) == ("ctx_len", ctx_len)
    assert f"{3 * ctx_len} tokens" in caught.value.expected
    if tokens >= 3:  # the advice works
        assert f"--ctx_len {tokens // 3} " in caught.value.advice
        magic_prime(tokens, tokens // 3)


def test_a_context_of_no_tokens_raises() -> None:
    with pytest.raises(UserError) as caught:
        magic_prime(1000, 0)
    assert (caught.value.flag, caught.value.given, caught.value.expected) == ("ctx_len", 0, "at least 1")


def test_a_prime_slightly_below_the_best_is_accepted() -> None:
    check_magic_prime(2700023, 1498226207, 512)


@given(runs=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 5)), max_size=6), start=st.integers(0, 80))
def test_skipped_samples_are_replaced_by_the_following_ones(runs: list[tuple[int, int]], start: int) -> None:
    skipped = {first + i for first, count in runs for i in range(count)}
    skipped_samples: list[tuple[int, int]] = []
    for n in sorted(skipped):
        if skipped_samples and n == sum(skipped_samples[-1]):
            skipped_samples[-1] = (skipped_samples[-1][0], skipped_samples[-1][1] + 1)
        else:
            skipped_samples.append((n, 1))
    kept = (n for n in itertools.count() if n not in skipped)
    expected = list(itertools.islice(kept, start, start + 30))
    assert [nth_kept_sample(n, skipped_samples) for n in range(start, start + 30)] == expected


def test_hashes_are_splitmix64() -> None:
    """Another function would shuffle documents, conversations and rows in another order, also within a resumed run."""
    mask, start = 2**64 - 1, int.from_bytes(hashlib.blake2b(b"(7, 'epoch', 3)", digest_size=8).digest(), "little")
    numbers = [0, 1, 12345, 2**64 - 1]
    expected = []
    for n in numbers:
        x = (start + n * 0x9E3779B97F4A7C15) & mask
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
        expected.append(x ^ x >> 31)
    assert splitmix64(np.array(numbers, np.uint64), 7, "epoch", 3).tolist() == expected

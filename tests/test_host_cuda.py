"""The host run of CUDA sources finds each kind of planted mistake, and none in a right kernel."""

import os
import subprocess

import pytest
import torch
from host_cuda.harness import HERE, ORDERS, Guarded, HostLibrary, build, compiler, pointer, shared_folder

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shared_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def planted(folder):
    return HostLibrary(build(folder, HERE / "planted.cu"))


@pytest.fixture(scope="module")
def arithmetic(folder):
    return HostLibrary(build(folder, HERE / "arithmetic.cu"))


def run(planted, entry, elements=128):
    """The output of a planted kernel; AssertionError with the host's message when it finds a fault."""
    result = Guarded().empty((elements,), torch.float32)
    planted.call(f"planted_{entry}", pointer(result))
    return result


def in_all_orders(planted, entry, threads, flag):
    values = torch.arange(threads, dtype=torch.float32)
    results = []
    for order in ORDERS:
        planted.order(order)
        result = torch.full((threads,), float("nan"))
        planted.call(f"planted_{entry}", pointer(values), pointer(result), threads, flag)
        results.append(result)
    planted.order("forward")
    return results


@pytest.mark.parametrize(("entry", "threads", "wrong", "right"), [
    ("reverse_values", 32, 0, 1), ("reverse_values", 128, 1, 2), ("overwrite", 32, 0, 1), ("overwrite", 128, 0, 1),
], ids=["no warp barrier", "warp barrier for a block", "overwritten in a warp", "overwritten in a block"])  # fmt: skip
def test_a_race_changes_bits_between_lane_orders(planted, entry, threads, wrong, right):
    good = in_all_orders(planted, entry, threads, right)
    assert all(torch.equal(x, good[0]) for x in good)
    assert good[0].isfinite().all()
    bad = in_all_orders(planted, entry, threads, wrong)
    assert not all(torch.equal(x, bad[0]) for x in bad)


def test_unwritten_memory_is_nan(planted):
    result = run(planted, "read_unwritten", elements=64)
    assert result[:32].isnan().all()  # shared memory that nobody wrote
    assert result[32:].isnan().all()  # an output that nobody wrote


@pytest.mark.parametrize(("entry", "message"), [
    ("mismatched_collective", "while lane"),
    ("lane_stays_away", "lane 7 has ended"),
    ("warp_stays_away", "waits forever in a block barrier"),
    ("different_barriers", "meets the block barrier of line"),
])  # fmt: skip
@pytest.mark.parametrize("order", ORDERS)
def test_mismatched_barriers_and_collectives(planted, entry, message, order):
    planted.order(order)
    with pytest.raises(AssertionError, match=message):
        run(planted, entry)
    planted.order("forward")


def test_asynchronous_copies_arrive_when_waited_for(planted):
    values = torch.arange(128, dtype=torch.float32)
    outs = []
    for wait in (1, 2):
        result = torch.full((128,), -1.0)
        planted.call("planted_copy_and_wait", pointer(values), pointer(result), wait)
        outs.append(result)
    assert torch.equal(outs[0], values)
    assert outs[1].isnan().all()
    result = torch.full((128,), -1.0)
    planted.call("planted_copy_and_wait", pointer(values), pointer(result), 3)
    assert (result == 0).all()  # a copy of no bytes gives zeros
    with pytest.raises(AssertionError, match="never waited for"):
        planted.call("planted_copy_and_wait", pointer(values), pointer(torch.empty(128)), 0)


def test_misaligned_vectors(planted):
    with pytest.raises(AssertionError, match="not a multiple of 16"):
        planted.call("planted_misaligned", pointer(torch.zeros(64)), pointer(torch.zeros(128)))


def test_writing_beyond_an_output_breaks_the_sentinels(planted):
    out = Guarded()
    result = out.empty((32,), torch.float32)
    planted.call("planted_beyond_output", pointer(result), 3)
    with pytest.raises(AssertionError, match="outside"):
        out.check()


def test_address_sanitizer_sees_accesses_outside_of_any_buffer(folder):
    flags = ("-fsanitize=address", "-g", "-DPLANTED_MAIN")
    program = build(folder, HERE / "planted.cu", *flags, shared=False)

    def outcome(*arguments):
        # what an abandoned thread had allocated is lost, knowingly
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        return subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, timeout=120)

    right = outcome("shared", "0")
    if "can't" in right.stderr or "Shadow memory" in right.stderr:
        pytest.skip("AddressSanitizer does not run here")
    assert right.returncode == 0, right.stderr
    for where in ("shared", "output"):
        wrong = outcome(where, "1")
        assert wrong.returncode != 0
        assert "heap-buffer-overflow" in wrong.stderr
    abandoned = outcome("faults", "0")
    assert abandoned.returncode == 0, abandoned.stderr


def test_number_formats_are_torchs(arithmetic):
    halves = [65504.0, 65519.9, 65520.0, 1e-8, 5.96e-8, 6.1e-5, 2.0**-24 * 2.5]
    edges = torch.tensor([0.0, -0.0, 1.0, 3e38, float("inf"), float("nan"), *halves])
    random = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 9, 20000)
    values = torch.cat([edges, -edges, random])
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        rounded, back = torch.empty(len(values), dtype=dtype), torch.empty(len(values))
        arithmetic.call(f"arithmetic_{name}", pointer(values), pointer(rounded), pointer(back), len(values))
        torch.testing.assert_close(rounded, values.to(dtype), atol=0, rtol=0, equal_nan=True)
        torch.testing.assert_close(back, values.to(dtype).float(), atol=0, rtol=0, equal_nan=True)


def test_matrix_instructions_multiply(arithmetic):
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(16, 16, generator=draw).bfloat16()
    b = torch.randn(16, 8, generator=draw).bfloat16()
    d = torch.full((16, 8), float("nan"))
    arithmetic.call("arithmetic_multiply", pointer(a), pointer(b), pointer(d))
    torch.testing.assert_close(d, a.float() @ b.float(), atol=1e-5, rtol=1e-5)


def test_shuffles_exchange(arithmetic):
    values = torch.arange(32.0)
    by_xor, from_lane = torch.empty(32), torch.empty(32)
    arithmetic.call("arithmetic_shuffles", pointer(values), pointer(by_xor), pointer(from_lane))
    assert by_xor.tolist() == [float(i ^ 5) for i in range(32)]
    assert from_lane.tolist() == [3.0] * 32

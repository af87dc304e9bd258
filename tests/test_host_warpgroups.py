"""The host run of TMA, mbarriers, proxy fences and wgmma: right products, and each kind of planted mistake is found."""

import pytest
import torch
from host_cuda.harness import GROUP_ORDERS, HERE, ORDERS, HostLibrary, build, compiler, pointer, shared_folder

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

MISTAKES = [  # in the order of planted_warpgroups.cu
    ("no wait for TMA", "TMA has not delivered yet"),
    ("no proxy fence", "without a proxy fence since"),
    ("the phase before", "TMA has not delivered yet"),
    ("a phase that never ends", "waits forever in an mbarrier"),
    ("stride", "a stride of 2048 bytes"),
    ("no swizzle", "without the 128-byte swizzle"),
    ("beyond shared memory", "outside of the shared memory"),
    ("the middle of rows", "doesn't begin with the first of eight rows"),
    ("too far right", "leave their 128 bytes"),
    ("no wgmma.fence", "without wgmma.fence"),
    ("accumulators read too early", None),
    ("an operand changes", "have changed since it was issued|without a proxy fence since"),
    ("never waited for", "never waited for"),
    ("lanes differ", "other operands than another thread"),
    ("no initialisation", "has not been initialised"),
    ("initialisation without fence", "whose initialisation no proxy fence has followed"),
    ("too few bytes", "expects fewer bytes"),
    ("a store that the twin doesn't see", "no store of port.cuh wrote"),
    ("another shape in flight", "another shape has in flight"),
    ("arrives twice", "at which all have arrived"),
    ("loads too early", "loads shared memory that TMA has not delivered"),
    ("a warp stays away", "waits forever in a barrier of some warps|has not been initialised"),
    ("registers", "a multiple of 8 from 24 to 256"),
    ("TMA over stores", "TMA meets bytes .* without a proxy fence|initialisation no proxy fence"),
    ("no barrier", None),
    ("TMA outlives the block", "before TMA has delivered everything"),
    ("stores while TMA arrives", "stores to shared memory that TMA is about to fill"),
    ("half of a transposed tile", "other than 64 rows"),
]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return HostLibrary(build(shared_folder(tmp_path_factory), HERE / "planted_warpgroups.cu"))


def product(planted, a, b, *, a_transposed=False, b_transposed=False, registers=False, mistake=0):
    """A B^T as the kernel computes it."""
    d = torch.full((64, 64), float("nan"))
    given = [
        pointer((x.T if transposed else x).contiguous()) for x, transposed in ((a, a_transposed), (b, b_transposed))
    ]
    planted.call(
        "planted_warpgroups", *given, pointer(d), int(a_transposed), int(b_transposed), int(registers), mistake
    )
    return d


@pytest.fixture(scope="module")
def operands():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(64, 64, generator=draw).bfloat16(), torch.randn(64, 64, generator=draw).bfloat16()


@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize(("a_transposed", "registers"), [(False, False), (True, False), (False, True)])
def test_wgmma_multiplies(planted, operands, a_transposed, b_transposed, registers):
    a, b = operands
    for order in (*ORDERS, *GROUP_ORDERS):
        planted.order(order)
        d = product(planted, a, b, a_transposed=a_transposed, b_transposed=b_transposed, registers=registers)
        torch.testing.assert_close(d, a.float() @ b.float().T, atol=1e-4, rtol=1e-4)
    planted.order("forward")


@pytest.mark.parametrize(("number", "message"), [pytest.param(i + 1, m, id=n) for i, (n, m) in enumerate(MISTAKES)])
def test_each_mistake_is_found(planted, operands, number, message):
    """In every order where a message tells it; where only numbers do, in at least one."""
    wrong = 0
    for order in (*ORDERS, *GROUP_ORDERS):
        planted.order(order)
        if message is None:
            try:
                d = product(planted, *operands, mistake=number)
                wrong += not torch.allclose(d, operands[0].float() @ operands[1].float().T, atol=1e-4)
            except AssertionError:
                wrong += 1
        elif order in ("random", "another random") or order.startswith(("groups", "again", "and")):
            # TMA may have been in time by luck
            try:
                product(planted, *operands, mistake=number)
            except AssertionError:
                wrong += 1
        else:
            with pytest.raises(AssertionError, match=message):
                product(planted, *operands, mistake=number)
            wrong += 1
    planted.order("forward")
    assert wrong

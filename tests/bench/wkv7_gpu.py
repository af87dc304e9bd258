"""wkv7 on a GPU: whether it builds, each kernel's errors and times. Needs PyTorch and ninja only.

    python tests/bench/wkv7_gpu.py build      compiles and loads the library
    python tests/bench/wkv7_gpu.py errors     against float64 from the CPU at small sizes; exit code 1 over a bound
    python tests/bench/wkv7_gpu.py times      forward and backward at four shapes; errors against the exact kernel
    python tests/bench/wkv7_gpu.py once       each kernel once, for a profiler

Times are those of the kernels alone: calls are captured in a CUDA graph over buffers that together are larger than
the L2 cache, the graph is replayed, and the median over replays counts. Next to them stand the bytes that a kernel
must move at least (bf16 inputs, outputs and gradients, each once: 896 forward and 1664 backward per token and head of
size 64) as a rate, and that rate as a fraction of what a plain copy reaches on this machine.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from host_cuda.problems import INPUTS, answer, error, incoming, problem

from src.ops import build, wkv7
from src.ops.recurrence import describe_kernel, has_warpgroups
from src.ops.recurrence_op import KERNEL_NUMBERS

SHAPES = [(8, 4096, 64), (16, 512, 12), (8, 4096, 32), (1, 32768, 32)]  # B, T, H
KERNELS = ("chunked", "recurrent")
N = 64
TENSOR_BYTES = 2 * N  # of one bf16 tensor, per token and head
FORWARD_BYTES, BACKWARD_BYTES = 7 * TENSOR_BYTES, 13 * TENSOR_BYTES
BOUND, CORRELATED_BOUND = 5e-3, 7e-3  # of a relative error; correlated keys are the worst case for da and db
KINDS = ("usual", "fast", "slow", "correlated")
# A token, a segment and one more, several segments; a document that warpgroups cut into parts. The float64 loop on a
# CPU takes seconds there.
LENGTHS = (1, 49, 200, 2100)

Run = Callable[[], object]


@dataclass(frozen=True)
class Measured:
    """One kernel at one shape."""

    forward_ms: float
    backward_ms: float
    peak_bytes: int  # held at most beyond the inputs during forward and backward
    kept_bytes: float  # held for backward beyond the inputs, per token and head
    error: float  # against the exact kernel at this shape; that one's own is 0


@dataclass(frozen=True)
class Deviation:
    """The largest relative error of a kernel over kinds of inputs and lengths, and where bounds were exceeded."""

    worst: float
    over_bound: list[str]


@functools.cache
def expected(kind: str, length: int) -> tuple[dict[str, torch.Tensor], ...]:
    """Inputs, incoming gradients and the float64 answer: one computation on the CPU for all kernels."""
    x = problem(1, length, 2, N, torch.bfloat16, kind=kind, state=True)
    dy, dfinal_state = incoming(x)
    return x, {"dy": dy, "dfinal_state": dfinal_state}, answer(x, dy, dfinal_state)


def deviation(kernel: str, device: str) -> Deviation:
    """Errors of all outputs and gradients against float64. Not finite where an output isn't."""
    worst, over_bound = 0.0, []
    for kind in KINDS:
        for length in LENGTHS:
            x, gradients, true = expected(kind, length)
            leaves = [x[name].to(device).requires_grad_() for name in (*INPUTS, "state")]
            outputs = list(wkv7(*leaves, kernel=kernel))
            outputs += torch.autograd.grad(outputs, leaves, [gradient.to(device) for gradient in gradients.values()])
            names = ["y", "final_state", *(f"d{name}" for name in (*INPUTS, "state"))]
            for name, got in zip(names, outputs, strict=True):
                bound = CORRELATED_BOUND if kind == "correlated" and name in ("da", "db") else BOUND
                relative = error(got.detach().cpu(), true[name])
                if not relative <= bound:  # also when it is not a number
                    over_bound.append(f"{name} at T = {length}, {kind}: {relative:.1e}, at most {bound}")
                worst = max(worst, relative) if relative == relative else float("nan")
    return Deviation(worst, over_bound)


def report_errors(device: str = "cuda", kernels: tuple[str, ...] = KERNELS) -> bool:
    """Prints each kernel's errors; whether all are within their bounds."""
    within = True
    for kernel in kernels:
        result = deviation(kernel, device)
        sizes = f"T {', '.join(map(str, LENGTHS))}; {', '.join(KINDS)}"
        print(f"{kernel}: largest error {result.worst:.1e} against float64 ({sizes})")
        for entry in result.over_bound:
            print(f"  OVER ITS BOUND: {entry}")
        within &= not result.over_bound
    return within


def error_against_exact(x: list[torch.Tensor], dy: torch.Tensor, kernel: str) -> float:
    """The largest relative error of y and the six gradients against the exact kernel's, on the inputs' device."""
    results = []
    for name in (kernel, "recurrent"):
        leaves = [tensor.detach().requires_grad_() for tensor in x]
        y = wkv7(*leaves, kernel=name)[0]
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    errors = [
        float((got.float() - exact.float()).norm() / exact.float().norm()) for got, exact in zip(*results, strict=True)
    ]
    return max(errors) if all(e == e for e in errors) else float("nan")


def median_ms(runs: list[Run], repetitions: int, device: str) -> float:
    """Milliseconds of one of `runs`, which are done one after another: the median over repetitions of all of them."""
    if device != "cuda":
        return statistics.median(_seconds(runs) for _ in range(repetitions)) * 1e3 / len(runs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [run() for run in runs]  # kept, so that each has memory of its own
    graph.replay()
    times = []
    for _ in range(repetitions):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    del results
    return statistics.median(times) / len(runs)


def _seconds(runs: list[Run]) -> float:
    start = time.perf_counter()
    for run in runs:
        run()
    return time.perf_counter() - start


def copy_rate(device: str, bytes_: int, repetitions: int = 20) -> float:
    """Bytes per second that a plain copy reads and writes."""
    source, target = (torch.empty(bytes_ // 4, device=device) for _ in range(2))
    return 2 * bytes_ / (median_ms([lambda: target.copy_(source)], repetitions, device) / 1e3)


def sets_beyond(cache_bytes: int, set_bytes: int) -> int:
    """How many sets of buffers, used in turn, leave nothing of one in the cache by the time it is used again."""
    return 2 + 2 * cache_bytes // set_bytes


def measure(shape: tuple[int, int, int], kernel: str, device: str, cache_bytes: int, repetitions: int) -> Measured:
    """Times, memory and error at B, T, H = shape (bf16, head size 64)."""
    describe_kernel(device, torch.bfloat16, N, kernel)  # loads the ops
    token_heads = shape[0] * shape[1] * shape[2]
    number = KERNEL_NUMBERS["wgmma" if kernel == "chunked" and has_warpgroups(None) else kernel]

    def inputs() -> list[torch.Tensor]:
        r, w, k, v, key = (torch.randn(*shape, N, device=device) for _ in range(5))
        kk = torch.nn.functional.normalize(key, dim=-1)
        return [x.bfloat16() for x in (r, w - 2, 0.3 * k, v, -kk, kk * torch.rand_like(kk))]

    sets = [inputs() for _ in range(sets_beyond(cache_bytes, FORWARD_BYTES * token_heads))]
    dys = [torch.randn(*shape, N, device=device).bfloat16() for _ in sets]
    forward, backward = torch.ops.rwkv7.wkv7_forward, torch.ops.rwkv7.wkv7_backward
    forwards: list[Run] = [lambda x=x: forward(*x, None, None, True, number) for x in sets]
    saved = [run()[2:] for run in forwards]  # type: ignore[index]
    kept = sum(x.numel() * x.element_size() for x in saved[0]) / token_heads
    together = zip(dys, sets, saved, strict=True)
    backwards: list[Run] = [
        lambda dy=dy, x=x, s=s: backward(dy, None, *x, None, None, *s, number) for dy, x, s in together
    ]
    forward_ms = median_ms(forwards, repetitions, device)
    backward_ms = median_ms(backwards, repetitions, device)
    del forwards, backwards, saved, sets[1:]
    peak = _peak(sets[0], dys[0], kernel, device)
    off = 0.0 if kernel == "recurrent" else error_against_exact(sets[0], dys[0], kernel)
    return Measured(forward_ms, backward_ms, peak, kept, off)


def _peak(inputs: list[torch.Tensor], dy: torch.Tensor, kernel: str, device: str) -> int:
    if device != "cuda":
        return 0
    leaves = [x.requires_grad_() for x in inputs]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(wkv7(*leaves, kernel=kernel)[0], leaves, dy)
    return torch.cuda.max_memory_allocated() - before


HEADER = (
    "| B, T, H | kernel | forward ms | backward ms | both ms | forward GB/s | backward GB/s | of the copy rate "
    "| peak MiB | kept B | error against exact |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(shape: tuple[int, int, int], kernel: str, m: Measured, copy: float) -> str:
    """A row of the table."""
    token_heads = shape[0] * shape[1] * shape[2]
    rates = [b * token_heads / ms / 1e6 for b, ms in ((FORWARD_BYTES, m.forward_ms), (BACKWARD_BYTES, m.backward_ms))]
    both = m.forward_ms + m.backward_ms
    fraction = (FORWARD_BYTES + BACKWARD_BYTES) * token_heads / (both / 1e3) / copy
    times = [f"{ms:.3f}" for ms in (m.forward_ms, m.backward_ms, both)]
    memory = [f"{m.peak_bytes / 2**20:.0f}", f"{m.kept_bytes:.0f}"]
    cells = [", ".join(map(str, shape)), kernel, *times, *(f"{rate:.0f}" for rate in rates), f"{fraction:.0%}", *memory]
    return "| " + " | ".join([*cells, f"{m.error:.1e}"]) + " |"


def report_times(
    device: str = "cuda",
    shapes: list[tuple[int, int, int]] = SHAPES,
    kernels: tuple[str, ...] = KERNELS,
    repetitions: int = 20,
) -> None:
    """Measures and prints a Markdown table."""
    torch.manual_seed(0)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        cache, copied, name = properties.L2_cache_size, 2**30, properties.name
    else:
        cache, copied, name = 0, 2**24, "a CPU"
    copy = copy_rate(device, copied)
    date = time.strftime("%Y-%m-%d", time.gmtime())
    print(f"{name}, torch {torch.__version__}, copy rate {copy / 1e9:.0f} GB/s, {date}\n\n{HEADER}", flush=True)
    for shape in shapes:
        for kernel in kernels:
            print(line(shape, kernel, measure(shape, kernel, device, cache, repetitions), copy), flush=True)


def report_build() -> bool:
    """Builds and loads the library; whether it has the CUDA kernels."""
    start = time.perf_counter()
    try:
        build.load_native()
        failure = build.why_no_cuda()
    except build.BuildError as error_:
        failure = error_
    seconds = time.perf_counter() - start
    print(f"the CUDA kernels are not available: {failure}" if failure else f"built and loaded in {seconds:.1f} s")
    return failure is None


def run_once(device: str = "cuda", shape: tuple[int, int, int] = SHAPES[1]) -> None:
    """Each kernel forward and backward, for a profiler."""
    for kernel in KERNELS:
        leaves = [torch.randn(*shape, N, device=device).bfloat16().requires_grad_() for _ in INPUTS]
        y = wkv7(*leaves, kernel=kernel)[0]
        torch.autograd.grad(y, leaves, torch.ones_like(y))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["build", "errors", "times", "once"])
    part = parser.parse_args().part
    if part == "build":
        raise SystemExit(0 if report_build() else 1)
    if part == "errors":
        raise SystemExit(0 if report_errors() else 1)
    report_times() if part == "times" else run_once()


if __name__ == "__main__":
    main()

"""Speed of wkv7 on a GPU: each kernel is validated against float64 first, then timed, forward and backward apart.

Times are those of the kernels alone: calls are captured in a CUDA graph over buffers that together are larger than the L2 cache, the graph is
replayed, and the median over replays counts. Beside them stand the bytes that a kernel must move at least (bf16 inputs, outputs and gradients, each
once: 896 forward and 1664 backward per token and head of size 64) as a rate, and that rate as a fraction of what a plain copy reaches on
this machine.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from host_cuda.problems import INPUTS, answer, error, incoming, problem

from src.ops import wkv7

SHAPES = [(8, 4096, 64), (16, 512, 12), (8, 4096, 32), (1, 32768, 32)]  # B, T, H
KERNELS = ("chunked", "recurrent")
N = 64
TENSOR_BYTES = 2 * N  # of one bf16 tensor, per token and head
FORWARD_BYTES, BACKWARD_BYTES = 7 * TENSOR_BYTES, 13 * TENSOR_BYTES
BOUND, CORRELATED_BOUND = 5e-3, 7e-3

Run = Callable[[], object]


@dataclass(frozen=True)
class Measured:
    """One kernel at one shape."""

    forward_ms: float
    backward_ms: float
    peak_bytes: int  # held at most beyond the inputs during forward and backward
    kept_bytes: float  # held for backward beyond the inputs, per token and head


def worst_error(kernel: str, device: str) -> float:
    """The largest error of any output or gradient against float64; SystemExit when one is beyond its bound."""
    worst = 0.0
    for kind in ("usual", "fast", "slow", "correlated"):
        for length in (1, 49, 200):
            x = problem(1, length, 2, N, torch.bfloat16, kind=kind, state=True)
            dy, dfinal_state = incoming(x)
            leaves = [x[name].to(device).requires_grad_() for name in (*INPUTS, "state")]
            y, final_state = wkv7(*leaves, kernel=kernel)
            grads = torch.autograd.grad([y, final_state], leaves, [dy.to(device), dfinal_state.to(device)])
            names = ["y", "final_state", *(f"d{name}" for name in (*INPUTS, "state"))]
            true = answer(x, dy, dfinal_state)
            for name, got in zip(names, [y, final_state, *grads], strict=True):
                bound = CORRELATED_BOUND if kind == "correlated" and name in ("da", "db") else BOUND
                off = error(got.detach().cpu(), true[name])
                if not off <= bound:
                    raise SystemExit(
                        f"{kernel} is wrong: {name} at T = {length}, {kind}: error {off:.1e}, at most {bound}"
                    )
                worst = max(worst, off)
    return worst


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
    """Times and memory at B, T, H = shape (bf16, head size 64). The ops must have been loaded: call worst_error first."""
    token_heads = shape[0] * shape[1] * shape[2]
    chunked = kernel == "chunked"

    def inputs() -> list[torch.Tensor]:
        r, w, k, v, key = (torch.randn(*shape, N, device=device) for _ in range(5))
        kk = torch.nn.functional.normalize(key, dim=-1)
        return [x.bfloat16() for x in (r, w - 2, 0.3 * k, v, -kk, kk * torch.rand_like(kk))]

    sets = [inputs() for _ in range(sets_beyond(cache_bytes, FORWARD_BYTES * token_heads))]
    dys = [torch.randn(*shape, N, device=device).bfloat16() for _ in sets]
    forward, backward = torch.ops.rwkv7.wkv7_forward, torch.ops.rwkv7.wkv7_backward
    forwards: list[Run] = [lambda x=x: forward(*x, None, None, True, chunked) for x in sets]
    saved = [run()[2:] for run in forwards]  # type: ignore[index]
    kept = sum(x.numel() * x.element_size() for x in saved[0]) / token_heads
    together = zip(dys, sets, saved, strict=True)
    backwards: list[Run] = [
        lambda dy=dy, x=x, s=s: backward(dy, None, *x, None, None, *s, chunked) for dy, x, s in together
    ]
    forward_ms = median_ms(forwards, repetitions, device)
    backward_ms = median_ms(backwards, repetitions, device)
    del forwards, backwards, saved, sets[1:]
    return Measured(forward_ms, backward_ms, _peak(sets[0], dys[0], kernel, device), kept)


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
    "| B, T, H | kernel | forward ms | backward ms | both ms | forward GB/s | backward GB/s | of the copy rate | peak MiB | kept B | error |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(shape: tuple[int, int, int], kernel: str, m: Measured, copy: float, off: float) -> str:
    """A row of the table."""
    token_heads = shape[0] * shape[1] * shape[2]
    rates = [b * token_heads / ms / 1e6 for b, ms in ((FORWARD_BYTES, m.forward_ms), (BACKWARD_BYTES, m.backward_ms))]
    both = m.forward_ms + m.backward_ms
    fraction = (FORWARD_BYTES + BACKWARD_BYTES) * token_heads / (both / 1e3) / copy
    words = [
        ", ".join(map(str, shape)), kernel, f"{m.forward_ms:.3f}", f"{m.backward_ms:.3f}", f"{both:.3f}", f"{rates[0]:.0f}", f"{rates[1]:.0f}",
        f"{fraction:.0%}", f"{m.peak_bytes / 2**20:.0f}", f"{m.kept_bytes:.0f}", f"{off:.1e}",
    ]  # fmt: skip
    return "| " + " | ".join(words) + " |"


def report(
    device: str = "cuda",
    shapes: list[tuple[int, int, int]] = SHAPES,
    kernels: tuple[str, ...] = KERNELS,
    repetitions: int = 20,
) -> None:
    """Validates, measures and prints a Markdown table."""
    torch.manual_seed(0)
    errors = {kernel: worst_error(kernel, device) for kernel in kernels}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        cache, copied, name = properties.L2_cache_size, 2**30, properties.name
    else:
        cache, copied, name = 0, 2**24, "a CPU"
    copy = copy_rate(device, copied)
    print(
        f"{name}, torch {torch.__version__}, copy rate {copy / 1e9:.0f} GB/s, {time.strftime('%Y-%m-%d', time.gmtime())}\n"
    )
    print(HEADER)
    for shape in shapes:
        for kernel in kernels:
            print(
                line(shape, kernel, measure(shape, kernel, device, cache, repetitions), copy, errors[kernel]),
                flush=True,
            )

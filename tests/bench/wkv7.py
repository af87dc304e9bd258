"""Speed of wkv7 on a CPU: microseconds per token-head, native, portable, and of the reference. On a GPU: wkv7_gpu.py.

    python tests/bench/wkv7.py [--device cpu] [--batch 4] [--tokens 512] [--heads 8] [--head-size 64] [--dtype float32]
                               [--instruction-set avx2] [--threads 1] [--portable 10] [--reference 0]

Forward and backward as called from PyTorch. Machines are shared, so every repetition is paired with the rate of matrix
products measured just before and after it; one whose two rates differ by over 25 % is dropped. Medians are printed.
us x GFLOP/s hardly depends on the machine's other load. The reference spends its time between small operations, not in
products, so it is compared with the native repetitions right before and after it. So is the portable kernel, one
repetition with one; with several threads only where no other program runs, for it has hundreds of parallel regions.
"""

import argparse
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from src.ops import build, wkv7
from src.training.hardware.allocator import set_up_malloc


def product_rate(tokens: int = 2048, width: int = 512) -> float:
    """GFLOP/s of one of a training step's matrix products, [tokens, C] x [C, 4C]."""
    x, weight = torch.randn(tokens, width), torch.randn(width, 4 * width)
    start = time.perf_counter()
    for _ in range(4):
        x @ weight
    return 4 * 2 * tokens * width * 4 * width / (time.perf_counter() - start) / 1e9


def problem(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    r, w, k, v, dy = (torch.randn(shape) for _ in range(5))
    kk = torch.nn.functional.normalize(torch.randn(shape), dim=-1)
    inputs = [r, w - 2, 0.3 * k, v, -kk, kk * torch.rand(shape)]
    return [x.to(dtype).requires_grad_() for x in inputs], dy.to(dtype)


def measure(
    shape: tuple[int, ...], dtype: torch.dtype, kernel: str, repetitions: int
) -> list[tuple[float, float, float]]:
    """(forward us, backward us, GFLOP/s) per token-head and repetition."""
    inputs, dy = problem(shape, dtype)
    token_heads = shape[0] * shape[1] * shape[2]
    kept = []
    for repetition in range(repetitions + 3):  # three to warm up: fresh memory is dear
        before = product_rate()
        times = [time.perf_counter()]
        y, _ = wkv7(*inputs, kernel=kernel)
        times.append(time.perf_counter())
        torch.autograd.grad(y, inputs, dy)
        times.append(time.perf_counter())
        after = product_rate()
        if repetition >= 3 and max(before, after) < 1.25 * min(before, after):
            forward, backward = (1e6 * (b - a) / token_heads for a, b in pairwise(times))
            kept.append((forward, backward, (before + after) / 2))
    return kept


def portable_ratios(shape: tuple[int, ...], dtype: torch.dtype, repetitions: int) -> tuple[float, float]:
    """(forward, forward + backward) of the portable kernel over that of the native one: medians of pairs."""
    inputs, dy = problem(shape, dtype)
    pairs: list[dict[str, tuple[float, float]]] = []
    for _ in range(repetitions + 2):
        times = {}
        for kernel in ("recurrent", "portable"):
            start = time.perf_counter()
            y, _ = wkv7(*inputs, kernel=kernel)
            middle = time.perf_counter()
            torch.autograd.grad(y, inputs, dy)
            times[kernel] = (middle - start, time.perf_counter() - start)
        pairs.append(times)
    forward, both = (
        statistics.median(pair["portable"][i] / pair["recurrent"][i] for pair in pairs[2:]) for i in range(2)
    )
    return forward, both


def measure_reference(shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """Forward + backward us per token-head."""
    inputs, dy = problem(shape, dtype)
    start = time.perf_counter()
    torch.autograd.grad(wkv7(*inputs, kernel="reference")[0], inputs, dy)
    return 1e6 * (time.perf_counter() - start) / (shape[0] * shape[1] * shape[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=4, help="this and what follows: on a CPU only")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--instruction-set", default="native", choices=list(build.INSTRUCTION_SETS))
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--portable", type=int, default=0, metavar="N", help="repetitions of the portable kernel, and nothing else"
    )
    parser.add_argument(
        "--reference", type=int, default=3, metavar="N", help="repetitions of the reference (0: leave it out)"
    )
    args = parser.parse_args()
    if args.device == "cuda":
        from wkv7_gpu import report_errors, report_times

        report_errors()
        return report_times()
    shape, dtype = (args.batch, args.tokens, args.heads, args.head_size), getattr(torch, args.dtype)
    set_up_malloc(lean=False)  # as train.py does
    torch.set_num_threads(args.threads)
    build.load_native(instruction_set=args.instruction_set)
    print(
        f"B, T, H, N = {shape}, {args.dtype}, {torch.get_num_threads()} threads, instruction set {args.instruction_set}"
    )

    if args.portable:
        forward, both = portable_ratios(shape, dtype, args.portable)
        return print(f"portable   {forward:.2f} times the native time forward, {both:.2f} forward and backward")

    # Native repetitions stand before and after every one of the reference.
    parts = args.reference + 1
    shares = [args.repetitions * (i + 1) // parts - args.repetitions * i // parts for i in range(parts)]
    native, ratios, references = [], [], []
    before = measure(shape, dtype, "recurrent", shares[0])
    for share in shares[1:]:
        reference = measure_reference(shape, dtype)
        after = measure(shape, dtype, "recurrent", share)
        if before and after:
            references.append(reference)
            ratios.append(reference / statistics.median(f + b for f, b, _ in before + after))
        native += before
        before = after
    native += before
    if not native:
        raise SystemExit(
            "every repetition had product rates that differ by over 25 %: other programs run; try again later"
        )
    forward, backward, rate = (statistics.median(column) for column in zip(*native, strict=True))
    paired = statistics.median((f + b) * g for f, b, g in native)
    print(
        f"native     forward {forward:7.3f}  backward {backward:7.3f}  both {forward + backward:7.3f} us per token-head"
    )
    print(
        f"           product rate {rate:.0f} GFLOP/s, us x GFLOP/s {paired:.0f}, "
        f"{len(native)} of {args.repetitions} repetitions kept"
    )
    if ratios:
        print(
            f"reference  both {statistics.median(references):.1f} us per token-head: "
            f"{statistics.median(ratios):.0f} times the native time right before and after"
        )


if __name__ == "__main__":
    main()

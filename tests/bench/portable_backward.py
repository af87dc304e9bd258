"""The backward of the portable kernel: its own, by autograd, and by autograd with recomputation. Times and memory.

    python tests/bench/portable_backward.py [--threads 1] [--repetitions 8]

Forward and backward of each, one after the other in each repetition, for (B, T, H, N) = (4, 512, 8, 64) and
(1, 4096, 12, 64) in fp32. Printed: the medians, in ms, of each over the first; and the bytes kept from forward to
backward, per token and head. "by autograd" are the same formulas and the same inverse, whose gradient is a formula.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.wkv7 import problem

from src.ops import portable
from src.ops.portable_layout import CHUNK, to_chunks
from src.training.hardware.allocator import set_up_malloc

SHAPES = ((4, 512, 8, 64), (1, 4096, 12, 64))


class Inverse(torch.autograd.Function):
    """(I - A)^-1 of A [C, S, L, L]."""

    @staticmethod
    def forward(ctx: Any, A: Tensor) -> Tensor:
        inverse = portable._inverse(A)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        transposed = ctx.saved_tensors[0].transpose(2, 3)
        return transposed @ grad @ transposed


def by_autograd(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    L = CHUNK
    R, raw, K, V, A, Bm = (to_chunks(x, None).flatten(1, 2) for x in (r, w, k, v, a, b))
    rate = torch.sigmoid(raw)
    total = torch.cumsum(rate, 2)
    until, before = torch.exp(portable.LOG_DECAY * total), torch.exp(portable.LOG_DECAY * (total - rate))
    reads = torch.cat([A * before, R * until], 2)
    writes = torch.cat([Bm / until, K / until], 2)
    products = (reads @ writes.transpose(2, 3)) * portable._mask(rate)
    inverse = Inverse.apply(products[:, :, :L, :L])
    X, rows = portable._zeros(r, None).flatten(0, 1), []
    # unbind: the gradient of an index would be as large as what it is taken from, for each chunk
    columns = (reads, writes, inverse, products[:, :, :L, L:] @ V, V, products[:, :, L:], until[:, :, -1:])
    for read, write, solve, inner, value, product, scale in zip(*(x.unbind(0) for x in columns), strict=True):
        Q = read @ X.transpose(1, 2)
        UV = torch.cat([solve @ (Q[:, :L] + inner), value], 1)
        X = (X + UV.transpose(1, 2) @ write) * scale
        rows.append(Q[:, L:] + product @ UV)
    B, T, H, N = r.shape
    return torch.stack(rows).view(T // L, B, H, L, N).permute(1, 0, 3, 2, 4).reshape(r.shape)


KINDS = {
    "own backward": lambda *inputs: portable.wkv7_portable(*inputs)[0],
    "by autograd": by_autograd,
    "recomputed": lambda *inputs: checkpoint(by_autograd, *inputs, use_reentrant=False),
}


def kept_bytes(function: Any, inputs: list[Tensor]) -> int:
    """Bytes of the storages that autograd keeps, but those of the inputs."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x
    ):
        y = function(*inputs)
    own = {x.untyped_storage().data_ptr() for x in inputs}
    del y
    return sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    set_up_malloc(lean=False)
    for shape in SHAPES:
        inputs, dy = problem(shape, torch.float32)
        times: dict[str, list[float]] = {name: [] for name in KINDS}
        gradients = {}
        for _ in range(args.repetitions + 2):
            for name, function in KINDS.items():
                begin = time.perf_counter()
                gradients[name] = torch.autograd.grad(function(*inputs), inputs, dy)
                times[name].append(time.perf_counter() - begin)
        own = gradients["own backward"]
        for name, taken in times.items():
            off = max(float((x - y).norm() / y.norm()) for x, y in zip(gradients[name], own, strict=True))
            assert off < 1e-4, (name, off)
            ratio = statistics.median(t / o for t, o in zip(taken[2:], times["own backward"][2:], strict=True))
            kept = kept_bytes(KINDS[name], inputs) / (shape[0] * shape[1] * shape[2])
            print(
                f"{shape}  {name:12}  {1e3 * statistics.median(taken[2:]):7.1f} ms  {ratio:.2f}  {kept:6.0f} bytes",
                flush=True,
            )


if __name__ == "__main__":
    main()

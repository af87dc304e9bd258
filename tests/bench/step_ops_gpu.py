"""The step's other native ops on a GPU, a block's elementwise work and AdamW: their errors and times.

    python tests/bench/step_ops_gpu.py errors     against float64 on the same GPU; exit code 1 over a bound
    python tests/bench/step_ops_gpu.py times      forward and backward, for [tokens, C] = [8192, 768] and [32768, 2048]
    python tests/bench/step_ops_gpu.py once       each kernel once, for a profiler

An op may be at most twice as far from float64 as plain PyTorch in the same dtype. Times are those of the kernels alone
(tests/bench/wkv7_gpu.py says how). Bytes are what an op must move at least: its inputs, outputs and gradients, each
once. Next to each op's time stands that of plain PyTorch, uncompiled, which torch.compile would fuse in part.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from wkv7_gpu import copy_rate, median_ms, sets_beyond

from src.ops import relu_squared, time_mix_inputs, time_mix_output, token_shift
from src.training.optim import MasterAdamW

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = [(8192, 768), (32768, 2048)]
HEAD_SIZE, EPS = 64, 64e-5
# Per bf16 parameter: its gradient, once for the norm and once for the step; master and moments, in and out; itself.
ADAMW_BYTES = 2 * 2 + 2 * 12 + 2


@dataclass(frozen=True)
class Op:
    """One of src/ops/elementwise.py, its native op, and the numbers that it reads and writes per number of x."""

    function: Callable[..., Any]  # (*tensors, kernel) -> outputs
    name: str
    activations: int  # the first inputs, [1, T, C] each
    vectors: int  # the others, C numbers each
    numbers: tuple[float, ...] = ()  # of the native op, after its tensors
    forward: int = 0
    backward: int = 0
    wide: int = 1  # x has so many times C channels

    def inputs(self, tokens: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
        shapes = [(1, tokens, self.wide * width)] * self.activations + [(1, 1, width)] * self.vectors
        return [torch.randn(shape, device=device).to(dtype) for shape in shapes]

    def native(self, tensors: list[Tensor]) -> list[Tensor | None]:
        """The tensors as the native op takes them."""
        if self.name.startswith("token_shift"):
            return [tensors[0], None, None, *tensors[1:]]
        return list(tensors)


OPS = (
    Op(lambda x, *m, kernel: token_shift(x, None, None, m, kernel=kernel), "token_shift_6", 1, 6, (), 7, 8),
    Op(lambda x, *m, kernel: token_shift(x, None, None, m, kernel=kernel), "token_shift_3", 1, 3, (), 4, 5),
    Op(lambda x, *m, kernel: token_shift(x, None, None, m, kernel=kernel), "token_shift_1", 1, 1, (), 2, 3),
    Op(lambda *t, kernel: time_mix_inputs(*t, HEAD_SIZE, kernel=kernel), "time_mix_inputs", 5, 4, (HEAD_SIZE,), 9, 14),
    Op(
        lambda *t, kernel: time_mix_output(*t[:5], *_norm(*t[5:]), EPS, HEAD_SIZE, kernel=kernel),
        *("time_mix_output", 5, 3, (EPS, HEAD_SIZE), 6, 11),
    ),
    Op(lambda x, kernel: relu_squared(x, kernel=kernel), "relu_squared", 1, 0, (), 2, 3, wide=4),
)


def _norm(r_k: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return r_k.view(-1, HEAD_SIZE), weight.flatten(), bias.flatten()


def outputs_and_gradients(op: Op, inputs: list[Tensor], dtype: torch.dtype, kernel: str) -> list[Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = op.function(*leaves, kernel=kernel)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator(inputs[0].device).manual_seed(1)
    d = [torch.randn(x.shape, generator=generator, device=x.device).to(inputs[0].dtype).to(dtype) for x in outputs]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, leaves, d))


def report_errors(device: str = "cuda", tokens: int = 1031, width: int = 768) -> bool:
    """Prints each op's largest relative error; whether all are within their bounds and two runs give equal bits."""
    torch.manual_seed(0)
    within = True
    for op in OPS:
        for dtype in DTYPES:
            inputs = op.inputs(tokens, width, dtype, device)
            true = outputs_and_gradients(op, inputs, torch.float64, "reference")
            plain = outputs_and_gradients(op, inputs, dtype, "reference")
            first, second = (outputs_and_gradients(op, inputs, dtype, "auto") for _ in range(2))
            errors = [
                [float((x.double() - t).norm() / t.norm()) for x, t in zip(xs, true, strict=True)]
                for xs in (first, plain)
            ]
            good = all(e <= 2 * p + 1e-7 for e, p in zip(*errors, strict=True))
            same = all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
            within &= good and same
            verdict = ("" if good else ", OVER ITS BOUND") + ("" if same else ", NOT THE SAME BITS")
            name = str(dtype).removeprefix("torch.")
            print(f"{op.name}, {name}: {max(errors[0]):.1e}, plain PyTorch {max(errors[1]):.1e}{verdict}", flush=True)
    return _adamw_error(device) and within


def optimizer_of(numel: int, device: str) -> MasterAdamW:
    parameter = nn.Parameter(torch.randn(numel, device=device).bfloat16())
    parameter.grad = torch.randn(numel, device=device).bfloat16()
    group = {"params": [parameter], "weight_decay": 0.1}
    return MasterAdamW([group], lr=1e-3, betas=(0.9, 0.99), eps=1e-18, grad_clip=1.0)


def _adamw_error(device: str, numel: int = 1_000_003) -> bool:
    optimizer = optimizer_of(numel, device)
    (parameter,), (master,) = optimizer.parameters, optimizer.masters
    assert parameter.grad is not None
    weights, gradient = master.detach().double(), parameter.grad.double()
    gradient = gradient * min(1.0, 1.0 / (float(gradient.norm()) + 1e-6))
    optimizer.step()
    # the first step: both moments, their bias taken out, are of this gradient
    true = weights * (1 - 1e-4) - 1e-3 * gradient / (gradient.abs() + 1e-18)
    error = float((master.detach().double() - true).norm() / true.norm())
    good = error < 1e-6 and torch.equal(parameter, master.bfloat16())
    print(f"adamw, bfloat16: {error:.1e} of the masters{'' if good else ', OVER ITS BOUND'}", flush=True)
    return good


def time_op(op: Op, tokens: int, width: int, device: str, cache: int, repetitions: int) -> list[float]:
    """Milliseconds in bf16: forward and backward of the native op, forward and backward of plain PyTorch."""
    count = sets_beyond(cache, 2 * op.forward * tokens * width * op.wide)
    sets = [op.inputs(tokens, width, torch.bfloat16, device) for _ in range(count)]
    run, back = (getattr(torch.ops.rwkv7, name) for name in (op.name, f"{op.name}_backward"))

    def forward(x: list[Tensor]) -> list[Tensor]:
        outputs = run(*op.native(x), *op.numbers)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    def plain(x: list[Tensor], d: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in x]
        return torch.autograd.grad(op.function(*leaves, kernel="reference"), leaves, d)

    pairs = [(x, [torch.randn_like(y) for y in forward(x)]) for x in sets]

    def milliseconds(function: Callable[[list[Tensor], list[Tensor]], Any]) -> float:
        return median_ms([functools.partial(function, x, d) for x, d in pairs], repetitions, device)

    with torch.no_grad():
        plain_forward = milliseconds(lambda x, d: op.function(*x, kernel="reference"))
        native = [
            milliseconds(lambda x, d: forward(x)),
            milliseconds(lambda x, d: back(*d, *op.native(x), *op.numbers)),
        ]
    return [*native, plain_forward, milliseconds(plain) - plain_forward]


HEADER = (
    "| op | tokens, C | direction | ms | GB/s | of the copy rate | plain PyTorch ms |\n|---|---|---|---|---|---|---|"
)


def report_times(device: str = "cuda", sizes: list[tuple[int, int]] = SIZES, repetitions: int = 20) -> None:
    """Measures and prints a Markdown table, in bf16."""
    torch.manual_seed(0)
    cuda = device == "cuda"
    cache = torch.cuda.get_device_properties(0).L2_cache_size if cuda else 0
    copy = copy_rate(device, 2**30 if cuda else 2**22)
    print(f"copy rate {copy / 1e9:.0f} GB/s\n\n{HEADER}", flush=True)

    def line(name: str, size: str, direction: str, bytes_: float, ms: float, plain: str) -> None:
        rate = bytes_ / ms * 1e3
        cells = [name, size, direction, f"{ms:.3f}", f"{rate / 1e9:.0f}", f"{rate / copy:.0%}", plain]
        print(f"| {' | '.join(cells)} |", flush=True)

    for tokens, width in sizes:
        for op in OPS:
            ms = time_op(op, tokens, width, device, cache, repetitions)
            numel = tokens * width * op.wide
            for i, (direction, moved) in enumerate((("forward", op.forward), ("backward", op.backward))):
                line(op.name, f"{tokens}, {width}", direction, 2 * numel * moved, ms[i], f"{ms[2 + i]:.3f}")
    numel = 2**27 if cuda else 2**16
    optimizer = optimizer_of(numel, device)
    milliseconds = median_ms([optimizer.update], repetitions, device)
    line("adamw and norm", f"{numel} parameters", "step", ADAMW_BYTES * numel, milliseconds, "")


def run_once(device: str = "cuda") -> None:
    for op in OPS:
        outputs_and_gradients(op, op.inputs(*SIZES[0], torch.bfloat16, device), torch.bfloat16, "auto")
    optimizer_of(2**24, device).step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["errors", "times", "once"])
    part = parser.parse_args().part
    if part == "errors":
        raise SystemExit(0 if report_errors() else 1)
    report_times() if part == "times" else run_once()


if __name__ == "__main__":
    main()

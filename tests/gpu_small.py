"""Every CUDA kernel forward and backward, at sizes small enough for compute-sanitizer (used by tools/gpu_check.sh)."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[0]))

from host_cuda.problems import INPUTS, incoming, problem

from src.ops import linear_cross_entropy_l2wrap, relu_squared, time_mix_inputs, time_mix_output, token_shift, wkv7
from src.training.optim import MasterAdamW

SHAPES: list[dict[str, list[int]]] = [{}, {"cu_seqlens": [0, 5, 5, 53, 70]}]


def run_wkv7(kernel: str, head_size: int, dtype: torch.dtype, length: int = 70) -> None:
    for shape in SHAPES:
        x = problem(1, length, 2, head_size, dtype, state=True, cu_seqlens=shape.get("cu_seqlens"))
        dy, dfinal_state = (t.cuda() for t in incoming(x))
        leaves = [x[name].cuda().requires_grad_() for name in (*INPUTS, "state")]
        bounds = x["cu_seqlens"].cuda() if shape else None
        outputs = wkv7(*leaves, bounds, kernel=kernel)
        for got in (*outputs, *torch.autograd.grad(outputs, leaves, [dy, dfinal_state])):
            assert got.isfinite().all()


def run_loss(dtype: torch.dtype, chunk: int) -> None:
    hidden = torch.randn(9, 32, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(517, 32, device="cuda").to(dtype).requires_grad_()
    targets = torch.tensor([0, 516, -100, 3, 4, -100, 6, 7, 8], device="cuda")
    for got in torch.autograd.grad(linear_cross_entropy_l2wrap(hidden, weight, targets, chunk), [hidden, weight]):
        assert got.isfinite().all()


def run_elementwise(dtype: torch.dtype) -> None:
    def leaves(count: int, *shape: int) -> list[torch.Tensor]:
        return [torch.randn(shape, device="cuda").to(dtype).requires_grad_() for _ in range(count)]

    x, before, mixes = leaves(5, 1, 70, 192), leaves(1, 4, 192), leaves(6, 1, 1, 192)
    bounds = torch.tensor([0, 5, 5, 53, 70], dtype=torch.int32, device="cuda")
    norm = [*leaves(1, 3, 64), *leaves(2, 192)]
    for outputs, inputs in (
        (token_shift(x[0], before[0], bounds, tuple(mixes)), [x[0], before[0], *mixes]),
        (token_shift(x[0], None, None, (mixes[0],)), [x[0], mixes[0]]),
        (time_mix_inputs(*x, *mixes[:4], 64), [*x, *mixes[:4]]),
        ([time_mix_output(*x, *norm, 64e-5, 64)], [*x, *norm]),
        ([relu_squared(x[0])], [x[0]]),
    ):
        for got in torch.autograd.grad(outputs, inputs, [torch.ones_like(y) for y in outputs]):
            assert got.isfinite().all()


def run_adamw(dtype: torch.dtype) -> None:
    parameters = [torch.nn.Parameter(torch.randn(size, device="cuda").to(dtype)) for size in (1, 4097, *range(3, 70))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    groups = [{"params": parameters, "weight_decay": 0.1}]
    MasterAdamW(groups, lr=1e-3, betas=(0.9, 0.99), eps=1e-18, grad_clip=1.0).step()
    assert all(parameter.isfinite().all() for parameter in parameters)


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for head_size in (32, 64, 128):
            run_wkv7("recurrent", head_size, dtype)
        for chunk in (0, 4):
            run_loss(dtype, chunk)
        run_elementwise(dtype)
        run_adamw(dtype)
    run_wkv7("chunked", 64, torch.bfloat16)
    os.environ["RWKV7_WGMMA"] = "1"
    run_wkv7("chunked", 64, torch.bfloat16)
    run_wkv7("chunked", 64, torch.bfloat16, length=2100)  # where a GPU has warpgroups the kernel cuts this into parts
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()

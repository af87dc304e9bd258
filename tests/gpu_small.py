"""Every CUDA kernel forward and backward, at sizes small enough for compute-sanitizer (used by tools/gpu_check.sh)."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[0]))

from host_cuda.problems import INPUTS, incoming, problem

from src.ops import linear_cross_entropy_l2wrap, wkv7

SHAPES: list[dict[str, list[int]]] = [{}, {"cu_seqlens": [0, 5, 5, 53, 70]}]


def run_wkv7(kernel: str, head_size: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x = problem(1, 70, 2, head_size, dtype, state=True, cu_seqlens=shape.get("cu_seqlens"))
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


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for head_size in (32, 64, 128):
            run_wkv7("recurrent", head_size, dtype)
        for chunk in (0, 4):
            run_loss(dtype, chunk)
    run_wkv7("chunked", 64, torch.bfloat16)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()

"""Time of a time mix's small products, forward + backward: separate as in src/model/layers.py, joined in three ways.

    python tests/bench/low_rank.py [--device cuda] [--n_embd 768] [--tokens 8192] [--dtype bfloat16]

stacked   value and the first factor of its residual, which have one input, as one product with concatenated weights
batched   the first factors of decay, rate and gate, padded to one rank, as one batched product (their inputs would
          have to lie in one tensor; here they do already, which costs nothing)
shifted   token shift and the first factors of all four as one product of the input that isn't shifted
          (src/ops/shifted_products.py), against six shifted inputs and four products: as compiled blocks have it on a
          GPU, here compiled on a GPU only

Printed: milliseconds of each (medians), and joined / separate: above 1 joining is slower. On two cores with 2048
tokens, 2026-11-22: batched 1.43 to 1.51 in fp32 and 0.60 in bf16, stacked 0.82 to 1.02 and 0.90; not measured on a
GPU. The model keeps them separate, but shifted in compiled blocks on a GPU.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).parents[2]))

from src.ops import shifted_products, token_shift

Make = Callable[[], list[torch.Tensor]]

RANKS = {"w": 64, "a": 64, "v": 32, "g": 128}  # of L12-D768


def shifted_pair(width: int, tokens: int, random: Callable[..., torch.Tensor]) -> tuple[Make, Make, list[torch.Tensor]]:
    """Shifted inputs of r, k, v and first factors of w, a, g, v: from six mixes, and from three and one product."""
    x = random(1, tokens, width)
    mixes = {name: random(1, 1, width) for name in "rkvwag"}
    firsts = {name: random(width, rank) for name, rank in RANKS.items()}

    def separate() -> list[torch.Tensor]:
        shifted = dict(zip(mixes, token_shift(x, None, None, tuple(mixes.values())), strict=True))
        return [*(shifted[name] for name in "rkv"), *(shifted[name] @ first for name, first in firsts.items())]

    def joined() -> list[torch.Tensor]:
        pairs = [(mixes[name], first) for name, first in firsts.items()]
        wide = token_shift(x, None, None, tuple(mixes[name] for name in "rkv"))
        return [*wide, *shifted_products(x, None, None, pairs)]

    return separate, joined, [x, *mixes.values(), *firsts.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="", help="default: bfloat16 on a GPU, float32 on a CPU")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    width, tokens = args.n_embd, args.tokens

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=args.device, dtype=dtype).requires_grad_()

    x, value, v1 = random(tokens, width), random(width, width), random(width, RANKS["v"])
    mixed = random(3, tokens, width)
    firsts = [random(width, RANKS[name]) for name in "wag"]
    rank = max(RANKS[name] for name in "wag")

    def stacked() -> list[torch.Tensor]:
        return list((x @ torch.cat([value.t(), v1], 1)).split([width, RANKS["v"]], 1))

    def batched() -> list[torch.Tensor]:
        padded = torch.stack([torch.nn.functional.pad(first, (0, rank - first.shape[1])) for first in firsts])
        out = torch.bmm(mixed, padded)
        return [out[i, :, : first.shape[1]] for i, first in enumerate(firsts)]

    shifted: tuple[Make, Make, list[torch.Tensor]] = shifted_pair(width, tokens, random)
    if args.device == "cuda":
        shifted = (torch.compile(shifted[0]), torch.compile(shifted[1]), shifted[2])
    pairs = {
        "stacked": (lambda: [x @ value.t(), x @ v1], stacked, [x, value, v1]),
        "batched": (
            lambda: [m @ first for m, first in zip(mixed.unbind(0), firsts, strict=True)],
            batched,
            [mixed, *firsts],
        ),
        "shifted": shifted,
    }
    print(f"{tokens} tokens, n_embd {width}, {dtype}, {args.device}, {torch.get_num_threads()} threads")
    for name, (separate, joined, inputs) in pairs.items():
        incoming = [torch.randn_like(out) for out in separate()]
        for one, other in zip(separate(), joined(), strict=True):
            assert (one - other).norm() < 1e-2 * one.norm()
        seconds = []
        for make in (separate, joined):
            names = {"torch": torch, "make": make, "inputs": inputs, "incoming": incoming}
            threads = torch.get_num_threads()
            run = Timer("torch.autograd.grad(make(), inputs, incoming)", globals=names, num_threads=threads)
            seconds.append(run.blocked_autorange(min_run_time=3).median)
        separate_ms, joined_ms = (1e3 * s for s in seconds)
        print(
            f"{name:<8} separate {separate_ms:.3f} ms, joined {joined_ms:.3f} ms, ratio {joined_ms / separate_ms:.2f}"
        )


if __name__ == "__main__":
    main()

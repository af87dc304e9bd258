"""Decoding and prefill beside the PyPI package `rwkv`, on the same weights in one process with one thread setting.

    python tests/bench/inference.py [--n_layer 12 --n_embd 768 --vocab_size 65536] [--threads 2] [--rounds 5]

Each round measures the copy bandwidth, the package, ours, and the bandwidth again, one right after the other: what counts are the
ratios within a round, because machines are shared. Rounds whose two bandwidths differ by more than a quarter are dropped, medians are shown.
"""

# ruff: noqa: E402 (the package reads its settings from the environment when it is imported)
import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}  # read by the package when it is imported
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch
from random_model import random_model
from rwkv.model import RWKV

from src.inference.decoder import Decoder
from src.model import RWKV7

COPIED = 1 << 26  # floats: far more than any cache holds
DISTURBED = 0.25


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median_step(step: Callable[[], object], steps: int) -> float:
    return statistics.median(seconds(step) for _ in range(steps))


class Copy:
    """Bytes read and written per second by a plain copy."""

    def __init__(self) -> None:
        self.source = torch.ones(COPIED)
        self.target = torch.zeros(COPIED)

    def __call__(self) -> float:
        return 8 * COPIED / median_step(lambda: self.target.copy_(self.source), 3)


def bytes_per_token(model: RWKV7) -> int:
    """Every parameter is read once for a token, of the embedding one row."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) - model.emb.weight.numel() * 4


@torch.no_grad()
def compare(options: argparse.Namespace) -> list[dict[str, float]]:
    model = random_model(n_layer=options.n_layer, n_embd=options.n_embd, vocab_size=options.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), f"{folder}/weights.pth")
        package = RWKV(model=f"{folder}/weights", strategy="cpu fp32")
    prompt = [i * 7919 % options.vocab_size for i in range(options.prompt)]
    decoder, copy = Decoder(model), Copy()

    theirs, state = package.forward(prompt[:8], None)
    difference = float((decoder.prefill([prompt[:8]])[0] - theirs).abs().max())
    for _ in range(3):  # the package compiles itself during its first steps
        _, state = package.forward([1], state)
        decoder.step([1])
    print(f"largest difference of the logits after 8 tokens: {difference:.1e}", flush=True)

    rounds = []
    for number in range(1, options.rounds + 1):
        before = copy()
        their_step = median_step(lambda: package.forward([1], state), options.steps)
        our_step = median_step(lambda: decoder.step([1]), options.steps)
        after = copy()
        their_prefill = seconds(lambda: package.forward(prompt, None))
        our_prefill = seconds(lambda: decoder.prefill([prompt]))
        bandwidth = (before + after) / 2
        row = {
            "copy GB/s": bandwidth / 1e9,
            "rwkv decode tok/s": 1 / their_step,
            "ours decode tok/s": 1 / our_step,
            "decode ratio": their_step / our_step,
            "of copy bandwidth": bytes_per_token(model) / our_step / bandwidth,
            "rwkv prefill tok/s": len(prompt) / their_prefill,
            "ours prefill tok/s": len(prompt) / our_prefill,
            "prefill ratio": their_prefill / our_prefill,
        }
        quiet = abs(before - after) / max(before, after) <= DISTURBED
        print(f"round {number}{'' if quiet else ' (disturbed, dropped)'}: " + ", ".join(f"{k} {v:.2f}" for k, v in row.items()), flush=True)
        if quiet:
            rounds.append(row)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="decoding steps per round")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds = compare(options)
    if not rounds:
        sys.exit("every round was disturbed: the machine is too busy to measure anything")
    title = f"L{options.n_layer}-D{options.n_embd}, V {options.vocab_size}, fp32, {options.threads} threads, prompt {options.prompt}"
    print(f"\n{title}; medians of {len(rounds)} rounds")
    for name in rounds[0]:
        print(f"  {name:20} {statistics.median(row[name] for row in rounds):8.2f}")


if __name__ == "__main__":
    main()

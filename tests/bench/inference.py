"""Decoding and prefill speed on a CPU, compared with the PyPI package `rwkv`: the same weights, process and threads.

    python tests/bench/inference.py [--n_layer 12 --n_embd 768 --vocab_size 65536] [--threads 2] [--prompt 128]
    python tests/bench/inference.py --dtype bf16 --prompt 512     prefill in bf16; the package in its faster precision

Each round measures the copy bandwidth, the package, this project and the bandwidth again, in immediate succession.
Machines are shared, so only ratios within a round are meaningful. Rounds whose two bandwidths differ by more than a
quarter are dropped; medians are printed.

- copy bandwidth: bytes read plus bytes written per second by a plain `Tensor.copy_` of 256 MB.
- of copy bandwidth: bytes of weights that a step reads, in the precision in which the native step stores them (all but
  the embedding, once; nothing else is counted), divided by the step's time and the copy bandwidth.
- --weights bf16: the values of a file saved in bf16 (released models, runs in bf16), loaded as fp32 by both. The native
  step detects that they fit bf16 and reads 12 bits per weight (16 for several sequences); arithmetic is in fp32. With
  --weights fp32 (a run in fp32) both read 32 bits.
- --dtype bf16: this project computes in bf16, as with `--dtype bf16`. Only prefill is compared: with the package in
  fp32 or in bf16, whichever is faster in the round. The logits' error is that against fp32 arithmetic, as a norm.
- The package is compiled by TorchScript; both of its code paths run until they are compiled before they are timed.
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

COPIED = 1 << 26  # floats: 256 MB, larger than any cache
DISTURBED = 0.25  # relative difference of a round's two bandwidths
BATCHES = (4, 16)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median_time(work: Callable[[], object], times: int) -> float:
    return statistics.median(seconds(work) for _ in range(times))


class Copy:
    """Bytes read and written per second by a plain copy."""

    def __init__(self) -> None:
        self.source = torch.ones(COPIED)
        self.target = torch.zeros(COPIED)

    def __call__(self) -> float:
        return 8 * COPIED / median_time(lambda: self.target.copy_(self.source), 3)


def bytes_per_token(decoder: Decoder) -> int:
    """Of the native step's weights: each is read once, except for the embedding, of which a step reads one row."""
    weights = decoder.native_weights
    return sum(t.numel() * t.element_size() for t in (weights.head, *weights.layers))


@torch.no_grad()
def compare_prefill(options: argparse.Namespace) -> list[dict[str, float]]:
    """Prefill in bf16."""
    model = random_model(n_layer=options.n_layer, n_embd=options.n_embd, vocab_size=options.vocab_size).bfloat16()
    prompt = [i * 7919 % options.vocab_size for i in range(options.prompt)]
    exact = Decoder(model.float()).prefill([prompt])  # in place: the values stay those of bf16
    decoder = Decoder(model.bfloat16())
    packages = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), f"{folder}/weights.pth")
        for precision in ("fp32", "bf16"):
            packages[precision] = RWKV(model=f"{folder}/weights", strategy=f"cpu {precision}")
    for package in packages.values():  # the first call profiles, the second one compiles
        for _ in range(2):
            package.forward(prompt, None)
    error = (decoder.prefill([prompt]) - exact).norm() / exact.norm()
    print(f"relative error of the logits after {len(prompt)} tokens: {error:.1e}", flush=True)
    rounds = []
    for _ in range(options.rounds):
        times = {
            f"rwkv {name}": seconds(lambda p=package: p.forward(prompt, None)) for name, package in packages.items()
        }
        ours = median_time(lambda: decoder.prefill([prompt]), 3)
        best = min(times.values())
        row = {f"{name} tok/s": len(prompt) / taken for name, taken in times.items()}
        rounds.append(row | {"ours prefill tok/s": len(prompt) / ours, "prefill ratio": best / ours})
        print(", ".join(f"{k} {v:.2f}" for k, v in rounds[-1].items()), flush=True)
    return rounds


@torch.no_grad()
def compare(options: argparse.Namespace) -> list[dict[str, float]]:
    model = random_model(n_layer=options.n_layer, n_embd=options.n_embd, vocab_size=options.vocab_size)
    if options.weights == "bf16":
        model = model.bfloat16().float()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), f"{folder}/weights.pth")
        package = RWKV(model=f"{folder}/weights", strategy="cpu fp32")
    prompt = [i * 7919 % options.vocab_size for i in range(options.prompt)]
    copy = Copy()
    decoders = {batch: Decoder(model, batch) for batch in (1, *BATCHES)}
    decoder = decoders[1]

    first_prefill = {
        "rwkv": seconds(lambda: package.forward(prompt, None)),
        "ours": seconds(lambda: decoder.prefill([prompt])),
    }
    print(
        "first prompt of the process: " + ", ".join(f"{name} {taken:.1f} s" for name, taken in first_prefill.items()),
        flush=True,
    )
    theirs, state = package.forward(prompt, None)  # the first call profiles, the second one compiles
    decoder.reset()
    difference = float((decoder.prefill([prompt])[0] - theirs).abs().max())
    print(f"largest difference of the logits after {len(prompt)} tokens: {difference:.1e}", flush=True)
    for _ in range(3):
        _, state = package.forward([1], state)
        for batch, batched in decoders.items():
            batched.step([1] * batch)

    rounds = []
    for number in range(1, options.rounds + 1):
        before = copy()
        their_step = median_time(lambda: package.forward([1], state), options.steps)
        our_steps = {batch: median_time(lambda b=batch: decoders[b].step([1] * b), options.steps) for batch in decoders}
        their_prefill = seconds(lambda: package.forward(prompt, None))
        our_prefill = median_time(lambda: decoder.prefill([prompt]), 3)
        after = copy()
        bandwidth = (before + after) / 2
        row = {
            "copy GB/s": bandwidth / 1e9,
            "rwkv decode tok/s": 1 / their_step,
            "ours decode tok/s": 1 / our_steps[1],
            "decode ratio": their_step / our_steps[1],
            "of copy bandwidth": bytes_per_token(decoder) / our_steps[1] / bandwidth,
            **{f"ours, batch of {batch}, tok/s": batch / our_steps[batch] for batch in BATCHES},
            "rwkv prefill tok/s": len(prompt) / their_prefill,
            "ours prefill tok/s": len(prompt) / our_prefill,
            "prefill ratio": their_prefill / our_prefill,
        }
        quiet = abs(before - after) / max(before, after) <= DISTURBED
        print(
            f"round {number}{'' if quiet else ' (disturbed, dropped)'}: "
            + ", ".join(f"{k} {v:.2f}" for k, v in row.items()),
            flush=True,
        )
        if quiet:
            rounds.append(row)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--weights",
        choices=("bf16", "fp32"),
        default="bf16",
        help="bf16: fp32 numbers as a file saved in bf16 gives them",
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: prefill in bf16 arithmetic")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="decoding steps per round")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds = compare(options) if options.dtype == "fp32" else compare_prefill(options)
    if not rounds:
        sys.exit("every round was disturbed: the machine is too busy for a measurement")
    size = f"L{options.n_layer}-D{options.n_embd}, V {options.vocab_size}"
    weights = options.weights if options.dtype == "fp32" else "bf16"
    setting = f"{weights} weights, {options.threads} threads, prompt {options.prompt}"
    print(f"\n{size}, {options.dtype} arithmetic, {setting}; medians of {len(rounds)} rounds")
    for name in rounds[0]:
        print(f"  {name:26} {statistics.median(row[name] for row in rounds):8.2f}")


if __name__ == "__main__":
    main()

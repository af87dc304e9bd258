"""What --chunk_ctx costs: memory of a step by length, against the formula, and time against one pass with --grad_cp 1.

python tests/bench/long_context.py memory [PIECE LENGTH ...]    peak memory of a step in pieces at L4-D256
python tests/bench/long_context.py time [PIECE ...]             pairs of steps in one process: the median ratio
"""

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from src.config import ModelConfig
from src.model import RWKV7
from src.training.hardware.allocator import set_up_malloc
from src.training.objectives.next_token import NextToken
from src.training.objectives.segments import Segments
from src.training.preflight.piece_memory import TOKEN_BYTES, border_bytes

VOCAB, PIECE = 6400, 2048
LENGTHS = (16384, 131072, 1 << 20)
MIB = 1 << 20
PAIRS = 5


def step(model, length, chunk):
    """Seconds of one step (forward and backward) on random tokens."""
    tokens = torch.randint(VOCAB, (1, length + 1))
    began = time.perf_counter()
    objective = NextToken(model.head, 0, Segments(chunk, length))
    objective(model, (tokens[:, :-1], tokens[:, 1:]))[0].backward()
    model.zero_grad()
    return time.perf_counter() - began


def peak(length, piece):
    """Bytes of this process at most, with a step of `length` tokens in it."""
    set_up_malloc(lean=True)  # as in a run with --chunk_ctx
    step(RWKV7(ModelConfig(4, 256, VOCAB)), length, piece)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compare_memory(piece, lengths):
    model = ModelConfig(4, 256, VOCAB)
    first = 2 * piece
    peaks = {}
    for length in (first, *lengths):
        command = [sys.executable, __file__, "peak", str(length), str(piece)]
        peaks[length] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        grown = (length - first) // piece * border_bytes(model, 4) + TOKEN_BYTES * (length - first)
        measured = peaks[length] - peaks[first]
        print(
            f"{length:>9,} tokens: {peaks[length] / MIB:8.1f} MiB, {measured / MIB:7.1f} more, "
            f"formula {grown / MIB:7.1f}",
            flush=True,
        )


def compare_time(chunk, length=4096):
    model = RWKV7(ModelConfig(4, 256, VOCAB))
    checkpointed = RWKV7(ModelConfig(4, 256, VOCAB, grad_cp=True))
    step(model, length, chunk), step(checkpointed, length, 0)
    ratios = []
    for pair in range(PAIRS):
        order = [(model, chunk), (checkpointed, 0)]
        seconds = [step(m, length, c) for m, c in (order if pair % 2 else order[::-1])]
        ratios.append(seconds[0] / seconds[1] if pair % 2 else seconds[1] / seconds[0])
    print(
        f"{length} tokens in pieces of {chunk} against --grad_cp 1 in one: median {statistics.median(ratios):.2f}, "
        f"from {min(ratios):.2f} to {max(ratios):.2f}"
    )


if __name__ == "__main__":
    mode, *numbers = sys.argv[1], *map(int, sys.argv[2:])
    if mode == "peak":
        print(peak(*numbers))
    elif mode == "memory":
        compare_memory(numbers[0] if numbers else PIECE, numbers[1:] or LENGTHS)
    else:
        for chunk in numbers or [PIECE]:
            compare_time(chunk)

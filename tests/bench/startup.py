"""Seconds until a program answers: the help of train.py, the first line of a run, the first prompt of the chat.

    python tests/bench/startup.py [--repeat 5]

A model of the demo's size with random weights and data is written to a temporary folder. One start is not counted: it
builds the native library if the cache lacks it and fills the page cache. The median is what counts, the range is shown.
"""

import argparse
import os
import pty
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from chat_models import make_tokenizer

from src.dataset.binidx import BinIdxWriter
from src.model import RWKV7, ModelConfig

ROOT = Path(__file__).resolve().parents[2]
LAYERS, WIDTH, VOCAB = 4, 256, 6400  # the demo's
LIMITS = {"train.py --help": 1.0, "first line of a run": 5.0, "first prompt of the chat": 5.0}
TIMEOUT = 120  # of one start, in seconds
PROMPT = b"\x1b[0m>"  # as prompt_toolkit draws it


def make_run(folder: Path) -> None:
    """Weights, tokenizer and data as after a training."""
    run = folder / "run"
    make_tokenizer(run / "tokenizer")
    torch.save(RWKV7(ModelConfig(LAYERS, WIDTH, VOCAB)).state_dict(), run / "rwkv-final.pth")
    with BinIdxWriter(folder / "data", np.uint16) as out:
        out.add_document(np.random.default_rng(0).integers(1, VOCAB, 100_000))


def seconds_of_help(folder: Path) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def seconds_to_first_line(folder: Path) -> float:
    flags = {
        "proj_dir": folder / "new", "data_file": folder / "data", "vocab_size": VOCAB, "n_layer": LAYERS,
        "n_embd": WIDTH, "ctx_len": 256, "accelerator": "cpu",
    }  # fmt: skip
    argv = [argument for name, value in flags.items() for argument in (f"--{name}", str(value))]
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "train.py", *argv], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
        process.kill()
    if not line:
        raise SystemExit("the run ended without a line; its message is above")
    return seconds


def seconds_to_first_prompt(folder: Path) -> float:
    """In a pseudo-terminal: without a terminal the chat shows no prompt."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "API_DEMO_CHAT.py", str(folder / "run"), "--history", str(folder / "history")]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    text = b""
    while PROMPT not in text:
        ready, _, _ = select.select([ours], [], [], TIMEOUT)
        if not ready or process.poll() is not None:
            raise SystemExit(f"no prompt: {text.decode(errors='replace')}")
        text += os.read(ours, 4096)
    seconds = time.perf_counter() - start
    process.kill()
    process.wait()
    os.close(ours)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="starts of each program [%(default)s]")
    options = parser.parse_args()
    measure: dict[str, Callable[[Path], float]] = dict(
        zip(LIMITS, (seconds_of_help, seconds_to_first_line, seconds_to_first_prompt), strict=True)
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_run(folder)
        for title, seconds in measure.items():
            seconds(folder)
            times = [seconds(folder) for _ in range(options.repeat)]
            median, limit = statistics.median(times), LIMITS[title]
            verdict = "within" if median <= limit else "OVER"
            print(
                f"{title:<26}{median:6.2f} s ({min(times):.2f} to {max(times):.2f}), {verdict} {limit:g} s", flush=True
            )


if __name__ == "__main__":
    main()

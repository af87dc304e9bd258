"""Seconds until a program answers: the help of train.py, the first line of a run, the first prompt of the chat.

    python tests/bench/startup.py [--repeat 5]

A model of the demo's size with random weights and data is written to a temporary folder. One start is not counted: it
builds the native library if the cache lacks it, and fills the page cache. The median counts; compare CPU seconds on a
machine that does other work too. The bounds are for an environment with requirements.txt: where transformers and scipy
are installed (tests/requirements.txt), torchmetrics, which Lightning needs, imports them, too.
"""

import argparse
import os
import pty
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
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
TIMEOUT = 120  # of one start, in seconds
PROMPT = b"\x1b[0m>"  # as prompt_toolkit draws it


def make_run(folder: Path) -> None:
    """Weights, tokenizer and data as after a training."""
    run = folder / "run"
    make_tokenizer(run / "tokenizer")
    torch.save(RWKV7(ModelConfig(LAYERS, WIDTH, VOCAB)).state_dict(), run / "rwkv-final.pth")
    with BinIdxWriter(folder / "data", np.uint16) as out:
        out.add_document(np.random.default_rng(0).integers(1, VOCAB, 100_000))


def end(process: subprocess.Popen[bytes]) -> float:
    """Ends a process; the CPU seconds that it took."""
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)  # not Popen.kill, which would collect a process that has ended by itself
    # wait4 instead of Popen.wait: it also returns what the process used
    _, process.returncode, usage = os.wait4(process.pid, 0)
    return usage.ru_utime + usage.ru_stime


def start_help(folder: Path) -> tuple[float, float]:
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "train.py", "--help"], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    if b"--n_layer" not in process.stdout.read():
        raise SystemExit("no help; the message is above")
    return time.perf_counter() - start, end(process)


def start_run(folder: Path) -> tuple[float, float]:
    flags = {
        "proj_dir": folder / "new", "data_file": folder / "data", "vocab_size": VOCAB, "n_layer": LAYERS,
        "n_embd": WIDTH, "ctx_len": 256, "accelerator": "cpu",
    }  # fmt: skip
    argv = [argument for name, value in flags.items() for argument in (f"--{name}", str(value))]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "train.py", *argv], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    if not process.stdout.readline():
        raise SystemExit("the run ended without a line; its message is above")
    return time.perf_counter() - start, end(process)


def start_chat(folder: Path) -> tuple[float, float]:
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
    used = end(process)
    os.close(ours)
    return seconds, used


# What is started, how, and within how many seconds it has to answer.
STARTS: list[tuple[str, Callable[[Path], tuple[float, float]], float]] = [
    ("train.py --help", start_help, 1),
    ("first line of a run", start_run, 5),
    ("first prompt of the chat", start_chat, 5),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="starts of each program [%(default)s]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_run(folder)
        for title, start, limit in STARTS:
            start(folder)
            starts = [start(folder) for _ in range(options.repeat)]
            seconds, used = (statistics.median(column) for column in zip(*starts, strict=True))
            fastest, slowest = min(starts)[0], max(starts)[0]
            verdict = "within" if seconds <= limit else "OVER"
            print(
                f"{title:<26}{seconds:6.2f} s ({fastest:.2f} to {slowest:.2f}), CPU {used:.2f} s; {verdict} {limit} s",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""Speed and memory of make_data: python tests/bench/make_data.py [MEGABYTES]

Writes a .jsonl of this size from the sources of the standard library and runs make_data on 1, 2, ... all cores. Because
machines are shared, it prints tokens per second of wall-clock time and of CPU time (of the whole program), and those of
the tokenizer alone by CPU time, measured just before and after. Memory is the largest sample of the proportional set
size of the process and its workers together (Linux).
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from src.dataset import MMapIndexedDataset
from src.dataset.corpus.standard_library import library_sources
from src.dataset.tokenizer import Tokenizer, load_tokenizer
from src.dataset.workers import usable_cores

SCRIPT = Path(__file__).resolve().parent.parent.parent / "data" / "make_data.py"


def write_corpus(path: Path, megabytes: float) -> list[str]:
    """Writes documents of some 40 lines each with a wide range of lengths; returns 3000 of them."""
    generator = random.Random(0)
    documents = []
    for text in library_sources().values():
        lines = text.splitlines(keepends=True)
        while lines:
            count = int(generator.lognormvariate(3.3, 1)) + 1
            documents.append("".join(lines[:count]))
            lines = lines[count:]
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            generator.shuffle(documents)
            for text in documents:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return documents[:3000]


def tokenizer_rate(tokenizer: Tokenizer, texts: list[str]) -> float:
    """Tokens per second of CPU time of the tokenizer alone."""
    start = time.process_time()
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    return tokens / (time.process_time() - start)


def cpu_time_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def memory_of(pid: int) -> int:
    """Memory of a process and its children in bytes; shared pages count once."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0  # the process has just ended
    # Pss divides each shared page among its users: forked workers share the tokenizer.
    own_kib = next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return own_kib * 1024 + sum(memory_of(int(child)) for child in children)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("megabytes", type=float, nargs="?", default=200.0, help="size of the jsonl [200]")
    args = parser.parse_args()
    tokenizer = load_tokenizer("world")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "x.jsonl"
        texts = write_corpus(source, args.megabytes)
        for workers in sorted({1, *(1 << n for n in range(1, 8) if 1 << n < usable_cores()), usable_cores()}):
            before = tokenizer_rate(tokenizer, texts)
            start, cpu_start, memory = time.perf_counter(), cpu_time_of_children(), 0
            command = [sys.executable, SCRIPT, source, "1", "512", "--workers", str(workers)]
            run = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while run.poll() is None:
                memory = max(memory, memory_of(run.pid))
                time.sleep(0.05)
            assert run.returncode == 0
            tokens = MMapIndexedDataset(source.with_suffix("")).n_tokens
            rate = tokens / (time.perf_counter() - start)
            per_cpu_second = tokens / (cpu_time_of_children() - cpu_start)
            tokenizer_alone = (before + tokenizer_rate(tokenizer, texts)) / 2
            print(
                f"{workers:3} workers: {rate / 1e6:6.2f} M tokens/s; per CPU second {per_cpu_second / 1e6:.2f} M, "
                f"{per_cpu_second / tokenizer_alone:.2f} of the tokenizer's {tokenizer_alone / 1e6:.2f} M; "
                f"memory {memory / 1e6:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""How fast make_data is and what memory it takes: python tests/bench/make_data.py [MEGABYTES]

Makes a jsonl of this size from the standard library's sources and runs make_data on 1, 2, ... all cores. Machines are
shared, so beside the rate by the clock stands the rate by processor time, start and end of the program included, and
what the bare tokenizer reaches by processor time just before and after. Memory is the proportional set size of the
process and its workers together, the largest of samples taken all the time (Linux).
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
    """Documents of some 40 lines each, of very different lengths; returns some of them."""
    draw = random.Random(0)
    documents = []
    for text in library_sources().values():
        lines = text.splitlines(keepends=True)
        while lines:
            count = int(draw.lognormvariate(3.3, 1)) + 1
            documents.append("".join(lines[:count]))
            lines = lines[count:]
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            draw.shuffle(documents)
            for text in documents:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return documents[:3000]


def tokenizer_rate(tokenizer: Tokenizer, texts: list[str]) -> float:
    """Tokens per second of processor time of the tokenizer alone."""
    start = time.process_time()
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    return tokens / (time.process_time() - start)


def processor_time_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def memory_of(process: int) -> int:
    """Bytes of a process and its children, pages that several share counted once."""
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it has just ended
    own = next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return own * 1024 + sum(memory_of(int(child)) for child in children)


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
            start, busy, memory = time.perf_counter(), processor_time_of_children(), 0
            call = [sys.executable, SCRIPT, source, "1", "512", "--workers", str(workers)]
            run = subprocess.Popen(list(map(str, call)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while run.poll() is None:
                memory = max(memory, memory_of(run.pid))
                time.sleep(0.05)
            assert run.returncode == 0
            tokens = MMapIndexedDataset(source.with_suffix("")).n_tokens
            rate = tokens / (time.perf_counter() - start)
            a_core = tokens / (processor_time_of_children() - busy)
            bare = (before + tokenizer_rate(tokenizer, texts)) / 2
            print(
                f"{workers:3} workers: {rate / 1e6:6.2f} M tokens/s; a core {a_core / 1e6:.2f} M, "
                f"{a_core / bare:.2f} of the bare tokenizer's {bare / 1e6:.2f} M; memory {memory / 1e6:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()

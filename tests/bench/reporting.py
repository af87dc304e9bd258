"""The share of training time that reporting takes: log files, progress line, wandb (offline), figures, measurements.

python tests/bench/reporting.py [STEPS] [flags of train.py]      default: 120 steps of L4-D256, context 256, batch 8
"""

import resource
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from src.cli import parse
from src.dataset.binidx import BinIdxWriter
from src.training.figures import background
from src.training.reporting.log_files import MetricsFile, TrainLog
from src.training.reporting.loggers import LoggerSink
from src.training.reporting.progress import ProgressLine
from src.training.reporting.reporter import MEASURE_EVERY_STEPS, Reporter
from src.training.run import run

spent: dict[str, float] = defaultdict(float)
step_ends: list[float] = []
per_step: list[float] = []


def add_timer(owner: type, method: str, name: str) -> None:
    """Make `owner.method` add its time to spent[name]."""
    original = getattr(owner, method)

    def timed(*args, **kwargs):
        begin = time.perf_counter()
        result = original(*args, **kwargs)
        spent[name] += time.perf_counter() - begin
        return result

    setattr(owner, method, timed)


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 120
    for sink, name in (
        (MetricsFile, "metrics.csv"),
        (TrainLog, "train_log.txt"),
        (ProgressLine, "progress line"),
        (LoggerSink, "wandb"),
    ):
        for method in ("step", "mini_epoch"):
            add_timer(sink, method, name)
    add_timer(Reporter, "_measure", f"update ratios, largest logit (every {MEASURE_EVERY_STEPS} steps)")
    add_timer(Reporter, "on_train_batch_start", "Reporter")
    original = Reporter.on_train_batch_end

    def end(self, *args):
        begin = time.perf_counter()
        original(self, *args)
        step_ends.append(time.perf_counter())
        per_step.append(step_ends[-1] - begin)

    Reporter.on_train_batch_end = end  # type: ignore[method-assign]
    draw = background.LossFigureCallback._draw

    def timed_draw(self):
        begin = time.thread_time()  # the thread shares a core with training: only its own time counts
        draw(self)
        spent["loss.png (CPU time of its thread)"] += time.thread_time() - begin

    background.LossFigureCallback._draw = timed_draw  # type: ignore[method-assign]

    with tempfile.TemporaryDirectory() as folder:
        with BinIdxWriter(Path(folder) / "data", np.uint16) as writer:
            writer.add_document(np.random.default_rng(0).integers(1, 6400, 1_000_000).tolist())
        settings = {
            "data_file": f"{folder}/data",
            "proj_dir": f"{folder}/run",
            "vocab_size": 6400,
            "n_layer": 4,
            "n_embd": 256,
            "ctx_len": 256,
            "micro_bsz": 8,
            "my_exit_tokens": steps * 8 * 256,
            "epoch_steps": max(2, steps // 2),
            "random_seed": 0,
            "wandb": "bench",
            "save_minutes": 0,
        }
        arguments = [argument for name, value in settings.items() for argument in (f"--{name}", str(value))]
        run(*parse(arguments + sys.argv[2:]))
    assert threading.active_count() < 20  # no sink may start threads without end
    first = min(5, steps // 4)  # the first steps are slower
    measured = per_step[first + 1 :]
    total, reporting = step_ends[-1] - step_ends[first], sum(measured)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"\n{steps} steps, {total / (len(step_ends) - first - 1):.4f} s each")
    print(
        f"reporting, all sinks and measurements: {reporting / total:.3%} of the time, "
        f"median {np.median(measured) * 1e3:.2f} ms per step"
    )
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {seconds / (step_ends[-1] - step_ends[0]):8.3%}  {name}")
    print(f"CPU time of child processes (wandb, git): {children.ru_utime + children.ru_stime:.1f} s")


if __name__ == "__main__":
    main()

"""Plays a long run through with failures of machines: how many tokens are lost, and the best --save_minutes.

    python -m src.training.simulate [--size 70b] [--days 30] [--runs 100] [--plan_mtbf 6000 ...]

--size is a row of src/training/preflight/model_sizes.txt, on the GPUs that stand there. Saving and restarting are those
of the trainer: a state is due --save_minutes after the last one was begun, and is begun a step later, when all ranks
have agreed on it and the one before is written; it counts when it is whole. A failure takes back to the newest whole
one. After --max_restarts the job ends, and is started again --resubmit_minutes later. Prints a line for each of some
values of --save_minutes: means over --runs runs, with the same failures for each.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import sys
from dataclasses import dataclass
from itertools import accumulate

from src.config import RunConfig, number_pair
from src.errors import UserError
from src.model.cost import training_flops_per_token
from src.training.preflight import goodput, traffic
from src.training.preflight.cluster_plan import GB, compute_seconds, sent_bytes, trained_count
from src.training.preflight.model_sizes import settings_of_size

# of train.py, which determine the course of a run besides the model
FLAGS = (
    *("plan_bandwidth", "plan_gpu", "plan_disks", "plan_mtbf", "save_minutes", "max_restarts"),
    *("devices", "num_nodes", "strategy", "micro_bsz", "accumulate_grad_batches"),
)
SAVE_MINUTES = (1, 2, 5, 10, 15, 30, 60, 120)


@dataclass(frozen=True)
class Policy:
    """What determines a run's course besides the failures, in seconds. `interval` 0: no states but the first."""

    step: float
    interval: float
    saved: goodput.Saving
    max_restarts: int
    resubmit: float


@dataclass
class Course:
    """What became of a run."""

    kept: int = 0  # steps
    lost: int = 0
    failures: int = 0
    saves: int = 0


def play(policy: Policy, failures: list[float], end: float) -> Course:
    """A run from 0 to `end`, with failures at these times."""
    course, now, restarts = Course(), 0.0, 0
    for failure in [*(time for time in failures if time < end), end]:
        if failure < now:  # while it restarts
            if failure == end:
                break
            course.failures += 1
            now, restarts = _restart(policy, failure, restarts)
            continue
        whole, begun = _run_until(policy, now, failure, course)
        if failure == end:
            course.kept += begun
            break
        course.failures += 1
        course.kept, course.lost = course.kept + whole, course.lost + begun - whole
        now, restarts = _restart(policy, failure, restarts)
    return course


def _restart(policy: Policy, failure: float, restarts: int) -> tuple[float, int]:
    """When the run continues, and how often the job has started again by then."""
    if restarts == policy.max_restarts:
        return failure + policy.resubmit + policy.saved.restart, 0
    return failure + policy.saved.restart, restarts + 1


def _run_until(policy: Policy, start: float, end: float, course: Course) -> tuple[int, int]:
    """(steps in the newest whole state, steps taken) of an uninterrupted stretch of time."""
    now, steps, whole, writing, written_at = start, 0, 0, 0, start
    # a state is due at the end of the first step after the interval, and the ranks agree on it during the next one
    between = math.ceil(policy.interval / policy.step) + 1
    while policy.interval and now + between * policy.step <= end:
        steps += between
        now = max(now + between * policy.step, written_at)  # the state before this one is written first
        if now + policy.saved.stop > end:  # while it waits or copies
            break
        whole, writing, now = writing, steps, now + policy.saved.stop
        written_at = now + policy.saved.write
        course.saves += 1
    else:
        steps += max(0, math.floor((end - now) / policy.step))
    return (writing if end >= written_at else whole), steps


def draw_failures(rate: float, end: float, seed: int) -> list[float]:
    """Times of a Poisson process with so many failures per second."""
    draw = random.Random(seed)
    gaps = (draw.expovariate(rate) for _ in range(int(10 + 3 * rate * end))) if rate else iter(())
    return [time for time in accumulate(gaps) if time < end]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=float, default=30.0)
    parser.add_argument("--runs", type=int, default=100, help="with failures drawn anew [%(default)s]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", default="70b", help="which model [%(default)s]")
    parser.add_argument("--resubmit_minutes", type=float, default=30.0, help="after --max_restarts [%(default)s]")
    for field in dataclasses.fields(RunConfig):
        if field.name in FLAGS:
            parser.add_argument(f"--{field.name}", type=type(field.default), help=f"as of train.py [{field.default}]")
    options = parser.parse_args(argv)
    given = {name: value for name in FLAGS if (value := getattr(options, name)) is not None}
    try:
        config = RunConfig(plan=0, my_exit_tokens=1, **{**settings_of_size(options.size), **given})
        if faults := config.faults():
            raise faults[0]
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    for line in report(config, options.days, options.runs, options.seed, options.resubmit_minutes):
        print(line)
    return 0


def report(config: RunConfig, days: float, runs: int, seed: int, resubmit_minutes: float) -> list[str]:
    """The lines that the program prints."""
    model = config.model_config(config.vocab_size)
    devices, num_nodes = int(config.devices), config.most_nodes
    processes, end = devices * num_nodes, days * 86400
    within, between = (GB * value for value in number_pair(config.plan_bandwidth))
    moved = sent_bytes(config, model, config.strategy, processes, 2)
    step = compute_seconds(config, model) + traffic.seconds(moved, devices, num_nodes, within, between)
    disks, rate = number_pair(config.plan_disks)
    saved = goodput.saving(trained_count(config, model), processes, disks, rate * GB)
    rate_of_failures = goodput.failures_per_second(num_nodes, config.plan_mtbf)
    drawn = [draw_failures(rate_of_failures, end, seed + i) for i in range(runs)]
    tokens = config.micro_bsz * config.ctx_len * config.accumulate_grad_batches * processes
    lines = [
        f"{model.title} on {processes} GPUs, {config.strategy}: {step:.2f} s and {tokens:,} tokens a step, "
        f"{training_flops_per_token(model) * tokens / step / 1e15:.1f} PFLOP/s",
        f"{runs} runs of {days:g} days, {sum(map(len, drawn)) / runs:.1f} failures in each on average",
        f"a save stops training for {saved.stop:.2g} s and is whole after {saved.write:.3g} s, a restart takes "
        f"{saved.restart:.0f} s",
        "",
        "--save_minutes  saves  tokens kept  tokens lost  most lost  goodput",
    ]
    kept_by_minutes = {}
    for minutes in sorted({*SAVE_MINUTES, config.save_minutes}):
        policy = Policy(step, minutes * 60, saved, config.max_restarts, resubmit_minutes * 60)
        courses = [play(policy, failures, end) for failures in drawn]
        kept, lost, saves = (sum(getattr(c, name) for c in courses) / runs for name in ("kept", "lost", "saves"))
        kept_by_minutes[minutes] = kept
        lines.append(
            f"{minutes:>14g}  {saves:5.0f}  {kept * tokens:11.5g}  {lost * tokens:11.3g}  "
            f"{max(course.lost for course in courses) * tokens:9.3g}  {kept * step / end:7.2%}"
        )
    best = max(kept_by_minutes, key=lambda minutes: kept_by_minutes[minutes])
    expected = goodput.best_interval(saved, rate_of_failures) / 60
    return [*lines, "", f"best of these: --save_minutes {best:g}; by the formula of --plan: {expected:.1f}"]


if __name__ == "__main__":
    sys.exit(main())

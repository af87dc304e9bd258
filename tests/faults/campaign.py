"""Many numbered cases: a tally on disk that adds up over several starts, a text file of what broke beside it, and a
command that repeats it."""

import argparse
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from src.files import atomic_write


@dataclass
class Outcome:
    """How a case ended: `kind` is counted; with `reasons`, it broke. `detail` is printed when the case is repeated."""

    kind: str
    reasons: tuple[str, ...] = ()
    detail: str = ""
    tried: int = 1


@dataclass
class Tally:
    seed: int
    cases: int = 0
    tried: int = 0
    seconds: float = 0.0
    kinds: Counter = field(default_factory=Counter)
    broken: dict[str, list[int]] = field(default_factory=dict)  # numbers of cases by reason

    def add(self, case: int, outcome: Outcome) -> None:
        self.cases, self.tried = self.cases + 1, self.tried + outcome.tried
        self.kinds[outcome.kind] += 1
        for reason in outcome.reasons:
            self.broken.setdefault(reason, []).append(case)

    def save(self, path: Path) -> None:
        with atomic_write(path, "w") as file:
            json.dump(vars(self), file, indent=1)

    @classmethod
    def load(cls, path: Path, seed: int | None) -> "Tally":
        if not path.exists():
            return cls(seed or 0)
        content = json.loads(path.read_text())
        if seed not in (None, content["seed"]):
            sys.exit(f"{path} was begun with --seed {content['seed']}")
        return cls(**{**content, "kinds": Counter(content["kinds"])})


def run_cases(
    name: str, case: Callable[[int, random.Random], Outcome], argv: list[str] | None = None, unit: int = 1
) -> Tally:
    """Runs `case(number, chance)` as often as the command line says; `chance` depends on the seed and the number alone.

    `unit`: how many of what --count counts are tried by a case. As a program (`argv` is None) it exits with code 1 if
    a case broke.
    """
    parser = argparse.ArgumentParser(prog=f"python -m tests.faults.{name}")
    parser.add_argument("--count", type=int, default=20, help="how many to try now")
    parser.add_argument("--seed", type=int, help="of all cases [0]")
    parser.add_argument("--continue", dest="file", type=Path, help="tally that this start goes on with")
    parser.add_argument("--case", type=int, help="repeat one case, and print what it prints")
    options = parser.parse_args(argv)
    if options.case is not None:
        outcome = case(options.case, random.Random(f"{options.seed or 0} {options.case}"))
        print(outcome.detail, f"case {options.case}: {outcome.kind}", *(outcome.reasons or ["nothing broke"]), sep="\n")
        sys.exit(int(bool(outcome.reasons)))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped by it, too, the tally is printed
    tally = Tally.load(options.file, options.seed) if options.file else Tally(options.seed or 0)
    try:
        for _ in range(-(-options.count // unit)):
            begin, number = time.monotonic(), tally.cases
            outcome = case(number, random.Random(f"{tally.seed} {number}"))
            tally.add(number, outcome)
            tally.seconds += time.monotonic() - begin
            if options.file:
                tally.save(options.file)
                if outcome.reasons:  # what a case depends on beside its number may not repeat
                    with options.file.with_suffix(".broken.txt").open("a") as file:
                        file.write(f"case {number}: {outcome.kind}\n{outcome.detail}\n")
    except KeyboardInterrupt:
        print("stopped; the same command goes on" if options.file else "stopped")
    print(f"{name}: {tally.cases} cases, {tally.tried} tried, {tally.seconds:.0f} s, seed {tally.seed}")
    for kind, number in sorted(tally.kinds.items()):
        print(f"  {number:6} {kind}")
    for reason, numbers in sorted(tally.broken.items()):
        print(f"BROKEN in {len(numbers)}: {reason}")
        print(f"  python -m tests.faults.{name} --seed {tally.seed} --case {numbers[0]}")
    if argv is None:
        sys.exit(int(bool(tally.broken)))
    return tally

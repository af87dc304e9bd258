"""Faults that a run must survive: failing system calls, power cuts, hostile files, processes that die or freeze.

    python -m tests.faults.syscalls --count 500        kills, errors and short writes in single system calls
    python -m tests.faults.power --count 300           the disk as a power cut leaves it, under four models of a disk
    python -m tests.faults.fuzz --count 1000000        mutated files for every reader
    python -m tests.faults.ranks --count 60            a rank of three that is killed, paused or frozen in any phase

Each prints what broke with the command that repeats it. With `--continue FILE` it goes on where it was stopped, and
its tally adds up. tests/test_faults.py runs a few cases of each.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]  # training_runs, warm_process: as in the tests

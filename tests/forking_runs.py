"""Runs of train.py without its start-up time: imports once, then forks a process per line of standard input (a JSON
list of flags).

Prints a line when it is ready; then a process's number when it starts, and its exit status (negative: the signal) when
it has ended.
"""

import json
import os
import sys

from src.cli import parse
from src.training.run import run

print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os._exit(run(*parse(json.loads(line))))
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)

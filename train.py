"""Train an RWKV-7 model: flags -> settings -> fit. `python train.py --help` explains the flags."""

import os
import signal
import sys


def stop_at_once(number: int, frame: object) -> None:
    """Ctrl-C while modules load: as an exception it would end in the middle of one, in words of that module's."""
    os.write(2, b"stopped before the run began; the same command begins it\n")
    os._exit(130)


def main() -> int:
    from src.cli import parse

    config, notes = parse(sys.argv[1:])
    from src.training.console import ignore_broken_pipe
    from src.training.run import run  # torch and Lightning load here, so that --help answers at once

    if signal.getsignal(signal.SIGINT) is stop_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    ignore_broken_pipe()
    return run(config, notes)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, stop_at_once)
    sys.exit(main())

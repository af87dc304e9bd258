"""Train an RWKV-7 model: flags -> settings -> fit. `python train.py --help` explains the flags."""

import os
import signal
import sys


def exit_on_interrupt(number: int, frame: object) -> None:
    """Ends the process on Ctrl-C while modules load."""
    # Not by KeyboardInterrupt: raised in the middle of an import, it would be shown with a traceback of that module.
    os.write(2, b"stopped before the run began; the same command starts it\n")
    os._exit(130)  # 128 + SIGINT, what a shell reports for Ctrl-C


def main() -> int:
    from src.cli import parse
    from src.terminal import prepare_output

    prepare_output()
    config, notes = parse(sys.argv[1:])
    from src.training.console import ignore_broken_pipe
    from src.training.run import run  # torch and Lightning load here, so that --help answers at once

    if signal.getsignal(signal.SIGINT) is exit_on_interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    ignore_broken_pipe()
    return run(config, notes)


if __name__ == "__main__":
    # nohup and background jobs of a shell ignore Ctrl-C; that stays so
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, exit_on_interrupt)
    sys.exit(main())

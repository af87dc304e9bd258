"""Train an RWKV-7 model: flags -> settings -> fit. `python train.py --help` explains the flags."""

import sys

from src.cli import parse


def main() -> int:
    config, notes = parse(sys.argv[1:])
    from src.training.run import run  # torch and Lightning load here, so that --help answers at once

    return run(config, notes)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped before the run began; the same command begins it", file=sys.stderr)
        sys.exit(130)

"""Does a run follow the published one? Its train_log.txt beside the published losses (within 0.01) and learning rates (every digit).

    python tests/verify_minipile.py RUN      the folder of a run of `demo-training-run.sh minipile`, or a log file

Exit code 0: it follows, as far as it has come; 1: it has left; 2: nothing to compare.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.run_log import MiniEpoch, read_curves
from src.training.figures.published import LOSS_TOLERANCE, MINI_EPOCHS, differences


def faults(mini_epochs: list[MiniEpoch]) -> list[str]:
    """Where the lines leave the published run, a sentence each."""
    found = []
    expected = 0
    for line in mini_epochs:
        if line.number >= len(MINI_EPOCHS):
            break
        if line.number != expected:
            found.append(f"mini-epoch {expected} is missing")
            expected = line.number
        loss, lr = MINI_EPOCHS[line.number]
        if not abs(line.loss - loss) <= LOSS_TOLERANCE:
            found.append(
                f"mini-epoch {line.number}: loss {line.loss:.6f}, published {loss:.6f}: off by {line.loss - loss:+.6f}, "
                f"allowed {LOSS_TOLERANCE}"
            )
        if line.lr != lr:
            found.append(f"mini-epoch {line.number}: learning rate {line.lr}, published {lr}")
        expected += 1
    return found


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        print((__doc__ or "").strip())
        return 0 if argv in (["-h"], ["--help"]) else 2
    try:
        curves = read_curves(argv[0])
    except (OSError, ValueError) as error:
        print(f"verify_minipile.py: {error}", file=sys.stderr)
        return 2
    lines = curves.mini_epochs
    if not lines:
        print(f"verify_minipile.py: {argv[0]} has no finished mini-epoch yet", file=sys.stderr)
        return 2
    for name, (theirs, ours) in differences(curves.settings).items():
        if ours is not None:
            print(f"note: another setting than the published run's: {name} {ours} instead of {theirs}")
    print("mini-epoch      loss  published  difference          lr   published")
    for line in lines[: len(MINI_EPOCHS)]:
        if line.number < len(MINI_EPOCHS):
            loss, lr = MINI_EPOCHS[line.number]
            print(f"{line.number:10}  {line.loss:8.6f}   {loss:8.6f}   {line.loss - loss:+9.6f}  {line.lr}  {lr}")
    if left := faults(lines):
        print(f"LEFT the published run at {left[0]}")
        for fault in left[1:]:
            print(f"     {fault}")
        return 1
    compared = min(len(lines), len(MINI_EPOCHS))
    print(
        f"PASS: {compared} of {len(MINI_EPOCHS)} published mini-epochs, losses within {LOSS_TOLERANCE}, learning rates to the last digit"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Compares a run with the published one: losses within 0.01, learning rates to the last digit.

    python tools/verify_minipile.py RUN

RUN is the folder of a run of `demo-training-run.sh minipile`, or its train_log.txt.
Exit code 0: the run agrees, as far as it has come; 1: it differs; 2: there is nothing to compare.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The project is not installed as a package: a script outside its root has to add it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.errors import UserError
from src.run_log import MiniEpoch, read_curves
from src.training.figures.published import LOSS_TOLERANCE, MINI_EPOCHS, differences


def deviations(mini_epochs: list[MiniEpoch]) -> list[str]:
    """Where the mini-epochs of a run deviate from the published ones, a sentence for each."""
    sentences = []
    expected_number = 0
    for line in mini_epochs:
        if line.number >= len(MINI_EPOCHS):
            break
        if line.number != expected_number:
            sentences.append(f"mini-epoch {expected_number} is missing")
            expected_number = line.number  # one sentence for a gap, not one for every line after it
        loss, lr = MINI_EPOCHS[line.number]
        if not abs(line.loss - loss) <= LOSS_TOLERANCE:  # not `>`, which is false for NaN
            sentences.append(
                f"mini-epoch {line.number}: loss {line.loss:.6f}, published {loss:.6f}: "
                f"off by {line.loss - loss:+.6f}, allowed {LOSS_TOLERANCE}"
            )
        # As text: the schedule is computed and not measured, so it must agree to the last printed digit.
        if line.lr != lr:
            sentences.append(f"mini-epoch {line.number}: learning rate {line.lr}, published {lr}")
        expected_number += 1
    return sentences


def print_comparison(mini_epochs: list[MiniEpoch]) -> None:
    """Print each published mini-epoch that the run has, with both losses and learning rates."""
    print("mini-epoch      loss  published  difference          lr   published")
    for line in mini_epochs[: len(MINI_EPOCHS)]:
        if line.number < len(MINI_EPOCHS):  # numbers can be higher than their place in a log with a gap
            loss, lr = MINI_EPOCHS[line.number]
            print(f"{line.number:10}  {line.loss:8.6f}   {loss:8.6f}   {line.loss - loss:+9.6f}  {line.lr}  {lr}")


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        print((__doc__ or "").strip())
        return 0 if argv in (["-h"], ["--help"]) else 2
    try:
        curves = read_curves(argv[0])
    except (OSError, UserError) as error:
        print(f"verify_minipile.py: {error}", file=sys.stderr)
        return 2
    mini_epochs = curves.mini_epochs
    if not mini_epochs:
        print(f"verify_minipile.py: {argv[0]} has no finished mini-epoch yet", file=sys.stderr)
        return 2
    # A note and not a failure: logs of other programs lack some settings, and the losses decide.
    for name, (published_value, value) in differences(curves.settings).items():
        if value is not None:
            print(f"note: {name} is {value}, {published_value} in the published run")
    print_comparison(mini_epochs)
    if sentences := deviations(mini_epochs):
        print(f"FAIL: differs from the published run at {sentences[0]}")
        for sentence in sentences[1:]:
            print(f"      {sentence}")
        return 1
    compared = min(len(mini_epochs), len(MINI_EPOCHS))
    print(
        f"PASS: {compared} of {len(MINI_EPOCHS)} published mini-epochs, losses within {LOSS_TOLERANCE}, "
        "learning rates to the last digit"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

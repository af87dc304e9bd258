"""What train.py says: once, whatever the number of processes; mistakes on stderr."""

from __future__ import annotations

import sys

from pytorch_lightning.utilities import rank_zero_only
from tqdm import tqdm


def is_first() -> bool:
    """Whether this is the process that speaks and writes the files (global rank 0)."""
    return getattr(rank_zero_only, "rank", 0) == 0


@rank_zero_only
def say(text: str) -> None:
    tqdm.write(text)  # above the live line, where there is one
    sys.stdout.flush()


def say_error(text: str) -> None:
    print(f"train.py: {text}", file=sys.stderr, flush=True)

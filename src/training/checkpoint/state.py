"""The part of a full state that is no tensor: where the run is, its settings, its counters, its newest log lines."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from src.training.checkpoint.manifest import DamagedStateError

# names of fields in states of format version 1
OLD_POSITION_NAMES = {"unit": "mini_epoch_samples", "holes": "skipped_samples"}
# Settings of a state that a start computes with.
INTEGER_SETTINGS = ("vocab_size", "n_layer", "n_embd", "head_size", "ctx_len", "global_batch", "my_exit_tokens")
REQUIRED_COUNTERS = {"adam_steps", "skipped_steps"}
LATEST_TIME = 2.5e11  # of time.time(): year 9892


@dataclass
class Position:
    """Where a run is between two steps: all numbers, since the order of the data is a pure function of the sample
    number."""

    step: int  # steps taken
    samples: int  # samples read
    mini_epoch_samples: int  # samples of a mini-epoch
    restarted_at_sample: int = 0  # where a fresh optimizer began on trained weights, for the warm-up; 0: never
    mini_epoch_losses: list[float] = field(default_factory=list)  # of the steps since the last mini-epoch's end
    skipped_samples: list[tuple[int, int]] = field(default_factory=list)  # left out for good: (first, count)
    weights_written: bool = False  # whether there was a rwkv-N.pth already


@dataclass(frozen=True)
class SavedState:
    """The part of a full state that is no tensor."""

    position: Position
    settings: dict[str, Any]
    counters: dict[str, float]  # of the optimizer
    saved_at: float  # time.time()
    logs: dict[str, list[str]] = field(default_factory=dict)  # the newest lines of small logs by file name, see Sink

    def payload(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> SavedState:
        """What `payload` gave, of this or an earlier format version. Raises DamagedStateError when it is malformed."""
        try:
            counters = {str(name): float(value) for name, value in payload["counters"].items()}
            state = cls(
                _position(payload["position"]),
                dict(payload["settings"]),
                counters,
                float(payload["saved_at"]),
                {str(name): [str(line) for line in lines] for name, lines in payload.get("logs", {}).items()},
            )
            sizes = [state.settings.get(name, 0) for name in INTEGER_SETTINGS]
            # of a time that a calendar has: the start prints it
            if not all(map(_is_count, sizes)) or not all(map(math.isfinite, counters.values())):
                raise ValueError("a size or a counter is no number")
            if missing := REQUIRED_COUNTERS - counters.keys():
                raise KeyError(min(missing))
            if ("loss_scale" in counters) != ("good_steps" in counters):
                raise KeyError("loss_scale or good_steps")
            if not 0 <= state.saved_at < LATEST_TIME:
                raise ValueError(f"saved_at {state.saved_at}")
            return state
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DamagedStateError(f"state.json is malformed ({type(error).__name__}: {error})") from error


def _position(values: dict[str, Any]) -> Position:
    """The position in a payload of this or an earlier format version. Raises ValueError and others where it is
    malformed."""
    values = {OLD_POSITION_NAMES.get(name, name): value for name, value in values.items()}
    known = {column.name for column in fields(Position)}  # a later version may have added some
    position = Position(**{name: value for name, value in values.items() if name in known})
    if "weights_written" not in values:  # the first versions did not record it
        position.weights_written = position.samples >= position.mini_epoch_samples
    position.skipped_samples = [(first, count) for first, count in position.skipped_samples]
    position.mini_epoch_losses = [float(loss) for loss in position.mini_epoch_losses]
    counts = [position.step, position.samples, position.mini_epoch_samples, position.restarted_at_sample]
    counts += [number for run in position.skipped_samples for number in run]
    if not all(map(_is_count, counts)) or position.mini_epoch_samples == 0:
        raise ValueError(f"position {values}")
    if not all(map(math.isfinite, position.mini_epoch_losses)) or not isinstance(position.weights_written, bool):
        raise ValueError(f"position {values}")
    return position


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63  # not bool, which is an int to Python

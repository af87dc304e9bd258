"""What a run reports, and `Sink`, the interface of everything that receives reports."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

UPDATE_GROUPS = ("w0", "matrices", "others")  # of the optimizer, in the order of `optim.GROUPS`


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: mean loss over its samples, learning rate before group scales, gradient norm before clipping.

    NaN stands for an unknown value: `mfu` where the device's peak is unknown, the last two at steps where they are not
    measured.
    """

    # The names are the columns of metrics.csv (log_files.py), in this order; update_ratios, which must be last, has
    # several.

    step: int
    tokens: int  # trained on since the run began, this step included
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float  # of all processes, over the last steps
    seconds: float = math.nan  # of training since this start, without validation
    memory_gib: float = math.nan  # peak of this process: reserved on the GPU, or resident
    mfu: float = math.nan  # model FLOPs utilisation: the share of the devices' bf16 peak
    largest_logit: float = math.nan  # in the first rows of the last micro batch, over all ranks
    update_ratios: dict[str, float] = field(default_factory=dict)  # |update| / |weights| by optimizer group


@dataclass(frozen=True)
class MiniEpochReport:
    """The mean loss over the steps of a mini-epoch, and its last step."""

    mini_epoch: int
    loss: float  # NaN where every step of it was skipped
    last: StepReport


@dataclass(frozen=True)
class ValidationReport:
    """The loss on held-out data after `steps` steps; `is_best` when no earlier one of this run was lower."""

    steps: int  # names of the first four: columns of val.csv
    tokens: int  # trained on so far
    loss: float
    counted: int  # tokens of the held-out data that count towards the loss
    seconds: float  # duration of the validation
    is_best: bool


@dataclass(frozen=True)
class GeneratedSample:
    """What the model generates after `prompt`, and how the data continues it. The fields are those of samples.json."""

    prompt: str
    answer: str
    in_data: str
    media: tuple[str, ...] = ()  # pictures in the prompt, as data URLs of PNG files; names of sounds


class Sink:
    """Base class of everything that receives reports; subclasses override the methods they need."""

    # Called on the training thread between two steps: slow work here delays the next step.

    def step(self, report: StepReport) -> None: ...
    def mini_epoch(self, report: MiniEpochReport) -> None: ...
    def validation(self, report: ValidationReport) -> None: ...
    def samples(self, samples: list[GeneratedSample]) -> None: ...
    def sync(self) -> None:
        """Bring what was reported to the disk: called before a state that is past it is saved."""

    def lines_for_state(self) -> dict[str, list[str]]:
        """By file name the newest lines of a small log, which a state keeps to restore them."""
        return {}

    def close(self) -> None: ...

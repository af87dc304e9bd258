"""What a run reports, and the places that reports go to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

UPDATE_GROUPS = ("w0", "matrices", "others")  # of the optimizer, in its order


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: mean loss over its samples, learning rate before group scales, gradient norm before clipping.

    What is not known is NaN: `mfu` where the device's peak isn't, the last two at steps where they are not measured.
    """

    step: int
    tokens: int  # trained on in the whole run, this step included
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float  # of all processes, over the last steps
    seconds: float = math.nan  # of training since this start, without validation
    memory_gib: float = math.nan  # the most that this process has taken: of the GPU, or of the machine
    mfu: float = math.nan  # the share of the devices' bf16 peak that the model's own operations make up
    largest_logit: float = math.nan  # in the last micro batch's first rows, over all processes
    update_ratios: dict[str, float] = field(default_factory=dict)  # |update| / |weights| by optimizer group


@dataclass(frozen=True)
class MiniEpochReport:
    mini_epoch: int
    loss: float  # mean over its steps
    last: StepReport


@dataclass(frozen=True)
class ValidationReport:
    """The loss on held-out data after `steps` steps; `is_best` when no earlier one of this run was lower."""

    steps: int
    tokens: int  # trained on
    loss: float
    counted: int  # tokens of the held-out data that count
    seconds: float  # that it took
    is_best: bool


@dataclass(frozen=True)
class Sample:
    """What the model writes after `prompt`, and what stands there in the data."""

    prompt: str
    answer: str
    in_data: str


class Sink:
    """Somewhere that reports go; each kind of it takes what it wants."""

    def step(self, report: StepReport) -> None: ...
    def mini_epoch(self, report: MiniEpochReport) -> None: ...
    def validation(self, report: ValidationReport) -> None: ...
    def samples(self, samples: list[Sample]) -> None: ...
    def close(self) -> None: ...

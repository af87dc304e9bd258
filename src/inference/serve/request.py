"""What the engine is asked for, and what it reports while it works."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from src.errors import UserError
from src.inference.sampling import Sampling
from src.model import State

# Why a generation ended.
STOP = "stop"  # at a token of `stop_ids`, or where the consumer said so
LENGTH = "length"  # after `max_new_tokens`
CANCELLED = "cancelled"
FAILED = "failed"


class Constraint(Protocol):
    """Restricts the tokens of one answer, for example to those of a JSON schema."""

    def restrict(self, logits: Tensor) -> Tensor:
        """`logits` [V] with those of tokens that may not come next lowered out of reach; finite."""

    def accept(self, token: int) -> bool:
        """Take note of a drawn token; True where the answer is complete with it."""


class Consumer(Protocol):
    """Receives what the engine does for one request. Called in the engine's thread: it must not block."""

    def started(self, cached_tokens: int) -> None:
        """The prompt is processed, except its first `cached_tokens` tokens, which were known."""

    def token(self, token: int, logprobs: TokenLogprobs | None) -> bool:
        """A new token of the answer; True ends it (at a stop string)."""

    def ended(self, reason: str, error: Exception | None = None) -> None:
        """Nothing follows. `error` where the reason is FAILED."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the model's probabilities (temperature 1, nothing penalised): the drawn token's, and the
    most likely tokens' with theirs, in descending order."""

    chosen: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Start:
    """Where texts begin instead of at the zero state: a tuned state, or a saved conversation. `name` is unique."""

    name: str
    state: State


@dataclass(frozen=True)
class Processed:
    """What a prompt leaves: its final hidden vectors' mean and the last one, fp32 [C], and the state."""

    mean: Tensor
    last: Tensor
    state: State


@dataclass(frozen=True)
class Request:
    """One answer to generate, or a prompt to process.

    prompt          at least one token
    boundaries      numbers of the prompt's first tokens after which others may go on differently: the ends of turns
    start           None: the zero state
    logit_bias      added to the logits of these tokens
    top_logprobs    number of most likely tokens to report with each token; None: report no probabilities
    on_processed    called instead of generating; the mean is of the tokens that were not known
    embeds, media   of pictures and sounds: the rows of the prompt's tokens PLACEHOLDER, and (digest, tokens) of each
    use_cache       whether it begins at a known prefix, and its own states are kept
    """

    prompt: list[int]
    sampling: Sampling
    max_new_tokens: int
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    uncounted_ids: Collection[int] = ()
    boundaries: tuple[int, ...] = ()
    start: Start | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    constraint: Constraint | None = None
    on_processed: Callable[[Processed], None] | None = None
    use_cache: bool = True
    embeds: Tensor | None = None
    media: tuple[tuple[bytes, int], ...] = ()


@dataclass
class Statistics:
    """What an engine has done since it began, and what it holds now."""

    requests: int = 0
    failures: int = 0
    cancellations: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    decode_steps: int = 0
    waiting: int = 0
    running: int = 0
    cached_states: int = 0
    cache_bytes: int = 0


class QueueFullError(UserError):
    """More requests wait than the server allows."""


class ShuttingDownError(QueueFullError):
    """The engine accepts nothing more."""

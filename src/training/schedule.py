"""The learning rate schedule, the length of a run in steps, and the bounds of its mini-epochs, as pure functions.

Steps are counted from 0 at the first step of the whole run, however often it was stopped and resumed. `step` is the
index of a step; as a number of steps taken (a position, a folder's name) it is the index of the next one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from src.config import MINI_EPOCH_SAMPLES

# Least warm-up of a fresh optimizer on trained weights: Adam's first updates have the size of the learning rate in
# every element, however small its gradient.
MIN_RESTART_WARMUP_STEPS = 10


def learning_rate(
    step: float,
    *,
    lr_init: float,
    lr_final: float,
    warmup_steps: int,
    exit_tokens: int,
    tokens_per_step: int,
    restarted_at: float = 0,
) -> float:
    """The learning rate of step `step`, before a parameter group's own scale.

    `step` is the tokens trained on before it, divided by `tokens_per_step`; it may be a fraction where a run's batch
    changed.

    1. progress = (tokens(step) - tokens(warmup)) / (exit_tokens - tokens(warmup)), within 0 and 1
    2. lr = lr_init * ((0.5 + f/2) + (0.5 - f/2) cos(pi * progress)), f = lr_final / lr_init
    3. times 0.01 + 0.99 s / warmup_steps during the first `warmup_steps` steps s since `restarted_at`, the step at
       which a fresh optimizer began (0 in a run that was never resumed from weights alone).

    `warmup_steps` -1 means no warm-up. As in the official trainer, -1 then stands in the formula of the progress, where
    tokens(warmup) is -tokens_per_step: the cosine is one step ahead of that of `warmup_steps` 0.
    """
    # not clipped at 0: learning rates agree with the official trainer's to the last digit only with -1 in the formula
    warmup_tokens = warmup_steps * tokens_per_step
    progress = (step * tokens_per_step - warmup_tokens) / max(1, exit_tokens - warmup_tokens)
    progress = min(1.0, max(0.0, progress))  # lr_init during the warm-up, lr_final beyond the end
    f = lr_final / lr_init
    # tests/test_schedule.py compares this with the learning rates of the published run, to the last printed digit
    lr = lr_init * ((0.5 + f / 2) + (0.5 - f / 2) * math.cos(math.pi * progress))
    warming = warmup_steps if restarted_at == 0 else max(MIN_RESTART_WARMUP_STEPS, warmup_steps)
    since = step - restarted_at
    return lr * (0.01 + 0.99 * since / warming) if 0 <= since < warming else lr


@dataclass(frozen=True)
class RunLength:
    """How long a run is and where its mini-epochs end.

    A mini-epoch has `mini_epoch_samples` samples: 40320, or `epoch_steps` global batches. Mini-epoch N ends with the
    first step after which (N + 1) times as many samples have been read, so any batch size works; the last one may be
    partial.

    A run that is resumed with another global batch (on more processes, say) keeps its samples, tokens and mini-epochs:
    it has taken `steps_before` steps and read `samples_before` samples, and `mini_epoch_samples` stays what it was.
    """

    exit_tokens: int
    ctx_len: int
    global_batch: int  # samples of one optimizer step, over all processes
    mini_epoch_samples: int  # in samples, not steps: stays the same when the batch changes
    steps_before: int = 0
    samples_before: int = 0

    @classmethod
    def of(cls, exit_tokens: int, ctx_len: int, global_batch: int, epoch_steps: int = 0) -> RunLength:
        """The length of a run that starts at step 0."""
        return cls(exit_tokens, ctx_len, global_batch, epoch_steps * global_batch or MINI_EPOCH_SAMPLES)

    @property
    def tokens_per_step(self) -> int:
        return self.ctx_len * self.global_batch

    @property
    def steps(self) -> int:
        """The number of steps of the run, including those before."""
        # rounded up twice: the last sample and the last batch are read as a whole, and --my_exit_tokens is reached
        samples = -(-self.exit_tokens // self.ctx_len) - self.samples_before
        return self.steps_before + max(0, -(-samples // self.global_batch))

    def samples(self, step: int) -> int:
        """The samples read before `step`: the number of its first sample."""
        return self.samples_before + (step - self.steps_before) * self.global_batch

    def tokens(self, step: int) -> int:
        """The tokens trained on before `step`."""
        return self.samples(step) * self.ctx_len

    def mini_epoch(self, step: int) -> int:
        """The mini-epoch that `step` ends or lies in."""
        before, after = self._completed(step), self._completed(step + 1)
        # one step may complete several mini-epochs, where a batch is larger than one: the last of them counts
        return after - 1 if after > before else after

    def ends_mini_epoch(self, step: int) -> bool:
        """Whether `step` is the last of a mini-epoch; the run's last step always is."""
        return self._completed(step + 1) > self._completed(step) or step == self.steps - 1

    def _completed(self, steps: int) -> int:
        """The number of mini-epochs that are complete after `steps` steps."""
        return self.samples(steps) // self.mini_epoch_samples

    def step_after(self, mini_epoch: int) -> int:
        """The first step after mini-epoch N, where a run resumes from rwkv-N.pth. At most `steps`."""
        samples = (mini_epoch + 1) * self.mini_epoch_samples - self.samples_before
        return min(self.steps, self.steps_before + max(0, -(-samples // self.global_batch)))

"""Mean loss over windows of text that a model wasn't trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from src.dataset.binidx import MMapIndexedDataset
from src.inference.last_words import MAX_EXPONENT
from src.inference.scoring import LOGIT_ROWS
from src.inference.windows import Tokens, stack_windows, windows
from src.model import RWKV7


@dataclass(frozen=True)
class HeldOutLoss:
    """`loss`: mean cross entropy in nats over `tokens` predicted tokens."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < MAX_EXPONENT else math.inf

    def bits_per_byte(self, n_bytes: int) -> float:
        """loss * tokens / (ln 2 * n_bytes), where the predicted text has `n_bytes`: comparable between tokenizers."""
        return self.loss * self.tokens / (math.log(2) * n_bytes) if n_bytes else math.nan


def heldout_loss(
    model: RWKV7,
    data: MMapIndexedDataset | Tokens,
    ctx_len: int,
    max_windows: int | None = None,
    micro_bsz: int = 8,
) -> HeldOutLoss:
    """Mean cross entropy over independent windows of `data` (binidx, or a flat array of ids), without gradients.

    The windows depend on the length of `data` only, and each starts from the model's initial state, as in training.
    Raises UserError for ids outside the model's vocabulary.
    """
    tokens = data.tokens if isinstance(data, MMapIndexedDataset) else data
    selected = list(windows(len(tokens), ctx_len, max_windows))
    total, count = 0.0, 0
    for first in range(0, len(selected), micro_bsz):
        batch = stack_windows(tokens, selected[first : first + micro_bsz], model.config.vocab_size)
        total += _summed_loss(model, batch)
        count += batch.shape[0] * (batch.shape[1] - 1)
    return HeldOutLoss(total / count, count)


@torch.no_grad()
def _summed_loss(model: RWKV7, batch: Tensor) -> float:
    """Summed cross entropy of batch[:, 1:], each token given those before it in its row; batch int64 [B, T+1]."""
    batch = batch.to(model.emb.weight.device)
    hidden, _ = model.hidden(batch[:, :-1])
    # Chunks of rows bound the memory of the logits; the sum over them is taken in float64.
    rows, targets = hidden.flatten(0, 1).split(LOGIT_ROWS), batch[:, 1:].flatten().split(LOGIT_ROWS)
    parts = [F.cross_entropy(model.head(x).float(), y, reduction="sum") for x, y in zip(rows, targets, strict=True)]
    return float(torch.stack(parts).cpu().double().sum())  # mps has no float64

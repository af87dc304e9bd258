"""Compares a written model with its original: tensors, logits on text, and the loss on held-out data.

One block is in memory as fp32 at a time, so that models are compared whose fp32 copies wouldn't fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from src.config import ModelConfig
from src.dataset.tokenizer import Tokenizer
from src.inference.scoring import LOGIT_ROWS
from src.model.layers import LAYER_NORM_EPS, Block
from src.model.weights import IDLE_IN_LAYER_0

# Largest accepted difference between the fp32 logits of what was read back and of the weights that should have been
# written: sums may be computed in another order, and nothing else may differ.
TOLERANCE = 1e-5
VERIFIED_TOKENS = 64
# English, code, numbers, Chinese and an emoji: ids from all over a vocabulary.
SAMPLE = (
    "The history of the bridge, 1873: 他们说，今天天气很好。\ndef area(r):\n    return 3.14159 * r ** 2  # \U0001f642\n"
    'She said: "We\'ll meet at 7:30, if it doesn\'t rain." Der Fluß fließt nach Süden; {"id": [1, 2, 3]}\n'
)
ROWS = 8  # sequences that a block computes at once
HEAD_ROWS = 8192  # of the head that are in memory as fp32 at once


@dataclass(frozen=True)
class Parity:
    """The written model against the original, in fp32 over `positions` tokens.

    write_error     largest difference of a logit to the original rounded as the format does: not 0 if a writer or a
                    reader is at fault
    rounding_error  largest difference to the original itself: what the rounding loses
    agreement       share of positions with the same most likely token
    losses          held-out loss of the original and of the written model, where data was given
    different       the first tensor with other values than the rounded original, "" where there is none
    merge_error     largest difference of a logit between the base with an adapter beside it and the original, into
                    which it was merged, where there was an adapter
    """

    write_error: float
    rounding_error: float
    agreement: float
    positions: int = VERIFIED_TOKENS
    losses: tuple[float, float] | None = None
    different: str = ""
    merge_error: float | None = None

    def __str__(self) -> str:
        text = (
            f"read back: logits differ by {self.write_error:.1e} from the weights that were written, by "
            f"{self.rounding_error:.1e} from the original; the most likely token agrees at "
            f"{100 * self.agreement:.0f} % of {self.positions} positions"
        )
        if self.merge_error is not None:
            text = f"merged: logits differ by {self.merge_error:.1e} from those of the adapter beside its base\n{text}"
        if self.losses is None:
            return text
        before, after = self.losses
        return f"{text}\nheld-out loss: {before:.4f} original, {after:.4f} as written ({after / before - 1:+.3%})"


def sample_tokens(vocab_size: int, tokenizer: Tokenizer | None = None) -> Tensor:
    """int64 [1, VERIFIED_TOKENS]: the beginning of SAMPLE by `tokenizer`, without one ids from the whole vocabulary."""
    if tokenizer is None:
        # 7919 is a prime, so that the tokens are spread over the vocabulary.
        return torch.arange(VERIFIED_TOKENS).mul(7919).remainder(vocab_size).unsqueeze(0)
    ids = tokenizer.encode_as_text(SAMPLE)
    repeated = ids * -(-VERIFIED_TOKENS // len(ids))
    return torch.tensor([repeated[:VERIFIED_TOKENS]])


@torch.no_grad()
def hidden_by_block(weights: Mapping[str, Tensor], config: ModelConfig, tokens: Tensor) -> Tensor:
    """ln_out(x) of `tokens` int64 [B, T] in fp32 [B, T, C], each row from the initial state; asks for a tensor once."""
    rows = list(F.embedding(tokens, weights["emb.weight"]).float().split(ROWS))
    v_first: list[Tensor | None] = [None] * len(rows)
    for layer in range(config.n_layer):
        with torch.device("meta"):
            block = Block(config, layer)
        block.load_state_dict(_block_weights(weights, block, layer), assign=True)
        if (state := f"blocks.{layer}.att.time_state") in weights:  # tuned: where each row begins
            block.att.time_state = torch.nn.Parameter(weights[state].float(), requires_grad=False)
        for i, x in enumerate(rows):
            rows[i], v_first[i], _ = block(x, v_first[i], None, None)
    weight, bias = weights["ln_out.weight"].float(), weights["ln_out.bias"].float()
    return F.layer_norm(torch.cat(rows), (config.n_embd,), weight, bias, LAYER_NORM_EPS)


def _block_weights(weights: Mapping[str, Tensor], block: Block, layer: int) -> dict[str, Tensor]:
    """The parameters of `block` in fp32. Layer 0's unused ones, which some formats lack, are zeros."""
    found = {}
    for name, target in block.state_dict().items():
        full = f"blocks.{layer}.{name}"
        if full in IDLE_IN_LAYER_0:
            found[name] = torch.zeros(target.shape)
        else:
            found[name] = weights[full].float().reshape(target.shape)
    return found


def logits_by_block(weights: Mapping[str, Tensor], config: ModelConfig, tokens: Tensor) -> Tensor:
    """Logits fp32 [B * T, V] of `tokens` [B, T]."""
    hidden = hidden_by_block(weights, config, tokens).flatten(0, 1)
    return torch.cat([hidden @ rows.float().t() for rows in weights["head.weight"].split(HEAD_ROWS)], dim=1)


def loss_by_block(weights: Mapping[str, Tensor], config: ModelConfig, windows: Tensor) -> float:
    """Mean cross entropy of windows[:, 1:], each token given those before it; `windows` int64 [B, T + 1]."""
    hidden = hidden_by_block(weights, config, windows[:, :-1]).flatten(0, 1).split(LOGIT_ROWS)
    head, targets = weights["head.weight"].float(), windows[:, 1:].flatten().split(LOGIT_ROWS)
    total = sum(float(F.cross_entropy(x @ head.t(), y, reduction="sum")) for x, y in zip(hidden, targets, strict=True))
    return total / windows[:, 1:].numel()


def first_difference(expected: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> str:
    """The first parameter of `expected` with other values in `written`, or ""; layer 0's unused ones are exempt."""
    for name in expected:
        if name in IDLE_IN_LAYER_0:
            continue
        if name not in written:
            return name
        before, after = expected[name].flatten(), written[name].flatten()
        if before.dtype != after.dtype:
            before, after = before.float(), after.float()
        if not torch.equal(before, after):
            return name
    return ""


@torch.no_grad()
def compare(
    original: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    written: Mapping[str, Tensor],
    config: ModelConfig,
    tokens: Tensor,
    windows: Tensor | None = None,
) -> Parity:
    """The parity of `written` with `original`; `expected` is a copy of it rounded as the format does.

    tokens   int64 [1, T], whose logits are compared
    windows  int64 [B, T + 1], held-out data for the losses
    """
    exact, actual = (logits_by_block(weights, config, tokens) for weights in (original, written))
    # Equal tensors give equal logits: they needn't be computed, nor the expected ones rounded, a second time.
    different = first_difference(expected, written)
    rounded = logits_by_block(expected, config, tokens) if different else actual
    losses = None
    if windows is not None:
        losses = (loss_by_block(original, config, windows), loss_by_block(written, config, windows))
    return Parity(
        write_error=float((rounded - actual).abs().max()),
        rounding_error=float((exact - actual).abs().max()),
        agreement=float((exact.argmax(-1) == actual.argmax(-1)).float().mean()),
        positions=tokens.shape[1],
        losses=losses,
        different=different,
    )

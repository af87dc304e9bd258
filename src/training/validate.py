"""The loss on data that is held out: the same windows or rows each time, so that two numbers can be compared."""

from __future__ import annotations

from dataclasses import replace

import torch

from src.config import RunConfig
from src.dataset.binidx import MMapIndexedDataset
from src.dataset.sft import SftRows, collate
from src.inference.evaluate import HeldOutLoss, heldout_loss
from src.model import RWKV7
from src.ops.loss import cross_entropy_l2wrap
from src.training.data import SftSamples

MAX_SAMPLES = 512  # of the held-out data, evenly spaced: enough for the third digit of a loss


def check_held_out(config: RunConfig) -> None:
    """Raises ValueError, before any training time is spent, when --val_data_file can't be read."""
    if config.data_type == "binidx":
        MMapIndexedDataset(config.val_data_file)
    else:
        _rows(config)


def validation_loss(model: RWKV7, config: RunConfig) -> HeldOutLoss:
    """Mean loss in nats over the tokens that count in --val_data_file, and their number. Leaves the model as it was."""
    if config.data_type == "binidx":
        data = MMapIndexedDataset(config.val_data_file)
        return heldout_loss(model, data, config.ctx_len, max_windows=MAX_SAMPLES, micro_bsz=config.micro_bsz)
    return _sft_loss(model, config)


@torch.no_grad()
def _sft_loss(model: RWKV7, config: RunConfig) -> HeldOutLoss:
    rows = _rows(config)
    device = model.emb.weight.device
    total, tokens = 0.0, 0
    count = min(len(rows), MAX_SAMPLES)
    numbers = [i * len(rows) // count for i in range(count)]
    for first in range(0, len(numbers), config.micro_bsz):
        batch = collate([rows.row(number) for number in numbers[first : first + config.micro_bsz]])
        inputs, targets, cu_seqlens = (tensor.to(device) for tensor in batch)
        logits, _ = model(inputs, cu_seqlens=cu_seqlens)
        counted = int((targets >= 0).sum())
        total += cross_entropy_l2wrap(logits, targets).item() * counted
        tokens += counted
    return HeldOutLoss(total / max(1, tokens), tokens)


def _rows(config: RunConfig) -> SftRows:
    return SftSamples(replace(config, data_file=config.val_data_file, truncate="end", random_seed=0)).rows

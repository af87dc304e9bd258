"""What a run starts from: whose folder it is, the model with its first weights, a vocabulary that fits the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from src.config import RunConfig
from src.dataset.binidx import MMapIndexedDataset
from src.dataset.tokenizer import load_tokenizer
from src.model import RWKV7
from src.model.weights import IDLE_IN_LAYER_0, Weights, config_from_weights, fit_weights, read_weights
from src.training import checkpoint
from src.training.checkpoint import Start
from src.training.say import say
from src.training.strategy import Hardware

# windows of the data whose ids are compared with vocab_size before the start; every batch is checked later
SAMPLED_WINDOWS = 256


def put_aside_other_run(config: RunConfig, proj_dir: Path) -> None:
    """The swap that people do by hand: other initial weights in an old folder begin a new run; the old one is put aside."""
    remembered = checkpoint.read_run(proj_dir).get("origin")
    origin = checkpoint.origin_weights(proj_dir, config.train_stage, config.load_model)
    if origin is not None and not origin.is_file():
        if checkpoint.numbered(proj_dir) or (proj_dir / checkpoint.FINAL).exists():
            return  # the run goes on from its own files
        raise ValueError(f"--load_model {origin}: no such file")
    if remembered is None or (origin is None and not remembered["sha256"]):
        return
    now = checkpoint.fingerprint(origin)
    if origin is not None and now["sha256"] != remembered["sha256"]:
        aside = checkpoint.put_aside(proj_dir)
        say(
            f"{origin} is not what the run in {proj_dir} started from: this is a new run. The earlier one is now in {aside}"
        )


def build_model(config: RunConfig, hardware: Hardware, start: Start) -> RWKV7:
    if start.weights is None:
        return RWKV7(config.model_config(find_vocab_size(config, None))).to(hardware.dtype)
    weights = read_weights(start.weights)
    model_config = config.model_config(find_vocab_size(config, weights))
    if config.load_partial:
        model = RWKV7(model_config)
    else:
        with torch.device("meta"):
            model = RWKV7(model_config)
    fitted = fit_weights(weights, model, source=str(start.weights), partial=bool(config.load_partial))
    # cloned: the file is mapped into memory, and the run must not depend on it staying there
    model.load_state_dict({name: t.to(hardware.dtype, copy=True) for name, t in fitted.items()}, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in IDLE_IN_LAYER_0)
    return model


def find_vocab_size(config: RunConfig, weights: Weights | None) -> int:
    """--vocab_size, else the tokenizer's, else that of the weights, else what the data needs."""
    if config.vocab_size:
        return config.vocab_size
    if config.tokenizer:
        return load_tokenizer(config.tokenizer).vocab_size
    if weights is not None:
        return config_from_weights(weights, source="the weights").vocab_size
    if not config.data_file:
        raise ValueError(
            "--vocab_size 0: can't be worked out without --tokenizer or --data_file; give one of the three"
        )
    tokens = MMapIndexedDataset(config.data_file).tokens
    largest = max(int(tokens[i : i + (1 << 24)].max()) for i in range(0, len(tokens), 1 << 24))
    say(f"note: --vocab_size {largest + 1}: the largest id in {config.data_file} is {largest}")
    return largest + 1


def check_ids(data: MMapIndexedDataset, vocab_size: int, config: RunConfig) -> None:
    starts = np.linspace(0, max(0, data.n_tokens - config.ctx_len), SAMPLED_WINDOWS).astype(np.int64)
    for at in starts:
        window = data.tokens[at : at + config.ctx_len]
        largest = int(window.max())
        if largest >= vocab_size:
            raise ValueError(
                f"--data_file {config.data_file}: token id {largest} near position {at:,} doesn't fit --vocab_size {vocab_size}; "
                "the data was made with another tokenizer: give its --vocab_size, or make the data anew"
            )

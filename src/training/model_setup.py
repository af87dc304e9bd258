"""The model of a run: first its sizes, then the model with its initial weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from src import run_folder
from src.adapt.adapter import adapter_parameter_count, add_adapter
from src.adapt.base_hash import base_sha256
from src.adapt.config import adapter_of
from src.adapt.quantize import quantize_base
from src.config import ModelConfig, RunConfig, keeps_base, settings_with
from src.dataset.tokenizer import Tokenizer, load_tokenizer
from src.errors import UserError
from src.inference.load import holds_model, load_weights
from src.model import RWKV7
from src.model.cost import parameter_count
from src.model.vocabulary import resize_vocabulary
from src.model.weights import IDLE_IN_LAYER_0, Weights, config_from_weights, fit_weights
from src.training.checkpoint.resume import ResumePoint
from src.training.console import is_rank_zero, log
from src.training.data import open_samples
from src.training.distributed.process_group import ProcessGroup
from src.training.distributed.sharded_init import NamedTensors, initial_values
from src.training.hardware.selection import Hardware
from src.training.objectives.front_end import add_front_end

# of the settings, those that make another model: the vocabulary size and all other sizes
SIZES = tuple(name for name in settings_with("fixed") if name in ModelConfig.__dataclass_fields__)


def with_known_sizes(config: RunConfig, given: frozenset[str]) -> RunConfig:
    """`config` with the sizes of the weights that the run starts from, but for those of the flags that were `given`: on
    the command line, or to `RunConfig` with another value than the default.

    Where those are gone or partial, they are what the run in the folder recorded. Weights that can't be read change
    nothing: where they are needed, reading them again raises the error.
    """
    defaults = RunConfig()
    open_sizes = [name for name in SIZES if name not in given and getattr(config, name) == getattr(defaults, name)]
    if not open_sizes:
        return config
    proj_dir = Path(config.proj_dir)
    try:
        origin = run_folder.origin_weights(proj_dir, config.train_stage, config.load_model)
        if origin is not None and holds_model(origin) and not config.load_partial:
            settings = dataclasses.asdict(config_from_weights(load_weights(origin), str(origin)))
        else:
            settings = {} if config.restart else run_folder.read_run(proj_dir).get("settings", {})
    except (UserError, OSError):
        return config
    # the vocabulary has its own rules (`find_vocab_size`)
    known = {name: settings[name] for name in open_sizes if name in settings and name != "vocab_size"}
    return replace(config, **known)


def resolve_model_config(config: RunConfig, resume: ResumePoint, process_group: ProcessGroup) -> ModelConfig:
    """The sizes of the model, equal on every rank. Raises UserError when they are not those of the state that is
    resumed."""
    saved = resume.state.settings if resume.state is not None else {}

    def resolve() -> ModelConfig:
        # a full state records its vocabulary, whatever the data or the tokenizer would suggest
        known = saved.get("vocab_size", 0) if not config.vocab_size else 0
        weights = load_weights(resume.weights) if resume.weights is not None else None
        sizes = config.model_config(known or find_vocab_size(config, weights))
        if weights is not None:
            # a mistake in the weights is raised here, on every rank, before any waits for another
            fit_to_run(weights, config, sizes, str(resume.weights))
        return sizes

    sizes = process_group.broadcast_from_rank_zero(resolve)
    for name in SIZES:
        if saved.get(name, getattr(sizes, name)) != getattr(sizes, name):
            raise UserError(
                f"the saved state is that of a model with --{name} {saved[name]}",
                flag=name,
                given=getattr(sizes, name),
                advice="restore the setting, or give the new model a folder of its own (--proj_dir)",
            )
    return sizes


def build_model(
    config: RunConfig, sizes: ModelConfig, hardware: Hardware, resume: ResumePoint
) -> tuple[RWKV7, Callable[[], NamedTensors] | None]:
    """The model in the run's precision. Raises UserError when the weights file doesn't fit it.

    Rank 0's model holds the initial weights; other ranks' numbers are left open, they come from rank 0 when the
    strategy is set up. Where a full state is resumed all numbers are left open until it is loaded (`RestoreState`). A
    partitioned model is on the meta device, and the second result gives rank 0's values to build it from.
    """
    model, values = _build_language_model(config, sizes, hardware, resume)
    add_front_end(model, config, hardware, resume.state is not None)
    return model, values


def _build_language_model(
    config: RunConfig, sizes: ModelConfig, hardware: Hardware, resume: ResumePoint
) -> tuple[RWKV7, Callable[[], NamedTensors] | None]:
    with torch.device("meta"):
        model = RWKV7(sizes)
    if keeps_base(config):
        return _build_on_base(model, config, hardware, resume), None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in IDLE_IN_LAYER_0)
    if hardware.is_partitioned:
        return model, lambda: _values(config, sizes, resume, model)
    if is_rank_zero() and resume.state is None:
        # copied, for a file is mapped into memory, and the run must not depend on it staying there
        weights = {name: tensor.to(hardware.dtype, copy=True) for name, tensor in _values(config, sizes, resume, model)}
        trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model.load_state_dict(weights, assign=True)  # `assign`: the meta tensors have no memory to copy into
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        return model, None
    # memory without contents: pages that are overwritten anyway are not touched twice
    return model.to(hardware.dtype).to_empty(device="cpu"), None


def _build_on_base(model: RWKV7, config: RunConfig, hardware: Hardware, resume: ResumePoint) -> RWKV7:
    """The base from its file on every rank, frozen, with an adapter's initial values (rank 0's, once the strategy is
    set up), or with open ones where a full state is resumed."""
    weights = fitted_weights(config, model.config, resume)
    if missing := [name for name, tensor in weights.items() if tensor.is_meta]:
        raise UserError(
            f"{missing[0]} is missing",
            given=resume.weights,
            expected="a whole base, without --load_partial",
        )
    model.load_state_dict({name: t.to(hardware.dtype, copy=True) for name, t in weights.items()}, assign=True)
    if config.quant != "none":
        quantize_base(model, config.quant)
    if (adapter := adapter_of(config)) is not None:
        add_adapter(model, adapter, draw=resume.state is None)
    else:
        model.requires_grad_(False)
        model.frozen_base = frozenset(name for name, _ in model.named_parameters())
    return model


def resolve_base(config: RunConfig, resume: ResumePoint, process_group: ProcessGroup) -> str:
    """A hash of the weights that stay as they are; "" where all weights are trained. Raises UserError when what is
    resumed was trained beside others."""
    if not keeps_base(config):
        return ""
    weights = resume.weights
    assert weights is not None, "checked with the flags"
    before = resume.state.settings if resume.state is not None else {}
    return process_group.broadcast_from_rank_zero(lambda: check_base(weights, before))


def check_base(weights: Path, settings: dict[str, Any]) -> str:
    """The hash of a base. Raises UserError when the adapter of a run with these `settings` was trained beside
    another."""
    sha256 = base_sha256(load_weights(weights))
    before = settings.get("base_sha256", sha256)
    if before != sha256:
        raise UserError(
            "the run trains an adapter of other weights (their numbers differ)",
            flag="load_model",
            given=weights,
            expected=f"those of SHA-256 {before[:12]}...",
            advice="name the base that the run began with, or give another run a --proj_dir of its own",
        )
    return sha256


def held_count(config: RunConfig, sizes: ModelConfig) -> int:
    """The number of parameters that a full state holds: all, or the adapter's."""
    if not keeps_base(config):
        return parameter_count(sizes)
    adapter = adapter_of(config)
    return 0 if adapter is None else adapter_parameter_count(sizes, adapter)


def _values(config: RunConfig, sizes: ModelConfig, resume: ResumePoint, model: RWKV7) -> NamedTensors:
    """(name, tensor) of each parameter at the start; arbitrary numbers where a full state replaces them."""
    if resume.state is not None:
        yield from ((name, torch.empty(parameter.shape)) for name, parameter in model.named_parameters())
        return
    if resume.weights is None:
        yield from initial_values(sizes)
        return
    weights = fitted_weights(config, sizes, resume)
    yield from ((name, tensor) for name, tensor in weights.items() if not tensor.is_meta)
    if any(tensor.is_meta for tensor in weights.values()):  # --load_partial: parameters that the file lacks
        yield from ((name, tensor) for name, tensor in initial_values(sizes) if weights[name].is_meta)


def fitted_weights(config: RunConfig, sizes: ModelConfig, resume: ResumePoint) -> Weights:
    """The weights file that the run continues from, as the model needs it; parameters that it lacks (--load_partial)
    are on the meta device. Raises UserError when it doesn't fit."""
    assert resume.weights is not None
    return fit_to_run(load_weights(resume.weights), config, sizes, str(resume.weights))


def fit_to_run(weights: Weights, config: RunConfig, sizes: ModelConfig, source: str) -> Weights:
    """`weights` as a model of `sizes` needs them, by --load_partial and --resize_vocab. Raises UserError."""
    if config.resize_vocab and len(weights.get("emb.weight", ())) < sizes.vocab_size:
        if keeps_base(config):  # nothing could be applied to the base as it is recorded
            raise UserError(
                "adds rows to the base, which the file of an adapter or of initial states doesn't hold",
                flag="resize_vocab",
                given=1,
                advice="make a base with them first (python -m src.inference.convert_vocabulary MODEL OUT.pth "
                f"--vocab_size {sizes.vocab_size}), and name it as --load_model",
            )
        weights = resize_vocabulary(weights, sizes.vocab_size)
    with torch.device("meta"):
        model = RWKV7(sizes)
    return fit_weights(weights, model, source, partial=bool(config.load_partial))


def find_vocab_size(config: RunConfig, weights: Weights | None) -> int:
    """--vocab_size, else that of the weights, else the tokenizer's, else what the data needs."""
    # loaded even where --vocab_size is given: a mistake in it is found now, not when samples are generated at the end
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    if config.vocab_size:
        if tokenizer:
            check_tokenizer(tokenizer, config.vocab_size)
        return config.vocab_size
    if weights is not None and not (tokenizer and (config.load_partial or config.resize_vocab)):
        size = config_from_weights(weights, source="the weights").vocab_size
        if tokenizer:
            check_tokenizer(tokenizer, size, is_size_of_weights=True)
        return size
    if tokenizer:
        # rows beyond the tokenizer's ids stay: many vocabularies are padded
        rows = len(weights["emb.weight"]) if config.resize_vocab and weights and "emb.weight" in weights else 0
        return max(tokenizer.vocab_size, rows)
    if not config.data_file:
        raise UserError("not known", flag="vocab_size", given=0, advice="give it, or --tokenizer, or --data_file")
    largest = open_samples(config).largest_id()
    log(f"note: --vocab_size {largest + 1}: the largest id in {config.data_file} is {largest}")
    return largest + 1


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, is_size_of_weights: bool = False) -> None:
    """Raises UserError when a model with this vocabulary lacks ids of the tokenizer, whether the data has them or
    not. `is_size_of_weights`: no flag says it."""
    # A chat with the trained model would use any of them, and the rows can't be added then.
    if tokenizer.largest_id < vocab_size:
        return
    if is_size_of_weights:
        raise UserError(
            f"its largest id is {tokenizer.largest_id}, and the weights have {vocab_size} rows",
            flag="tokenizer",
            given=tokenizer.name,
            advice="add rows with --resize_vocab 1, or name the tokenizer that the weights were trained with",
        )
    raise UserError(
        f"its largest id is {tokenizer.largest_id}, which --vocab_size {vocab_size} lacks",
        flag="tokenizer",
        given=tokenizer.name,
        advice=f"use --vocab_size {tokenizer.vocab_size}, or the tokenizer that the data was made with",
    )

"""The front end of a run's model, with its initial weights, and the features of a frozen encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from src.adapt.base_hash import base_sha256
from src.config import RunConfig, adapter_kind, trained_parts
from src.dataset.binidx import with_ending
from src.errors import UserError
from src.inference.adaptation import multimodal_folder
from src.model import RWKV7
from src.model.weights import Weights
from src.multimodal.config import HF, media_of
from src.multimodal.feature_cache import open_features
from src.multimodal.files import load_encoder_values, load_front_end_values, read_record, tensors_of
from src.multimodal.front_end import PREFIX, attach_front_end, freeze_parts
from src.multimodal.hf_encoder import files_sha256
from src.multimodal.media_input import MediaInput
from src.terminal import show
from src.training.data import HeldOut, Samples, SftSamples
from src.training.hardware.selection import Hardware


def add_front_end(model: RWKV7, config: RunConfig, hardware: Hardware, is_resumed: bool) -> None:
    """Give `model` the front end of a run with --encoder, in the run's precision: new, or that of --load_projector.
    What of it isn't trained is frozen. Raises UserError when the encoder or that folder can't be used.

    `is_resumed`: the values of what is trained come from a full state.
    """
    media = media_of(config)
    if media is None:
        return
    front_end = attach_front_end(model, media)
    if config.load_projector and (not is_resumed or frozen_parts(config)):
        load_front_end_values(front_end, front_end_folder(config))
    freeze_parts(model, trained_parts(config))
    # what is trained beside an adapter is fp32, as the adapter (hardware/selection.py, engine_dtype)
    trained = torch.float32 if adapter_kind(config) else hardware.dtype
    front_end.projector.to(trained)
    front_end.encoder.to(trained if "encoder" in trained_parts(config) else hardware.dtype)
    front_end.is_precomputed = bool(config.cache_features)
    frozen = {f"{PREFIX}{name}" for name, parameter in front_end.named_parameters() if not parameter.requires_grad}
    model.frozen_base = model.frozen_base | frozen


def front_end_folder(config: RunConfig) -> Path:
    """The folder that --load_projector names, itself or of a run's folder its newest. Raises UserError."""
    folder = multimodal_folder(Path(config.load_projector))
    if folder is None:
        raise UserError(
            "no projector in it", flag="load_projector", given=config.load_projector, expected="a run with --encoder"
        )
    read_record(folder)  # refuses one of an earlier version, with other parameters
    return folder


def frozen_parts(config: RunConfig) -> set[str]:
    """Those of encoder and projector that aren't trained."""
    return {"encoder", "projector"} - set(trained_parts(config))


def frozen_tensors(config: RunConfig) -> Weights:
    """Of the weights that --load_projector names those that aren't trained: what the run writes needs them, too."""
    frozen = frozen_parts(config)
    return tensors_of(front_end_folder(config), frozen) if config.load_projector and frozen else {}


def frozen_sha256(config: RunConfig) -> str:
    """A hash of `frozen_tensors`: with others it would be another run. "" where there are none."""
    tensors = frozen_tensors(config)
    return base_sha256(tensors) if tensors else ""


def loaded_encoder_sha256(config: RunConfig) -> str:
    """A hash of the files of a frozen hf: encoder; "" where the run has none, or trains it."""
    if not config.encoder.startswith(HF) or "encoder" in trained_parts(config):
        return ""
    return files_sha256(config.encoder.removeprefix(HF))


def cache_features(samples: Samples, held_out: HeldOut | None, hardware: Hardware, local_rank: int) -> None:
    """With --cache_features: what the encoder makes of the media of both data sets. Where it isn't on the disk, the
    first process to come computes it on its device, and the others wait, however long it takes. Raises UserError."""
    if not isinstance(samples, SftSamples) or not samples.config.cache_features:
        return
    config, media = samples.config, media_of(samples.config)
    assert media is not None, "checked with the flags"

    def build() -> nn.Module:
        encoder = media.spec.build()
        if config.load_projector:
            load_encoder_values(encoder, media, front_end_folder(config))
        return encoder

    weights = frozen_sha256(config)
    for rows in (samples.rows, *([held_out.rows] if held_out is not None else [])):
        source = rows.media
        assert isinstance(source, MediaInput)
        names = (name for i in range(len(rows.conversations.data)) for name, _ in rows.conversations.media_of(i))
        prefix = with_ending(rows.conversations.data.prefix, "-features")
        device = f"cuda:{local_rank}" if hardware.accelerator == "gpu" else "cpu"
        source.features = open_features(
            source.spec, source.reader, names, prefix, device, hardware.dtype, show, build, weights
        )

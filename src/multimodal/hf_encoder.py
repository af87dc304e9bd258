"""The encoder `hf:FOLDER`: the vision or audio encoder of a model that `transformers` loads.

Pictures: CLIP, SigLIP, DINOv2, ViT. Sounds: Whisper (its encoder), WavLM, HuBERT, wav2vec 2.0. Of models of several
senses the part for pictures is used. A token is the last hidden state of a patch or a frame, without those of classes
and registers.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.dataset.media_files import Picture, Sound
from src.errors import UserError
from src.files import sha256_of
from src.multimodal.mel import resample
from src.multimodal.pooling import pool_frames, pool_grid

MODEL_TYPES = "CLIP, SigLIP, DINOv2, ViT, Whisper, WavLM, HuBERT, wav2vec 2.0"


@dataclass(frozen=True)
class HfEncoder:
    """`folder` with config.json, weights and preprocessor_config.json; tokens: 0 for all that it gives, else the number
    that they are pooled to."""

    folder: str
    tokens: int = 0

    @cached_property
    def config(self) -> Any:
        """That of the part that is used. Raises UserError."""
        transformers = _transformers()
        if not (Path(self.folder) / "config.json").is_file():
            raise UserError("no such encoder", flag="encoder", given=f"hf:{self.folder}", expected="hf:FOLDER")
        try:
            config = transformers.AutoConfig.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"its config.json can't be used ({_first_line(error)})", flag="encoder", given=f"hf:{self.folder}"
            ) from error
        config = getattr(config, "vision_config", config)
        if not (_is_vision(config) or _is_whisper(config) or _has_wave_input(config)):
            raise UserError(
                f"a model of type {config.model_type}", flag="encoder", given=f"hf:{self.folder}", expected=MODEL_TYPES
            )
        return config

    @cached_property
    def _processor(self) -> Any:
        transformers = _transformers()
        loader = transformers.AutoImageProcessor if self.kind == "image" else transformers.AutoFeatureExtractor
        try:
            return loader.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"its preprocessor_config.json can't be used ({_first_line(error)})",
                flag="encoder",
                given=f"hf:{self.folder}",
            ) from error

    @property
    def kind(self) -> str:
        return "image" if _is_vision(self.config) else "sound"

    @property
    def width(self) -> int:
        return int(self.config.d_model if _is_whisper(self.config) else self.config.hidden_size)

    def count(self, medium: Picture | Sound) -> int:
        if self.tokens:
            return self.tokens
        if self.kind == "image":
            return self._side**2
        if _is_whisper(self.config):
            return int(self.config.max_source_positions)
        assert isinstance(medium, Sound)
        return self._frames(-(-len(medium.samples) * self._rate // medium.rate))

    @property
    def _side(self) -> int:
        return int(self.config.image_size) // int(self.config.patch_size)

    @property
    def _rate(self) -> int:
        return int(self._processor.sampling_rate)

    def _frames(self, samples: int) -> int:
        """Of an encoder that reads the wave itself, through convolutions without padding."""
        samples = max(samples, self._least_samples)
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples

    @property
    def _least_samples(self) -> int:
        """As many as one frame takes; shorter sounds are padded with silence."""
        needed = 1
        for kernel, stride in zip(reversed(self.config.conv_kernel), reversed(self.config.conv_stride), strict=True):
            needed = (needed - 1) * stride + kernel
        return needed

    def prepare(self, medium: Picture | Sound) -> Tensor:
        """A picture: fp32 [1, 3, side, side]; a sound: fp32 [1, mels, frames] of Whisper, else fp32 [samples]."""
        if isinstance(medium, Picture):
            pixels = self._processor(images=[medium.pixels], return_tensors="pt")["pixel_values"]
            side = int(self.config.image_size)
            if tuple(pixels.shape) != (1, 3, side, side):
                raise UserError(
                    f"its preprocessor_config.json gives {list(pixels.shape[1:])}",
                    flag="encoder",
                    given=f"hf:{self.folder}",
                    expected=f"{[3, side, side]}, as its config.json",
                )
            return pixels
        wave = resample(torch.from_numpy(medium.samples), medium.rate, self._rate)
        prepared = self._processor(wave.numpy(), sampling_rate=self._rate, return_tensors="pt")
        if _is_whisper(self.config):
            return prepared["input_features"]
        values = prepared["input_values"][0]
        return torch.nn.functional.pad(values, (0, max(0, self._least_samples - len(values))))

    def blank(self) -> Tensor:
        if self.kind == "image":
            side = int(self.config.image_size)
            return torch.zeros(1, 3, side, side)
        if _is_whisper(self.config):
            return torch.zeros(1, int(self.config.num_mel_bins), 2 * int(self.config.max_source_positions))
        return torch.zeros(self._least_samples)

    def build(self) -> nn.Module:
        return TransformersEncoder(self)

    def load(self) -> nn.Module:
        """The encoder of the folder, in fp32. Raises UserError."""
        self.config  # noqa: B018 (for its error)
        transformers = _transformers()
        try:
            model = transformers.AutoModel.from_pretrained(self.folder, local_files_only=True, torch_dtype="float32")
        except Exception as error:  # what a damaged folder raises is the library's matter
            raise UserError(
                f"can't be loaded ({_first_line(error)})", flag="encoder", given=f"hf:{self.folder}"
            ) from error
        return self._part(model)

    def skeleton(self) -> nn.Module:
        """The encoder without its values, on the current device: with the meta device its sizes alone."""
        self.config  # noqa: B018 (for its error)
        transformers = _transformers()
        return self._part(transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(self.folder)))

    def _part(self, model: Any) -> Any:
        """The encoder of a model of several parts."""
        if _is_whisper(self.config):
            return model.encoder
        return getattr(model, "vision_model", model)


@lru_cache(4)
def files_sha256(folder: str) -> str:
    """A hash of what an encoder's result depends on: its weights and the processor's settings. Read once in a process,
    a second per GB. "" where there are no weights."""
    path = Path(folder)
    weights = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    files = [*weights, *path.glob("preprocessor_config.json")]
    digests = [f"{file.name} {sha256_of(file)}" for file in files]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest() if weights else ""


class TransformersEncoder(nn.Module):
    """(prepared media, lengths) -> [K, width]. Of the frozen encoder no gradients are kept."""

    def __init__(self, spec: HfEncoder) -> None:
        super().__init__()
        self.spec = spec
        self.model = spec.load()

    def forward(self, media: Tensor, lengths: Tensor) -> Tensor:
        spec = self.spec
        dtype = next(self.model.parameters()).dtype
        if spec.kind == "image":
            hidden = self.model(pixel_values=media.to(dtype)).last_hidden_state
            # class and register tokens come first
            return pool_grid(hidden[:, -(spec._side**2) :], spec._side, spec._side, spec.tokens).flatten(0, 1)
        if _is_whisper(spec.config):
            hidden = self.model(input_features=media.to(dtype)).last_hidden_state
            return pool_frames(hidden, spec.tokens).flatten(0, 1)
        # one by one: padding would change what the convolutions' norms see
        sounds = (self.model(input_values=sound[None].to(dtype)) for sound in media.split(lengths.tolist()))
        return torch.cat([pool_frames(out.last_hidden_state, spec.tokens)[0] for out in sounds])


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "needs the package transformers", flag="encoder", given="hf:", advice="pip install transformers"
        ) from error
    return transformers


def _is_vision(config: Any) -> bool:
    return hasattr(config, "image_size") and hasattr(config, "patch_size")


def _is_whisper(config: Any) -> bool:
    return config.model_type == "whisper"


def _has_wave_input(config: Any) -> bool:
    return hasattr(config, "conv_kernel") and hasattr(config, "conv_stride")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def grid_side(tokens: int) -> int:
    """The side of a square of so many tokens; 0 where there is none."""
    side = math.isqrt(tokens)
    return side if side * side == tokens else 0

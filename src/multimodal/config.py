"""`MediaConfig`: which encoder and projector a model gets, of the flags of a run or as recorded in a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from src.config import RunConfig, image_size
from src.dataset.media_reader import MediaReader
from src.errors import UserError
from src.multimodal.encoder import EncoderSpec
from src.multimodal.hf_encoder import HfEncoder
from src.multimodal.logmel import LogMel
from src.multimodal.patches import Patches
from src.multimodal.projector import PROJECTORS

HF = "hf:"


@dataclass(frozen=True)
class MediaConfig:
    """The flags of the same names, parsed.

    encoder       "patches", "logmel" or "hf:FOLDER"
    image_size    (height, width) of a picture, for patches
    tokens        of a medium; 0: as many as the encoder gives
    encoder_dim   width of patches and logmel
    """

    encoder: str
    projector: str = "mlp"
    tokens: int = 0
    image_size: tuple[int, int] = (64, 64)
    patch_size: int = 8
    encoder_dim: int = 128
    max_seconds: float = 30.0

    @property
    def spec(self) -> EncoderSpec:
        """The encoder without its weights."""
        if self.encoder.startswith(HF):
            return HfEncoder(self.encoder.removeprefix(HF), self.tokens)
        if self.encoder == "logmel":
            return LogMel(self.encoder_dim, self.tokens)
        return Patches(*self.image_size, self.patch_size, self.encoder_dim, self.tokens)

    def payload(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "image_size": list(self.image_size)}

    @classmethod
    def from_payload(cls, payload: Any, source: object) -> MediaConfig:
        """What `payload` gave. Raises UserError when it is something else."""
        try:
            values = {field.name: payload[field.name] for field in fields(cls)}
            height, width = values["image_size"]
            config = cls(**{**values, "image_size": (height, width)})
            numbers = (config.tokens, height, width, config.patch_size, config.encoder_dim)
            is_known = config.encoder in ("patches", "logmel") or str(config.encoder).startswith(HF)
            sizes = all(type(n) is int and 0 <= n < 1 << 16 for n in numbers) and config.patch_size > 3
            if not (is_known and sizes and config.projector in PROJECTORS and 0 < float(config.max_seconds) < 1e6):
                raise ValueError("a value out of range")
            return config
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not the settings of an encoder ({error})", given=source) from error


def media_of(config: RunConfig) -> MediaConfig | None:
    """The encoder and the projector of a run; None where it has none."""
    if not config.encoder:
        return None
    size = image_size(config.image_size)
    assert size is not None, "checked with the flags"
    return MediaConfig(
        config.encoder,
        projector=config.projector,
        tokens=config.media_tokens,
        image_size=size,
        patch_size=config.patch_size,
        encoder_dim=config.encoder_dim,
        max_seconds=config.max_seconds,
    )


def reader_of(media: MediaConfig, folder: str, is_strict: bool = False) -> MediaReader:
    """How conversations with these settings are read, names relative to `folder`. Raises UserError."""
    spec = media.spec
    identity = {name: value for name, value in media.payload().items() if name != "projector"}
    return MediaReader(spec.kind, folder, media.max_seconds, spec.count, identity, is_strict)

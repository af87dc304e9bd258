"""The encoder `logmel`: a small network for sounds that is trained from its beginning with the model.

log-mel frames [n, 80], 10 ms each  ->  convolutions of stride 2, three of them  ->  norm: a token per 80 ms
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from src.dataset.media_files import Picture, Sound
from src.multimodal.mel import MELS, RATE, frame_count, log_mel, resample
from src.multimodal.pooling import pool_frames

HALVINGS = 3


@dataclass(frozen=True)
class LogMel:
    """Width of a token; tokens: 0 for one per 80 ms, else the number for any sound."""

    width: int
    tokens: int = 0

    kind = "sound"

    def count(self, medium: Picture | Sound) -> int:
        assert isinstance(medium, Sound)
        frames = frame_count(-(-len(medium.samples) * RATE // medium.rate))
        for _ in range(HALVINGS):
            frames = (frames + 1) // 2
        return self.tokens or frames

    def prepare(self, medium: Picture | Sound) -> Tensor:
        """fp32 [frames, MELS]."""
        assert isinstance(medium, Sound)
        return log_mel(resample(torch.from_numpy(medium.samples), medium.rate, RATE))

    def blank(self) -> Tensor:
        return torch.zeros(1 << HALVINGS, MELS)

    def build(self) -> nn.Module:
        return LogMelEncoder(self)


class LogMelEncoder(nn.Module):
    """(fp32 [frames of all, MELS], lengths) -> [K, width]."""

    def __init__(self, spec: LogMel) -> None:
        super().__init__()
        self.spec = spec
        channels = [MELS, *[spec.width] * HALVINGS]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(before, after, 3, stride=2, padding=1) for before, after in pairwise(channels)
        )
        self.mix = nn.Linear(spec.width, spec.width)
        self.norm = nn.LayerNorm(spec.width)

    def forward(self, media: Tensor, lengths: Tensor) -> Tensor:
        # one by one, so that a sound's tokens don't depend on what else is in the batch
        return torch.cat([self._encode(frames) for frames in media.to(self.mix.weight.dtype).split(lengths.tolist())])

    def _encode(self, frames: Tensor) -> Tensor:
        x = frames.t()[None]
        for convolution in self.convolutions:
            x = torch.nn.functional.gelu(convolution(x))
        x = pool_frames(self.mix(x.transpose(1, 2)), self.spec.tokens)
        return self.norm(x)[0]

"""The encoder `logmel`: a small network for sounds that is trained from its beginning with the model.

log-mel frames [n, 80], 10 ms each  ->  three times: convolution of stride 2, norm, GELU  ->  Linear, norm
  ->  less what all tokens of the sound have in common  ->  norm: a token per 80 ms
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from src.dataset.media_files import Picture, Sound
from src.multimodal.mel import MELS, RATE, frame_count, log_mel, resample
from src.multimodal.pooling import WEIGHT_SCALE, less_common, pool_frames

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
            nn.Conv1d(before, after, 3, stride=2, padding=1, bias=False) for before, after in pairwise(channels)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(spec.width) for _ in range(HALVINGS))
        self.mix = nn.Linear(spec.width, spec.width, bias=False)
        self.mix_norm = nn.LayerNorm(spec.width, elementwise_affine=False)
        self.norm = nn.LayerNorm(spec.width)
        for layer in (*self.convolutions, self.mix):
            nn.init.normal_(layer.weight, std=WEIGHT_SCALE)

    def forward(self, media: Tensor, lengths: Tensor) -> Tensor:
        # one by one, so that a sound's tokens don't depend on what else is in the batch
        return torch.cat([self._encode(frames) for frames in media.to(self.mix.weight.dtype).split(lengths.tolist())])

    def _encode(self, frames: Tensor) -> Tensor:
        x = frames[None]
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = torch.nn.functional.gelu(norm(convolution(x.transpose(1, 2)).transpose(1, 2)))
        return self.norm(less_common(pool_frames(self.mix_norm(self.mix(x)), self.spec.tokens)))[0]

"""The encoder `patches`: a small network for pictures that is trained from its beginning with the model.

    x [3, H, W] in [-1, 1]  ->  convolutions 3 x 3 of stride 2, as many as make a patch  ->  + position  ->  norm

Neighbouring patches overlap, so that what lies on the border of two is seen whole by both.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from src.dataset.media_files import Picture, Sound, fit_picture
from src.multimodal.pooling import pool_grid


@dataclass(frozen=True)
class Patches:
    """height, width of the picture (others are scaled to fit and centred on black), side of a patch, width of a token;
    tokens: 0 for one per patch, else a square number."""

    height: int
    image_width: int
    patch_size: int
    width: int
    tokens: int = 0

    kind = "image"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.height // self.patch_size, self.image_width // self.patch_size

    def count(self, medium: Picture | Sound) -> int:
        return self.tokens or self.grid[0] * self.grid[1]

    def prepare(self, medium: Picture | Sound) -> Tensor:
        """uint8 [1, 3, height, image_width]."""
        assert isinstance(medium, Picture)
        pixels = fit_picture(medium, self.height, self.image_width).pixels
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]

    def blank(self) -> Tensor:
        return torch.zeros(1, 3, self.height, self.image_width, dtype=torch.uint8)

    def build(self) -> nn.Module:
        return PatchEncoder(self)


class PatchEncoder(nn.Module):
    """(uint8 [M, 3, H, W], lengths) -> [M * tokens, width]."""

    def __init__(self, spec: Patches) -> None:
        super().__init__()
        self.spec = spec
        halvings = spec.patch_size.bit_length() - 1  # a power of two, checked with the flags
        # the resolution is halved and the channels are doubled, up to the width at the end
        channels = [3, *(max(16, spec.width >> (halvings - 1 - i)) for i in range(halvings))]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairwise(channels)
        )
        self.mix = nn.Conv2d(channels[-1], spec.width, 3, padding=1)
        rows, columns = spec.grid
        self.position = nn.Parameter(torch.randn(rows * columns, spec.width) * 0.02)
        self.norm = nn.LayerNorm(spec.width)

    def forward(self, media: Tensor, lengths: Tensor) -> Tensor:
        x = media.to(self.position.dtype) / 127.5 - 1
        for convolution in self.convolutions:
            x = torch.relu(convolution(x))
        x = self.mix(x).flatten(2).transpose(1, 2) + self.position  # [M, rows * columns, width]
        return self.norm(pool_grid(x, *self.spec.grid, self.spec.tokens)).flatten(0, 1)

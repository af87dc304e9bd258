"""The encoder `patches`: a small network for pictures that is trained from its beginning with the model.

    x [3, H, W], standardised  ->  windows around each patch  ->  Linear, ReLU, Linear  ->  + position  ->  norm

The windows have twice the side of a patch, so that what lies on the border of two is seen whole by both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.dataset.media_files import Picture, Sound, fit_picture
from src.multimodal.pooling import pool_grid

HIDDEN_FACTOR = 2  # of the layer between, times the width
POSITION_SCALE = 0.5  # of the initial positions; features begin at a scale of about 1


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
        # two products of matrices: on a CPU some twenty times as fast as convolutions with few channels
        self.window = nn.Linear(3 * (2 * spec.patch_size) ** 2, HIDDEN_FACTOR * spec.width)
        self.output = nn.Linear(HIDDEN_FACTOR * spec.width, spec.width)
        rows, columns = spec.grid
        self.position = nn.Parameter(torch.randn(rows * columns, spec.width) * POSITION_SCALE)
        self.norm = nn.LayerNorm(spec.width)

    def forward(self, media: Tensor, lengths: Tensor) -> Tensor:
        # Each picture by its own mean and scale: a uniform background is near 0, where it hides nothing
        x = media.to(self.position.dtype)
        x = x - x.mean(dim=(1, 2, 3), keepdim=True)
        x = x / (x.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() + 1)
        patch = self.spec.patch_size
        # windows of twice the side of a patch, centred on it: [M, rows * columns, 3 (2 patch)^2]
        x = F.unfold(x, 2 * patch, padding=patch // 2, stride=patch).transpose(1, 2)
        x = self.output(torch.relu(self.window(x))) + self.position
        return self.norm(pool_grid(x, *self.spec.grid, self.spec.tokens)).flatten(0, 1)

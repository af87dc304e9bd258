"""The encoder `patches`: a small network for pictures that is trained from its beginning with the model.

    x [3, H, W], standardised  ->  convolution, maximum over 2 x 2  ->  convolution, Linear at each place
      ->  maximum over 2 x 2  ->  windows around each patch  ->  Linear, norm, ReLU, Linear, norm
      ->  + position  ->  less what all tokens have in common  ->  norm

The windows have twice the side of a patch, so that what lies on the border of two is seen whole by both. Tokens follow
one another along the longer side of the picture, from left to right or from top to bottom, so that a model that reads
them once meets what is written in its order. Where the sides are equal, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.dataset.media_files import Picture, Sound, fit_picture
from src.multimodal.pooling import WEIGHT_SCALE, less_common, pool_grid

LOCAL_CHANNELS = 16, 48, 64  # of the two convolutions, and of what follows at each place
CELLS = 2  # places of the convolutions' map along the side of a patch
# Of the initial positions, beside features of 1: with more, all pictures would begin alike.
POSITION_SCALE = 0.3


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
        first, second, third = LOCAL_CHANNELS
        stride = spec.patch_size // (2 * CELLS)  # of the map of places
        self.pooled = min(2, stride)  # the smallest patches have a place per pixel
        stride //= self.pooled
        kernel = max(3, 2 * stride)
        self.edges = nn.Conv2d(3, first, kernel, stride, (kernel - stride) // 2)
        self.shapes = nn.Conv2d(first, second, 3, padding=1)
        self.shapes_norm = nn.GroupNorm(1, second)
        self.kinds = nn.Conv2d(second, third, 1)
        self.kinds_norm = nn.GroupNorm(1, third)
        self.window = nn.Conv2d(third, spec.width, 2 * CELLS, CELLS, CELLS // 2, bias=False)
        self.window_norm = nn.LayerNorm(spec.width)
        self.output = nn.Linear(spec.width, spec.width, bias=False)
        self.output_norm = nn.LayerNorm(spec.width, elementwise_affine=False)
        for layer in (self.edges, self.shapes, self.kinds, self.window, self.output):
            nn.init.normal_(layer.weight, std=WEIGHT_SCALE)
        rows, columns = spec.grid
        self.position = nn.Parameter(torch.randn(rows * columns, spec.width) * POSITION_SCALE)
        self.norm = nn.LayerNorm(spec.width)

    def forward(self, media: Tensor, lengths: Tensor) -> Tensor:
        # Each picture by its own mean and scale: a uniform background is near 0, where it hides nothing
        x = media.to(self.position.dtype)
        x = x - x.mean(dim=(1, 2, 3), keepdim=True)
        x = x / (x.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() + 1)
        x = F.max_pool2d(torch.relu(self.edges(x)), self.pooled)
        x = torch.relu(self.shapes_norm(self.shapes(x)))
        x = torch.relu(self.kinds_norm(self.kinds(x)))
        x = self.window(F.max_pool2d(x, 2)).flatten(2).transpose(1, 2)  # [M, rows * columns, width]
        x = self.output_norm(self.output(torch.relu(self.window_norm(x)))) + self.position
        x = self._in_order(pool_grid(x, *self.spec.grid, self.spec.tokens))
        return self.norm(less_common(x)).flatten(0, 1)

    def _in_order(self, x: Tensor) -> Tensor:
        """[M, tokens, width], row by row -> along the longer side."""
        rows, columns = self.spec.grid
        if columns <= rows or self.spec.tokens:  # fewer tokens are a square
            return x
        return x.unflatten(1, (rows, columns)).transpose(1, 2).flatten(1, 2)

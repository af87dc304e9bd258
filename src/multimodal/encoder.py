"""The interface of an encoder: what it reads, how many tokens that will take, and the module that computes them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from src.dataset.media_files import Picture, Sound


class EncoderSpec(Protocol):
    """An encoder without its weights: small, immutable, and passed to the processes that read data.

    The module of `build` maps the prepared media of a batch, concatenated along their first dimension, and the lengths
    of the parts (int64 [M]) to rows [K, width], where medium m has as many rows as `count` says of it.
    """

    @property
    def kind(self) -> str:
        """ "image" or "sound": the one kind of medium that it reads."""

    @property
    def width(self) -> int:
        """Numbers per token."""

    def count(self, medium: Picture | Sound) -> int:
        """The number of tokens of a medium, at least 1."""

    def prepare(self, medium: Picture | Sound) -> Tensor:
        """The module's input for one medium, [n, ...]."""

    def blank(self) -> Tensor:
        """The input for a medium of nothing: a batch without any still has to reach the weights."""

    def build(self) -> nn.Module:
        """The module, with its initial weights or those of its folder. Raises UserError."""

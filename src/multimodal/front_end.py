"""The front end of a model: encoder and projector, which turn pictures or sounds into rows of embeddings."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from src.model import RWKV7
from src.model.init import ParameterInfo, row_of
from src.multimodal.config import MediaConfig
from src.multimodal.hf_encoder import HfEncoder
from src.multimodal.projector import PROJECTORS

PREFIX = "media."  # of its parameters' names in the model


class FrontEnd(nn.Module):
    """rows [K, C] = front_end(media, lengths): what the encoder's `prepare` gave, concatenated, and the parts' lengths.

    `is_precomputed`: media are the encoder's rows [K, width] already (feature_cache.py).
    """

    def __init__(self, config: MediaConfig, n_embd: int) -> None:
        super().__init__()
        self.config, self.spec = config, config.spec
        self.encoder = self.spec.build()
        self.projector = PROJECTORS[config.projector](self.spec.width, n_embd)
        self.is_precomputed = False

    def forward(self, media: Tensor, lengths: Tensor) -> Tensor:
        if not len(lengths):
            # a blank medium of which nothing is used: every rank has gradients for every parameter, zeros at least
            blank = self._blank()
            return self(blank, torch.tensor([len(blank)], device=lengths.device))[:0]
        if self.is_precomputed:
            return self.projector(media.to(self.projector.output.weight.dtype))
        frozen = not any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            rows = self.encoder(media, lengths)
        return self.projector(rows.to(self.projector.output.weight.dtype))

    @contextmanager
    def from_files(self) -> Iterator[None]:
        """Within the block media are read from files, whether there are features that were computed before or not."""
        before, self.is_precomputed = self.is_precomputed, False
        try:
            yield
        finally:
            self.is_precomputed = before

    def train(self, mode: bool = True) -> FrontEnd:
        """As of any module, but an encoder of `transformers` stays in evaluation mode, trained or not: its dropout and
        masks would be other ones after a resume."""
        super().train(mode)
        if isinstance(self.spec, HfEncoder):
            self.encoder.eval()
        return self

    def _blank(self) -> Tensor:
        weight = self.projector.output.weight
        blank = torch.zeros(1, self.spec.width) if self.is_precomputed else self.spec.blank()
        return blank.to(weight.device)


@torch.no_grad()
def attach_front_end(model: RWKV7, config: MediaConfig) -> FrontEnd:
    """Give `model` a front end, with the encoder's own initial weights and the projector's of the init table, on the
    CPU in fp32. Raises UserError when the encoder can't be loaded."""
    front_end = FrontEnd(config, model.config.n_embd)
    for name, parameter in front_end.projector.named_parameters():
        full_name = f"{PREFIX}projector.{name}"
        value = row_of(full_name).value(ParameterInfo(model.config, 0, parameter.shape))
        parameter.copy_(value) if isinstance(value, Tensor) else parameter.fill_(value)
    model.media = front_end
    return front_end


def freeze_parts(model: RWKV7, trained: Collection[str]) -> None:
    """Freeze encoder and projector but for those of `trained` ("encoder", "projector"). What is frozen is in no state
    of a run: it comes from its files again, or, of an encoder of ours, is written with the projector."""
    assert model.media is not None
    for name, parameter in model.media.named_parameters():
        parameter.requires_grad_(name.partition(".")[0] in trained)

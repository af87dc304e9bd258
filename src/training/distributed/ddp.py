"""DistributedDataParallel that adds the gradients of the ranks in the same order after every start."""

from __future__ import annotations

import torch
from pytorch_lightning.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel


class OrderedDDPStrategy(DDPStrategy):
    """Lightning's DDPStrategy, with the order of DDP's buckets fixed before the first step."""

    def configure_ddp(self) -> None:
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        fix_buckets(self.model)


def fix_buckets(model: DistributedDataParallel) -> None:
    """Let DDP order its buckets by the parameters, from the last to the first.

    DDP collects gradients in buckets, which it orders once: before the second step, as the gradients arrived in the
    first. Where an element lies in a bucket decides in which order three or more ranks are added, so the first step of
    a resumed run would differ in its last bits from the same step of a run that was never stopped. Here a backward pass
    of zeros takes the place of the first step. Every rank takes part.
    """
    module, parameters = model.module, [p for p in model.module.parameters() if p.requires_grad]

    def zero() -> torch.Tensor:
        return torch.stack([p.sum().float() * 0 for p in parameters]).sum()  # backward begins with the last

    forward = module.forward
    module.forward = zero
    try:
        model().backward()
    finally:
        module.forward = forward
    for parameter in parameters:
        parameter.grad = None

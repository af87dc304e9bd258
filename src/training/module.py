"""The LightningModule: a batch becomes a loss, the model's parameters get their optimizer. Nothing else lives here."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from src.config import RunConfig
from src.model import RWKV7
from src.ops.loss import cross_entropy_l2wrap, linear_cross_entropy_l2wrap
from src.training.optim import MasterAdamW, parameter_groups
from src.training.strategy import Hardware


class TrainingModule(pl.LightningModule):
    """Wraps an RWKV7. `make_dataset(rank, world_size)` gives the samples that a process reads, from the run's position on."""

    def __init__(self, model: RWKV7, config: RunConfig, hardware: Hardware, make_dataset: Any) -> None:
        super().__init__()
        self.model, self.config, self.hardware, self.make_dataset = model, config, hardware, make_dataset
        self.optimizer: MasterAdamW

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        tokens, targets = batch
        hidden, _ = self.model.hidden(tokens)
        if self.config.head_chunk:
            loss = linear_cross_entropy_l2wrap(hidden, self.model.head.weight, targets, self.config.head_chunk)
        else:
            loss = cross_entropy_l2wrap(self.model.head(hidden), targets)
        return {"loss": loss * self.optimizer.loss_scale, "plain_loss": loss.detach()}

    def configure_optimizers(self) -> MasterAdamW:
        c = self.config
        self.optimizer = MasterAdamW(
            parameter_groups(self.model, c.weight_decay),
            lr=c.lr_init,
            betas=(c.beta1, c.beta2),
            eps=c.adam_eps,
            grad_clip=c.grad_clip,
            scale_loss=self.hardware.precision == "fp16",
        )
        return self.optimizer

    @property
    def grad_norm(self) -> Tensor:
        """Global gradient norm of the last step before clipping; not finite when that step was left out."""
        return self.optimizer.grad_norm

    def train_dataloader(self) -> DataLoader:
        dataset: Dataset = self.make_dataset(self.trainer.global_rank, self.trainer.world_size)
        on_gpu = self.hardware.accelerator == "gpu"
        # A sample is a slice of a mapped file: on a CPU a worker process would cost more than it takes off.
        return DataLoader(
            dataset,
            batch_size=self.config.micro_bsz,
            shuffle=False,
            num_workers=1 if on_gpu else 0,
            persistent_workers=on_gpu,
            prefetch_factor=8 if on_gpu else None,
            pin_memory=on_gpu,
            drop_last=True,
        )

    def on_train_start(self) -> None:
        if self.hardware.precision == "tf32":
            torch.set_float32_matmul_precision("high")

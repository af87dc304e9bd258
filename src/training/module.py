"""The LightningModule: a batch becomes a loss, the model's parameters get their optimizer. Nothing else lives here."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from src.config import RunConfig
from src.model import RWKV7
from src.ops.loss import cross_entropy_l2wrap, linear_cross_entropy_l2wrap
from src.training.distributed.process_group import leave_signals_to_the_run
from src.training.distributed.sharded_init import Values, partition
from src.training.distributed.zero import EngineAdamW
from src.training.hardware.selection import Hardware, engine_settings
from src.training.optim import MasterAdamW, parameter_groups

MEASURED_ROWS = 1024  # of a micro batch, where the largest logit is looked for


class HeadLoss(nn.Module):
    """The last step, hidden [B, T, C] to loss, as a module of its own: that is what ZeRO's stage 3 gathers parameters around.

    It uses the model's head without owning it, so that the head's weight has one name.
    """

    def __init__(self, head: nn.Linear, chunk: int) -> None:
        super().__init__()
        self.head, self.chunk = (head,), chunk
        self.measures = False  # whether `largest_logit`, of the first rows of the next batch, is found on the way
        self.largest_logit = torch.full((), math.nan)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy over the targets int64 [B, T] that count, with the gradient of L2Wrap; with `chunk`, so many rows of logits at a time."""
        (head,) = self.head
        if self.measures:
            with torch.no_grad():
                rows = hidden.flatten(0, 1)[:MEASURED_ROWS].split(self.chunk or MEASURED_ROWS)
                self.largest_logit = torch.stack([(part @ head.weight.t()).amax() for part in rows]).amax()
        if self.chunk:
            return linear_cross_entropy_l2wrap(hidden, head.weight, targets, self.chunk)
        return cross_entropy_l2wrap(head(hidden), targets, overwrite=True)


class TrainingModule(pl.LightningModule):
    """Wraps an RWKV7. `make_dataset(rank, world_size)` gives the samples that a process reads, from the run's position on.

    A model that no process holds whole (ZeRO stage 3) comes on the meta device, with `values` to build it from.
    """

    def __init__(
        self,
        model: RWKV7,
        config: RunConfig,
        hardware: Hardware,
        make_dataset: Any,
        collate: Callable[[list[Any]], Any] | None = None,
        values: Callable[[], Values] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.config, self.hardware, self.make_dataset = model, config, hardware, make_dataset
        self.collate = collate
        self.values = values
        self.head_loss = HeadLoss(model.head, config.head_chunk)
        self.optimizer: MasterAdamW | EngineAdamW

    def configure_model(self) -> None:
        if self.values is not None:
            settings = engine_settings(self.config, self.hardware)
            partition(self.model, self.values(), settings, self.hardware.accelerator, self.hardware.dtype)
            self.values = None

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Tensor]:
        """`loss` for backward (scaled where the optimizer scales, fp16), and `plain_loss` for people, without a gradient."""
        tokens, targets, *packed = (
            batch  # packed rows bring the bounds of their documents, and their weight in the step
        )
        hidden, _ = self.model.hidden(tokens, cu_seqlens=packed[0] if packed else None)
        loss = self.head_loss(hidden, targets)
        if packed:
            loss = loss * packed[1]
        return {"loss": loss * self.optimizer.loss_scale, "plain_loss": loss.detach()}

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Loss summed over the tokens of held-out data that count, and their number: float64 [2]."""
        tokens, targets, *packed = batch
        hidden, _ = self.model.hidden(tokens, cu_seqlens=packed[0] if packed else None)
        counted = (targets >= 0).sum().double()
        return torch.stack([self.head_loss(hidden, targets).double() * counted, counted])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """`EngineAdamW` inside a ZeRO engine, else `MasterAdamW`: the same mathematics."""
        c = self.config
        groups = parameter_groups(self.model, c.weight_decay)
        adam: dict[str, Any] = {
            "lr": c.lr_init,
            "betas": (c.beta1, c.beta2),
            "eps": c.adam_eps,
            "grad_clip": c.grad_clip,
        }
        if self.hardware.strategy == "deepspeed":
            self.optimizer = EngineAdamW(groups, **adam)
        else:
            self.optimizer = MasterAdamW(groups, **adam, scale_loss=self.hardware.precision == "fp16")
        return self.optimizer

    @property
    def grad_norm(self) -> Tensor:
        """Global gradient norm of the last step before clipping; not finite when that step was left out."""
        return self.optimizer.grad_norm

    def train_dataloader(self) -> DataLoader:
        """This rank's samples in their order, a micro batch at a time: which they are was settled by `make_dataset`."""
        dataset: Dataset = self.make_dataset(self.trainer.global_rank, self.trainer.world_size)
        on_gpu = self.hardware.accelerator == "gpu"
        # A sample is a slice of a mapped file: on a CPU a worker process would cost more than it takes off.
        return DataLoader(
            dataset,
            batch_size=self.config.micro_bsz,
            shuffle=False,
            collate_fn=self.collate,
            worker_init_fn=leave_signals_to_the_run,
            num_workers=1 if on_gpu else 0,
            # Python's default since 3.14 has a server between: the worker would take its end for the run's, and the run's word for a stranger's
            multiprocessing_context="fork" if on_gpu and sys.platform == "linux" else None,
            persistent_workers=on_gpu,
            prefetch_factor=8 if on_gpu else None,
            pin_memory=on_gpu,
            drop_last=True,
        )

    def on_train_start(self) -> None:
        if self.hardware.precision == "tf32":
            torch.set_float32_matmul_precision("high")

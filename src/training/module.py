"""The LightningModule: a batch becomes a loss through the objective, and the model's parameters get their optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from src.config import RunConfig
from src.model import RWKV7
from src.training.distributed.context_parallel import ContextParallel
from src.training.distributed.engine_adamw import EngineAdamW
from src.training.distributed.sharded_init import NamedTensors, partition
from src.training.hardware.selection import Hardware, captures_steps, engine_settings
from src.training.hardware.step_graph import StepGraph
from src.training.objectives import OBJECTIVES, Objective
from src.training.objectives.segments import Segments
from src.training.optim import MasterAdamW, adam_arguments, parameter_groups


class TrainingModule(pl.LightningModule):
    """Wraps an RWKV7. A partitioned model (ZeRO stage 3) comes on the meta device, with `values` to build it from."""

    def __init__(
        self,
        model: RWKV7,
        config: RunConfig,
        hardware: Hardware,
        values: Callable[[], NamedTensors] | None = None,
        objective: str = "next_token",
    ) -> None:
        super().__init__()
        self.model, self.config, self.hardware = model, config, hardware
        self.values = values
        # a submodule, so that ZeRO's stage 3 finds the module around which it gathers the head's weight
        # of the processes that share samples, each knows the others: a collective
        context = ContextParallel(config.context_parallel) if config.context_parallel > 1 else None
        model.set_context(context)
        segments = Segments(config.chunk_ctx, config.ctx_len, config.bptt, context)
        self.objective: Objective = OBJECTIVES[objective](model.head, config.head_chunk, segments)
        self.optimizer: MasterAdamW | EngineAdamW  # set by Lightning's call of configure_optimizers
        self.captures_steps = captures_steps(config, hardware)
        self.graph: StepGraph | None = None

    def configure_model(self) -> None:
        if self.values is not None:
            settings = engine_settings(self.config, self.hardware)
            partition(self.model, self.values(), settings, self.hardware.accelerator, self.hardware.dtype)
            self.values = None  # Lightning may call this hook again

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Any]:
        """`loss` for backward, scaled where the optimizer scales (fp16), and the objective's `metrics`, without
        gradients. With a CUDA graph backward and the optimizer's step may have been done with it."""
        return self._step(batch) if self.graph is None else self.graph(batch)

    def _step(self, batch: tuple[Tensor, ...]) -> dict[str, Any]:
        loss, metrics = self.objective(self.model, batch)
        return {"loss": loss * self.optimizer.loss_scale, "metrics": metrics}

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Of a loss that `training_step` returned; nothing after a replayed graph, which has done it."""
        if self.graph is None or not self.graph.replayed:
            loss.backward(*args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Lightning calls it between `training_step` and `backward`: after a replay the gradients are there already."""
        if self.graph is None or not self.graph.replayed:
            optimizer.zero_grad()

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Loss summed over the tokens of held-out data that count, and their number: float64 [2]."""
        return self.objective.evaluate(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """`EngineAdamW` inside a ZeRO engine, else `MasterAdamW`: the same mathematics."""
        groups = parameter_groups(self.model, self.config.weight_decay)
        adam = adam_arguments(self.config)
        # the engine computes the gradient norm and calls the optimizer group by group: another class, the same steps
        if self.hardware.strategy == "deepspeed":
            self.optimizer = EngineAdamW(groups, **adam)
        else:
            scale_loss = self.hardware.precision == "fp16"
            self.optimizer = MasterAdamW(groups, **adam, scale_loss=scale_loss, kernel=self.config.kernel)
            if self.captures_steps and self.optimizer.can_be_captured:
                self.graph = StepGraph(self._step, self.optimizer)
        return self.optimizer

    @property
    def grad_norm(self) -> Tensor:
        """Global gradient norm of the last step before clipping; not finite when that step was skipped."""
        return self.optimizer.grad_norm

    def on_train_start(self) -> None:
        if self.hardware.precision == "tf32":
            torch.set_float32_matmul_precision("high")

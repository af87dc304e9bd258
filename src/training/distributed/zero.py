"""DeepSpeed's ZeRO under Lightning, on GPUs and on CPU processes, with this project's optimizer inside the engine.

The engine partitions and communicates. What an optimizer step does (learning rates, clipping, weight decay, skipping a
step) stays in `EngineAdamW` (engine_adamw.py), so that it is the same under every strategy. DeepSpeed is imported when
the first engine is built.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytorch_lightning as pl
import torch
from packaging.requirements import Requirement
from pytorch_lightning.plugins.precision.deepspeed import DeepSpeedPrecision
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from src.model import RWKV7
from src.training.distributed import deepspeed_internals
from src.training.distributed.engine_adamw import EngineAdamW
from src.training.optim import LOSS_SCALE_GROWTH_STEPS, LOSS_SCALE_POWER

# The range that the tests run with; it works without compiling an extension. Older releases (0.19.0) report a gradient
# norm that is not finite as -1, and `EngineAdamW` would take the step. Newer minor releases are untested, and
# deepspeed_internals.py uses attributes that are not part of DeepSpeed's public interface.
REQUIREMENT = "deepspeed>=0.19.8,<0.20"


def version() -> str:
    """The version of the installed DeepSpeed; '' where it is not installed."""
    try:
        return importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return ""


def is_usable() -> bool:
    """Whether the installed DeepSpeed satisfies REQUIREMENT."""
    installed = version()
    # prereleases: a build from source (0.19.9+abc) counts too
    return bool(installed) and Requirement(REQUIREMENT).specifier.contains(installed, prereleases=True)


def takes_fp16(accelerator: str) -> bool:
    """Whether DeepSpeed computes in fp16 on this accelerator: on a CPU only where it has fp16 instructions."""
    if accelerator != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def import_deepspeed(accelerator: str) -> Any:
    """The package `deepspeed`, set up for `accelerator` ("cpu" or "gpu")."""
    # DeepSpeed detects the accelerator once, at its first import, and would take a GPU that the run does not use.
    if accelerator == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # torch warns of a deprecated function at every collective that DeepSpeed calls
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed_internals.leave_out_shm_comm(deepspeed)
    return deepspeed


def engine_settings(
    stage: int, offload: bool, accelerator: str, dtype: torch.dtype, micro_bsz: int, bucket_mb: int
) -> dict[str, Any]:
    """DeepSpeed's configuration for ZeRO stage 1, 2 or 3, with buckets of `bucket_mb` million elements.

    Clipping and overflow checks are off in it: `EngineAdamW` does both on the device.
    """
    on_gpu = accelerator == "gpu"
    bucket = bucket_mb * 1_000_000
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": on_gpu,  # needs CUDA streams
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if offload:
        # pinned memory speeds up copies to and from a GPU; without one it can't be allocated
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    settings = {
        "train_micro_batch_size_per_gpu": micro_bsz,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own CPU Adam would have to be compiled
        "gradient_clipping": 0.0,
    }
    if dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True, "check_grad_overflow": False}
    if dtype == torch.float16:
        settings["fp16"] = {
            "enabled": True,
            "loss_scale": 0,  # dynamic
            "initial_scale_power": LOSS_SCALE_POWER,
            "loss_scale_window": LOSS_SCALE_GROWTH_STEPS,
            "hysteresis": 1,  # the scale is halved at the first overflow, as in MasterAdamW
            "min_loss_scale": 1,
        }
    return settings


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeedStrategy for GPUs and also for CPU processes, which Lightning refuses.

    Its `model` is a DeepSpeedEngine. `settings` as of `engine_settings`.
    """

    def __init__(self, settings: dict[str, Any], accelerator: str) -> None:
        self.deepspeed = import_deepspeed(accelerator)
        super().__init__(
            config=settings,
            precision_plugin=EnginePrecision("32-true"),  # the engine's dtype is in `settings`
            process_group_backend="nccl" if accelerator == "gpu" else "gloo",
            logging_level=logging.ERROR,
        )

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        # Lightning's CPU devices have no index, which DeepSpeed requires.
        self._parallel_devices = devices and [
            torch.device("cpu", i) if device.type == "cpu" else device for i, device in enumerate(devices)
        ]

    def setup_environment(self) -> None:
        # DeepSpeedStrategy's method without its check for CUDA
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        yield  # `partition` (sharded_init.py) builds a partitioned model instead

    def init_deepspeed(self) -> None:
        module = self.lightning_module
        assert module is not None
        super().init_deepspeed()
        if self.zero_stage_3:
            # The chunked loss reads the head's weight without calling the head, whose hooks would gather the weight.
            head = cast(RWKV7, module.model).head
            self.deepspeed.zero.register_external_parameter(module.objective.head_loss, head.weight)  # type: ignore[union-attr]
        zero = self.deepspeed_engine.optimizer
        if isinstance(module.optimizer, EngineAdamW):
            module.optimizer.attach(self.deepspeed_engine)
            if not deepspeed_internals.computes_in_fp16(zero):
                deepspeed_internals.skip_norm_check(zero)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        # asked first: the call below advances the engine's count of micro steps
        ends_step = self.deepspeed_engine.is_gradient_accumulation_boundary()
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        inner = self.deepspeed_engine.optimizer.optimizer
        if ends_step and isinstance(inner, EngineAdamW):
            inner.count_step()
        return result


class EnginePrecision(DeepSpeedPrecision):
    """Keeps the dtypes of the model, and divides the loss by the accumulated micro steps once instead of twice."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def backward(self, tensor: Tensor, model: pl.LightningModule, optimizer: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        assert model.trainer is not None
        # Lightning has divided the loss by the number of accumulated micro steps already.
        model.trainer.strategy.deepspeed_engine.backward(tensor, scale_wrt_gas=False)  # type: ignore[union-attr,attr-defined]

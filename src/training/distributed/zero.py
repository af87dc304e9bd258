"""DeepSpeed's ZeRO under Lightning: the engine on GPUs and on CPU processes, with this project's optimizer inside.

The engine partitions and communicates. What an optimizer step is (learning rates, clipping, decay, skipping a step) stays in
`EngineAdamW`, so that it is the same under every strategy. DeepSpeed is imported when the first engine is built.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from pytorch_lightning.plugins.precision.deepspeed import DeepSpeedPrecision
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from src.model import RWKV7
from src.training.optim import LOSS_SCALE_GROWTH_STEPS, LOSS_SCALE_POWER, adam_state

# What the tests run; nothing of it has to be compiled. Older ones (0.19.0) give -1 for a gradient norm that is not finite, and
# `EngineAdamW` would take the step.
REQUIREMENT = "deepspeed>=0.19.8,<0.20"


def version() -> str:
    """The version of the installed DeepSpeed; '' where there is none."""
    try:
        return importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return ""


def is_usable() -> bool:
    """Whether the installed DeepSpeed satisfies REQUIREMENT."""
    return bool(installed := version()) and Requirement(REQUIREMENT).specifier.contains(installed, prereleases=True)


def takes_fp16(accelerator: str) -> bool:
    """Whether DeepSpeed computes in fp16 on this accelerator: on a CPU only where it has fp16 instructions."""
    if accelerator != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def import_deepspeed(accelerator: str) -> Any:
    """The package, set up for an accelerator, which it detects once, at its first import."""
    if accelerator == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # one deprecation warning of torch for each collective
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # an extension for CPU collectives that gloo replaces; building it takes two minutes
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def engine_settings(
    stage: int, offload: bool, accelerator: str, dtype: torch.dtype, micro_bsz: int, bucket_mb: int
) -> dict[str, Any]:
    """DeepSpeed's configuration. Clipping and overflow checks are off in it: `EngineAdamW` does both on the device."""
    on_gpu = accelerator == "gpu"
    bucket = bucket_mb * 1_000_000
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": on_gpu,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    settings = {
        "train_micro_batch_size_per_gpu": micro_bsz,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
    }
    if dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True, "check_grad_overflow": False}
    if dtype == torch.float16:
        settings["fp16"] = {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": LOSS_SCALE_POWER,
            "loss_scale_window": LOSS_SCALE_GROWTH_STEPS,
            "hysteresis": 1,
            "min_loss_scale": 1,
        }
    return settings


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeedStrategy on GPUs and on CPU processes, which Lightning refuses. Its model is a DeepSpeedEngine."""

    def __init__(self, settings: dict[str, Any], accelerator: str) -> None:
        self.deepspeed = import_deepspeed(accelerator)
        super().__init__(
            config=settings,
            precision_plugin=EnginePrecision("32-true"),
            process_group_backend="nccl" if accelerator == "gpu" else "gloo",
            logging_level=logging.ERROR,
        )

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        """CPU devices get the index that DeepSpeed wants every device to have."""
        self._parallel_devices = devices and [
            torch.device("cpu", i) if device.type == "cpu" else device for i, device in enumerate(devices)
        ]

    def setup_environment(self) -> None:
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        yield  # `partition` (sharded_init.py) replaces Lightning's way to build a partitioned model

    def init_deepspeed(self) -> None:
        module = self.lightning_module
        assert module is not None
        super().init_deepspeed()
        if self.zero_stage_3:  # the chunked loss reads the head's weight without calling the head
            head = cast(RWKV7, module.model).head
            self.deepspeed.zero.register_external_parameter(module.objective.head_loss, head.weight)  # type: ignore[union-attr]
        zero = self.deepspeed_engine.optimizer
        if isinstance(module.optimizer, EngineAdamW):
            module.optimizer.attach(self.deepspeed_engine)
            if zero.dtype != torch.float16:
                _skip_norm_check(zero)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        ends_step = self.deepspeed_engine.is_gradient_accumulation_boundary()
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        inner = self.deepspeed_engine.optimizer.optimizer
        if ends_step and isinstance(inner, EngineAdamW):
            inner.count_step()
        return result


class EnginePrecision(DeepSpeedPrecision):
    """Leaves dtypes as the model has them, and divides the loss by the accumulated micro steps once: Lightning has done it already."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def backward(self, tensor: Tensor, model: pl.LightningModule, optimizer: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        assert model.trainer is not None
        model.trainer.strategy.deepspeed_engine.backward(tensor, scale_wrt_gas=False)  # type: ignore[union-attr,attr-defined]


def _skip_norm_check(zero: Any) -> None:
    """Keep the engine from copying each step's gradient norm to the host to check that it is finite: `EngineAdamW` checks it on the
    device. A DeepSpeed without this function synchronises once a step, which is slower and no less right."""
    module = importlib.import_module(type(zero).__module__)
    if hasattr(module, "is_invalid_grad_norm"):
        module.is_invalid_grad_norm = lambda norm: False  # type: ignore[attr-defined]


class EngineAdamW(torch.optim.AdamW):
    """AdamW inside a ZeRO engine: the mathematics of `MasterAdamW` on this process's fp32 part of the weights.

    The engine calls `step` group by group with flattened parameters, after it has found the global gradient norm. Clipping and the
    decision to skip a step (norm not finite) are taken from that norm on the device, as AdamW's `grad_scale` and `found_inf`.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, grad_clip: float
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.grad_clip = grad_clip
        self.device = groups[0]["params"][0].device
        self.loss_scale = torch.ones((), device=self.device)  # fp16: the engine scales the loss itself
        self._skipped = torch.zeros((), device=self.device)
        self._engine: Any = None

    def attach(self, engine: Any) -> None:
        """Take gradient norms from this engine's ZeRO optimizer."""
        self._engine = engine
        self.zero.loss_scaler.raise_error_at_min_scale = (
            False  # fp16: NonFiniteMonitor says what it means, and the run goes back
        )

    @property
    def zero(self) -> Any:
        """The ZeRO optimizer around this one."""
        return self._engine.optimizer

    @property
    def grad_norm(self) -> Tensor:
        """Global gradient norm of the last step before clipping; infinite when that step was skipped."""
        norm = getattr(self.zero, "_global_grad_norm", None)
        return torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32, device=self.device)

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps were skipped: here, and by the engine (fp16) before it came here."""
        return self._skipped + self._engine.skipped_steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        assert closure is None, "the engine has run backward already"
        norm = self.grad_norm
        clip = self.grad_clip / (norm + 1e-6) if self.grad_clip else torch.ones_like(norm)
        weights_device = next(
            p.device for group in self.param_groups for p in group["params"]
        )  # the CPU when offloaded
        self.grad_scale = (1.0 / clip.clamp(max=1.0)).to(weights_device)
        self.found_inf = (~torch.isfinite(norm)).float().to(weights_device)
        return super().step()

    def count_step(self) -> None:
        """At the end of a step of all groups."""
        if self.zero.dtype != torch.float16:
            self._skipped += ~torch.isfinite(self.grad_norm)

    # ---- the state by parameter, of which this process holds a part -----------------------------------------------------------

    def part_of(self, parameter: nn.Parameter) -> Part | None:
        """Where this process's part of a parameter is; None when it holds none of it."""
        zero = self.zero
        if hasattr(parameter, "ds_id"):  # stage 3: every parameter in equal parts, the last one padded
            group, offset, count = zero.grad_position[zero.get_param_id(parameter)]
            start = count * dist.get_rank()
            count = min(count, parameter.ds_numel - start)  # type: ignore[attr-defined]
            return Part(zero.fp32_partitioned_groups_flat[group], offset, start, count) if count > 0 else None
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # stages 1, 2: a group in equal parts
        if mapping is None:
            return None
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        inside, own = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
        return Part(flat, inside.start, own.start, own.numel)

    def tensor_of(self, part: Part, kind: str) -> Tensor:
        """The part of `master`, `exp_avg` or `exp_avg_sq` [count], fp32; zeros before the first step."""
        whole = part.flat if kind == "master" else adam_state(self, part.flat)[kind]
        return whole.detach().narrow(0, part.offset, part.count)

    def _flats(self) -> list[nn.Parameter]:
        zero = self.zero
        return zero.fp32_partitioned_groups_flat if _is_stage_3(zero) else zero.single_partition_of_fp32_groups

    def flats_by_group(self) -> Iterator[tuple[int, nn.Parameter]]:
        """(number of its group, fp32 weights) of what this process keeps, padding included."""
        zero = self.zero
        for i, flat in enumerate(self._flats()):
            yield (zero.sub_group_to_group_id[i] if _is_stage_3(zero) else i), flat

    def counters(self) -> dict[str, float]:
        """The numbers that belong to no parameter, the same as `MasterAdamW`'s."""
        scaler = self.zero.loss_scaler
        return {
            "adam_steps": adam_state(self, self._flats()[0])["step"].item(),
            "skipped_steps": self.skipped_steps.item(),
            "loss_scale": float(scaler.cur_scale),
            "good_steps": float(getattr(scaler, "cur_iter", 0) - getattr(scaler, "last_overflow_iter", 0)),
        }

    def load_counters(self, counters: dict[str, float]) -> None:
        """Sets what `counters` gave, of this class or of `MasterAdamW`."""
        for flat in self._flats():
            adam_state(self, flat)["step"].fill_(counters["adam_steps"])
        self._skipped.fill_(counters["skipped_steps"])
        scaler = self.zero.loss_scaler
        if hasattr(scaler, "last_overflow_iter") and "loss_scale" in counters:  # fp16
            scaler.cur_scale = counters["loss_scale"]
            scaler.last_overflow_iter = scaler.cur_iter - int(counters["good_steps"])

    @torch.no_grad()
    def round_masters_into_parameters(self) -> None:
        """After masters were set from outside: the model's own copies, in its dtype, follow. Every rank takes part."""
        zero = self.zero
        if not _is_stage_3(zero):
            zero.update_lp_params()
            return
        for i in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(i)
        if zero.persistent_parameters:  # small ones that every process keeps whole
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


@dataclass(frozen=True)
class Part:
    """`count` values of a parameter from `start` on, which this process keeps in `flat` from `offset` on."""

    flat: nn.Parameter
    offset: int
    start: int
    count: int


def _is_stage_3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")

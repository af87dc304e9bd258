"""Where a run computes: device, number format, how processes share the work."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from src.config import RunConfig
from src.dataset.workers import usable_cores
from src.errors import UserError
from src.training.distributed import zero
from src.training.distributed.launch import rank_from_launcher
from src.training.hardware.cpu_precision import cpu_precision

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Hardware:
    """What the flags and the machine come to. `notes` is what the user should know about it."""

    accelerator: str  # cpu | gpu
    devices: int  # processes on this machine
    num_nodes: int
    precision: str
    strategy: str  # plain (one process) | ddp | deepspeed
    stage: int = 0  # of ZeRO, under deepspeed
    offload: bool = False
    notes: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and activations; the optimizer keeps fp32 masters beside lower ones."""
        return DTYPES[self.precision]

    @property
    def device_type(self) -> str:
        """As torch names it: cuda (AMD's GPUs too) or cpu."""
        return "cuda" if self.accelerator == "gpu" else "cpu"

    @property
    def device_name(self) -> str:
        """The GPU's name, or the threads of the CPU."""
        if self.accelerator == "gpu":
            return torch.cuda.get_device_name()
        return f"CPU, {(count := torch.get_num_threads())} thread{'s' * (count > 1)}"

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes

    @property
    def description(self) -> str:
        if self.strategy == "plain":
            return "1 process"
        how = "DDP" if self.strategy == "ddp" else f"DeepSpeed ZeRO {self.stage}" + ", offloaded" * self.offload
        return f"{self.world_size} process{'es' * (self.world_size > 1)} ({how})"

    @property
    def is_partitioned(self) -> bool:
        """No process holds the whole model: it is built parameter by parameter when the processes are there."""
        return self.strategy == "deepspeed" and self.stage == 3


def choose_hardware(config: RunConfig) -> Hardware:
    """Raises ValueError naming the flag when the machine can't give what is asked for."""
    cuda = torch.cuda.is_available()
    if config.accelerator == "gpu" and not cuda:
        why = (
            f"this torch ({torch.__version__}) is built without CUDA or ROCm; install a build that has it"
            if torch.version.cuda is None and torch.version.hip is None
            else "torch sees none; `nvidia-smi` (or `rocm-smi`) tells whether the driver does"
        )
        raise UserError(f"--accelerator gpu: no GPU can be used: {why}, or train with --accelerator cpu")
    accelerator = "gpu" if config.accelerator == "gpu" or (config.accelerator == "auto" and cuda) else "cpu"
    notes: list[str] = []
    devices, num_nodes = _processes(config, accelerator)
    if accelerator == "gpu" and devices > torch.cuda.device_count():
        raise UserError(f"--devices {devices}: expected at most {torch.cuda.device_count()}, the GPUs that torch sees")
    if accelerator == "cpu" and devices > (cores := usable_cores()) and rank_from_launcher(os.environ) is None:
        notes.append(
            f"--devices {devices}: this machine lets them use {cores} core{'s' * (cores > 1)}, which they share; with --devices {cores} "
            "each has its own"
        )
    strategy, stage, offload = _sharing(config, devices * num_nodes, accelerator, notes)
    precision = config.precision or ("bf16" if accelerator == "gpu" else "")
    if precision == "fp16":
        notes.append("--precision fp16 overflows easily; bf16 is what RWKV-7 is trained in")
        if strategy == "deepspeed" and not zero.takes_fp16(accelerator):
            raise UserError(
                f"--precision fp16: DeepSpeed (--strategy {config.strategy}) doesn't compute in it on this CPU; use bf16 or fp32, or "
                "--strategy ddp"
            )
    if precision == "bf16" and accelerator == "cpu":
        notes.append("--precision bf16 may be slower than fp32 on this CPU; without the flag that is measured")
    if not precision:
        precision, note = cpu_precision(config, devices * num_nodes)
        notes += [note] if note else []
    return Hardware(accelerator, devices, num_nodes, precision, strategy, stage, offload, tuple(notes))


def _processes(config: RunConfig, accelerator: str) -> tuple[int, int]:
    """Processes per machine, and machines: as the launcher says where there is one."""
    if place := rank_from_launcher(os.environ):
        devices, num_nodes = place.local_world_size, place.world_size // place.local_world_size
        for flag, given, found in (
            ("devices", config.devices, devices),
            ("num_nodes", str(config.num_nodes), num_nodes),
        ):
            if given not in ("1", "auto", str(found)):
                raise UserError(
                    f"--{flag} {given}: the launcher started {found}; leave the flag out, or start as many ({place.world_size} "
                    "processes in all)"
                )
        return devices, num_nodes
    if config.devices == "auto":
        return (torch.cuda.device_count() if accelerator == "gpu" else 1), config.num_nodes
    return int(config.devices), config.num_nodes


def _sharing(config: RunConfig, processes: int, accelerator: str, notes: list[str]) -> tuple[str, int, bool]:
    """plain | ddp | deepspeed, ZeRO stage, offload. ZeRO cuts state into as many parts as there are processes, so one process needs
    it only to keep state in the CPU's memory instead of the GPU's."""
    if not config.strategy.startswith("deepspeed"):
        return ("ddp" if processes > 1 else "plain"), 0, False
    stage, offload = int(config.strategy[len("deepspeed_stage_")]), config.strategy.endswith("_offload")
    if processes == 1 and not (offload and accelerator == "gpu"):
        notes.append(f"--strategy {config.strategy}: one process needs no DeepSpeed; the plain strategy is used")
        return "plain", 0, False
    if not zero.is_usable():
        here = (
            f"deepspeed {found} can't be used here" if (found := zero.version()) else "the package deepspeed is missing"
        )
        raise UserError(
            f"--strategy {config.strategy}: {here}; pip install '{zero.REQUIREMENT}', or use --strategy ddp"
        )
    return "deepspeed", stage, offload


def engine_settings(config: RunConfig, hardware: Hardware) -> dict[str, Any]:
    """DeepSpeed's configuration for this run."""
    return zero.engine_settings(
        hardware.stage, hardware.offload, hardware.accelerator, hardware.dtype, config.micro_bsz, config.ds_bucket_mb
    )


def lightning_strategy(config: RunConfig, hardware: Hardware) -> Any:
    """For Lightning's Trainer, with every process there already."""
    if hardware.strategy == "plain":
        return "auto"
    if hardware.strategy == "deepspeed":
        return zero.ZeroStrategy(engine_settings(config, hardware), hardware.accelerator)
    from pytorch_lightning.strategies import DDPStrategy

    return DDPStrategy(
        process_group_backend="nccl" if hardware.accelerator == "gpu" else "gloo",
        gradient_as_bucket_view=True,
    )

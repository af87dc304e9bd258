"""Where a run computes: device, number format, how processes share the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from src.config import RunConfig

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Hardware:
    """What the flags and the machine come to. `notes` is what the user should know about it."""

    accelerator: str  # cpu | gpu
    devices: int  # processes on this machine
    num_nodes: int
    precision: str
    strategy: Any  # for Lightning's Trainer
    notes: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and activations; the optimizer keeps fp32 masters beside lower ones."""
        return DTYPES[self.precision]

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes


def choose_hardware(config: RunConfig) -> Hardware:
    """Raises ValueError naming the flag when the machine can't give what is asked for."""
    cuda = torch.cuda.is_available()
    if config.accelerator == "gpu" and not cuda:
        why = (
            f"this torch ({torch.__version__}) is built without CUDA or ROCm; install a build that has it"
            if torch.version.cuda is None and torch.version.hip is None
            else "torch sees none; `nvidia-smi` (or `rocm-smi`) tells whether the driver does"
        )
        raise ValueError(f"--accelerator gpu: no GPU can be used: {why}, or train with --accelerator cpu")
    accelerator = "gpu" if config.accelerator == "gpu" or (config.accelerator == "auto" and cuda) else "cpu"
    notes = []
    if config.devices == "auto":
        devices = torch.cuda.device_count() if accelerator == "gpu" else 1
    else:
        devices = int(config.devices)
        if accelerator == "gpu" and devices > torch.cuda.device_count():
            raise ValueError(
                f"--devices {devices}: expected at most {torch.cuda.device_count()}, the GPUs that torch sees"
            )
    precision = config.precision or ("bf16" if accelerator == "gpu" else "fp32")
    if precision == "fp16":
        notes.append("--precision fp16 overflows easily; bf16 is what RWKV-7 is trained in")
    if precision == "bf16" and accelerator == "cpu" and not config.precision:
        notes.append("bf16 on a CPU is slower than fp32 on most machines")

    processes = devices * config.num_nodes
    strategy: Any = "auto"
    if config.strategy.startswith("deepspeed"):
        if processes > 1:
            raise ValueError(
                f"--strategy {config.strategy} with {processes} processes: DeepSpeed is not built in yet; use --strategy ddp"
            )
        notes.append(f"--strategy {config.strategy}: one process needs no DeepSpeed; the plain strategy is used")
    elif processes > 1:
        from pytorch_lightning.strategies import DDPStrategy

        backend = "nccl" if accelerator == "gpu" else "gloo"
        strategy = DDPStrategy(process_group_backend=backend, gradient_as_bucket_view=True)
    return Hardware(accelerator, devices, config.num_nodes, precision, strategy, tuple(notes))

"""Chooses what a run computes on: device, precision, and how the processes share the work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from src.adapt.config import adapter_of
from src.config import ENDPOINT, PLAIN_KERNELS, RunConfig, kind_of_training, refusal
from src.dataset.workers import usable_cores
from src.errors import UserError
from src.ops.devices import default_precision, device_name, find_device
from src.training.distributed import zero
from src.training.distributed.ddp import OrderedDDPStrategy
from src.training.distributed.ranks import cluster_environment, is_supervised
from src.training.hardware.cpu_precision import cpu_precision

# tf32 stores fp32: it changes only how products are computed (TrainingModule.on_train_start)
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Hardware:
    """What a run computes on, as the flags and the machine determine it. `notes` are for the user."""

    accelerator: str  # cpu | gpu | another device type of torch, such as mps
    devices: int  # processes on this machine
    num_nodes: int
    precision: str
    strategy: str  # plain (one process) | ddp | deepspeed
    stage: int = 0  # of ZeRO, under deepspeed
    offload: bool = False
    notes: tuple[str, ...] = ()
    context_parallel: int = 1  # so many processes share each sample

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and activations; below fp32 the optimizer keeps fp32 master weights."""
        return DTYPES[self.precision]

    @property
    def device_type(self) -> str:
        """torch's name: cuda (for AMD's GPUs too), cpu, mps, ..."""
        return "cuda" if self.accelerator == "gpu" else self.accelerator

    @property
    def device_name(self) -> str:
        """The GPU's name, or the number of threads on a CPU."""
        if self.accelerator != "cpu":
            return device_name(self.device_type)
        return f"CPU, {(count := torch.get_num_threads())} thread{'s' * (count > 1)}"

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes

    @property
    def data_parallel_size(self) -> int:
        """The number of processes, or of groups of them, that read different samples."""
        return self.world_size // self.context_parallel

    @property
    def description(self) -> str:
        """Number of processes and their strategy, for summaries: "4 processes (DDP)"."""
        if self.strategy == "plain":
            return "1 process"
        strategy = "DDP" if self.strategy == "ddp" else f"DeepSpeed ZeRO {self.stage}" + ", offloaded" * self.offload
        if self.context_parallel > 1:
            strategy += f", {self.context_parallel} share a sample"
        return f"{self.world_size} process{'es' * (self.world_size > 1)} ({strategy})"

    @property
    def is_partitioned(self) -> bool:
        """Whether no process holds the whole model: it is then built parameter by parameter in the process group."""
        return self.strategy == "deepspeed" and self.stage == 3


def choose_hardware(config: RunConfig) -> Hardware:
    """The hardware for these flags on this machine. Raises UserError when the machine lacks what they ask for."""
    accelerator = _choose_accelerator(config)
    notes: list[str] = []
    # the strategy follows from the number of processes, and the precision from both
    devices, num_nodes = _processes(config, accelerator)
    if accelerator == "gpu" and devices > (visible := torch.cuda.device_count()):
        raise UserError(flag="devices", given=devices, expected=f"at most {visible}, the GPUs that torch sees")
    # under a launcher the count may be of those that this process was given, not of the machine's
    is_ours = is_supervised(os.environ) or cluster_environment() is None
    if accelerator == "cpu" and devices > (cores := usable_cores()) and is_ours:
        notes.append(
            f"--devices {devices}: only {cores} core{'s' * (cores > 1)} can be used, which the processes share; "
            f"--devices {cores} gives each its own"
        )
    if accelerator not in ("cpu", "gpu") and devices * num_nodes > 1:
        flag, given = ("devices", devices) if devices > 1 else ("num_nodes", num_nodes)
        raise UserError(flag=flag, given=given, expected=f"1 with --accelerator {accelerator}")
    shared_by = config.context_parallel
    if devices * num_nodes % shared_by:
        raise UserError(
            f"{devices * num_nodes} processes can't be divided into groups of so many",
            flag="context_parallel",
            given=shared_by,
            expected="a divisor of the number of processes (--devices, --num_nodes)",
        )
    strategy, stage, offload = _choose_strategy(config, devices * num_nodes, accelerator, notes)
    precision = _choose_precision(config, devices * num_nodes, accelerator, strategy, notes)
    shared = {"plain": "one process", "ddp": "DDP"}.get(strategy, f"ZeRO {stage}")
    for base in (precision, config.quant):
        if row := refusal(kind_of_training(config), base, shared):
            raise row.error(getattr(config, row.flag))
    hardware = Hardware(
        accelerator, devices, num_nodes, precision, strategy, stage, offload, tuple(notes), config.context_parallel
    )
    captures_steps(config, hardware)  # raises where --cuda_graph can't have what it asks for
    return hardware


def captures_steps(config: RunConfig, hardware: Hardware) -> bool:
    """Whether this run's steps are captured. Raises UserError where --cuda_graph on asks for what can't be."""
    reason = _why_not(config, hardware)
    if config.cuda_graph == "on" and reason:
        raise UserError(
            reason, flag="cuda_graph", given="on", advice="use auto, which captures the steps of runs that allow it"
        )
    return config.cuda_graph != "off" and not reason


def _why_not(config: RunConfig, hardware: Hardware) -> str:
    """What keeps the steps of a run from being captured; '' where nothing does."""
    for hinders, reason in (
        (hardware.device_type != "cuda", "only an NVIDIA GPU has CUDA graphs"),
        (torch.version.hip is not None, "not tried on AMD's GPUs"),
        (hardware.strategy != "plain", "several processes exchange gradients within a step"),
        (config.accumulate_grad_batches > 1, "a step of several micro batches isn't captured"),
        (config.data_type == "sft" or config.document_states, "the number of documents changes from step to step"),
        (bool(config.chunk_ctx), "a sample in pieces is several passes"),
        (bool(config.lora_dropout), "dropout is seeded before each step"),
        (bool(config.encoder), "the number of pictures or sounds changes from step to step"),
        (config.kernel in PLAIN_KERNELS, f"--kernel {config.kernel} waits for the device"),
        (hardware.precision == "fp16", "the loss scale of fp16 changes the loss from step to step"),
    ):
        if hinders:
            return reason
    return ""


def _choose_accelerator(config: RunConfig) -> str:
    """cpu | gpu | another device type."""
    if config.accelerator not in ("auto", "cpu", "gpu"):
        return find_device(config.accelerator, "accelerator").type
    is_available = torch.cuda.is_available()
    if config.accelerator == "gpu" and not is_available:
        if torch.version.cuda is None and torch.version.hip is None:
            problem = f"this torch ({torch.__version__}) is built without CUDA and ROCm"
            advice = "install a build with one of them, or train with --accelerator cpu"
        else:
            problem = "torch finds no GPU"
            advice = "check the driver with `nvidia-smi` (or `rocm-smi`), or train with --accelerator cpu"
        raise UserError(problem, flag="accelerator", given="gpu", advice=advice)
    return "gpu" if config.accelerator == "gpu" or (config.accelerator == "auto" and is_available) else "cpu"


def count_processes(config: RunConfig) -> tuple[int, int]:
    """(processes per machine, machines) that a start without a launcher asks for."""
    return _processes(config, _choose_accelerator(config))


def meeting_point(environment: Mapping[str, str], num_nodes: int) -> str:
    """HOST:PORT of the first of several machines that are started by hand, where --rdzv_endpoint doesn't tell it."""
    address, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    endpoint = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    if not ENDPOINT.fullmatch(endpoint):
        raise UserError(
            f"MASTER_ADDR is {address!r} and MASTER_PORT {port!r} in the environment",
            flag="num_nodes",
            given=num_nodes,
            expected="without a launcher, a place where the nodes meet",
            advice="give --rdzv_endpoint HOST:PORT of one of them, or start the run with torchrun, srun or deepspeed",
        )
    return endpoint


def _processes(config: RunConfig, accelerator: str) -> tuple[int, int]:
    """(processes per machine, machines): what a launcher has started, else what the flags say."""
    if launched := cluster_environment():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = launched.world_size() // devices
        for flag, given, started in (
            ("devices", config.devices, devices),
            ("num_nodes", config.num_nodes, num_nodes),
        ):
            # the number of processes is the launcher's: another one in a flag is a mistake that would change the batch
            is_elastic = flag == "num_nodes" and config.fewest_nodes <= started <= config.most_nodes
            if given not in ("1", "auto", str(started)) and not is_elastic:  # 1 is the default: it was not given
                raise UserError(
                    f"the launcher started {started}",
                    flag=flag,
                    given=given,
                    advice=f"leave the flag out, or start as many ({launched.world_size()} processes run in total)",
                )
        return devices, num_nodes
    if config.devices == "auto":
        # one process on a CPU: torch's threads use all of its cores
        return (torch.cuda.device_count() if accelerator == "gpu" else 1), config.most_nodes
    return int(config.devices), config.most_nodes


def with_global_batch(config: RunConfig, hardware: Hardware) -> tuple[RunConfig, list[str]]:
    """With --num_nodes FEWEST:MOST: the accumulated micro batches that give, on the processes there are, the global
    batch of MOST nodes, or the nearest to it; and a message where it isn't the same."""
    if config.fewest_nodes == config.most_nodes:
        return config, []
    micro_batches = config.most_nodes * hardware.devices * config.accumulate_grad_batches
    fewer = max(1, micro_batches // hardware.world_size)
    accumulate = min(fewer, fewer + 1, key=lambda n: abs(n * hardware.world_size - micro_batches))
    wanted, got = (
        n * config.micro_bsz // config.context_parallel for n in (micro_batches, accumulate * hardware.world_size)
    )
    note = f"the global batch is {got} samples: {hardware.world_size} processes can't share {wanted}"
    return replace(config, accumulate_grad_batches=accumulate), [note] if wanted != got else []


def with_length(config: RunConfig, batches: int) -> RunConfig:
    """`config` for a run of so many batches of each process; 0: as it is. With --plan the flags say how many
    processes, otherwise what is started."""
    if not batches:
        return config
    if config.plan >= 0 and config.devices.isdecimal():
        devices, num_nodes = int(config.devices), config.most_nodes
    else:
        devices, num_nodes = count_processes(config)
        # the length of an elastic run doesn't depend on the machines that are there at a start
        num_nodes = config.most_nodes if config.fewest_nodes < config.most_nodes else num_nodes
    readers = devices * num_nodes // config.context_parallel  # of different samples
    return replace(config, my_exit_tokens=batches * config.micro_bsz * config.ctx_len * readers)


def _choose_strategy(config: RunConfig, processes: int, accelerator: str, notes: list[str]) -> tuple[str, int, bool]:
    """(plain | ddp | deepspeed, ZeRO stage, offload)."""
    if not config.strategy.startswith("deepspeed"):
        return ("ddp" if processes > 1 else "plain"), 0, False
    stage, offload = int(config.strategy[len("deepspeed_stage_")]), config.strategy.endswith("_offload")
    # ZeRO splits state between processes: a single one needs it only to keep state in CPU memory instead of the GPU's
    if processes == 1 and not (offload and accelerator == "gpu"):
        notes.append(f"--strategy {config.strategy}: DeepSpeed is not needed for one process and is not used")
        return "plain", 0, False
    if not zero.is_usable():
        installed = zero.version()
        raise UserError(
            f"deepspeed {installed} can't be used" if installed else "the package deepspeed is missing",
            flag="strategy",
            given=config.strategy,
            advice=f"pip install '{zero.REQUIREMENT}', or use --strategy ddp",
        )
    return "deepspeed", stage, offload


def _choose_precision(config: RunConfig, processes: int, accelerator: str, strategy: str, notes: list[str]) -> str:
    """--precision, else what suits the device."""
    precision = config.precision
    if not precision and accelerator != "cpu":
        precision = default_precision("cuda" if accelerator == "gpu" else accelerator)
    if precision == "fp16":
        notes.append("--precision fp16 overflows easily; RWKV-7 is usually trained in bf16")
        if strategy == "deepspeed" and not zero.takes_fp16(accelerator):
            raise UserError(
                f"DeepSpeed (--strategy {config.strategy}) does not support it on this CPU",
                flag="precision",
                given="fp16",
                advice="use bf16 or fp32, or --strategy ddp",
            )
    if precision == "bf16" and accelerator == "cpu":
        notes.append(
            "--precision bf16 may be slower than fp32 on this CPU; without the flag, a short measurement decides"
        )
    if not precision:
        precision, note = cpu_precision(config, processes)
        notes += [note] if note else []
    return precision


def engine_settings(config: RunConfig, hardware: Hardware) -> dict[str, Any]:
    """DeepSpeed's configuration for this run."""
    dtype = engine_dtype(config, hardware)
    return zero.engine_settings(
        hardware.stage, hardware.offload, hardware.accelerator, dtype, config.micro_bsz, config.ds_bucket_mb
    )


def engine_dtype(config: RunConfig, hardware: Hardware) -> torch.dtype:
    """The dtype that an engine converts a model to, and what it trains has to be in.

    Adapters are fp32 beside a base of any dtype, and an engine of fp32 leaves the base as it is. Norms and vectors
    that are trained beside them have the base's dtype, and so has everything that is trained then.
    """
    adapter = adapter_of(config)
    is_fp32 = adapter is not None and not adapter.train
    return torch.float32 if is_fp32 else hardware.dtype


def lightning_strategy(config: RunConfig, hardware: Hardware) -> Any:
    """The `strategy` of Lightning's Trainer. Every process is running already: no strategy has to start any."""
    if hardware.accelerator not in ("cpu", "gpu"):
        from src.training.hardware.lightning_accelerator import single_device

        return single_device(hardware.device_type)
    if hardware.strategy == "plain":
        return "auto"
    if hardware.strategy == "deepspeed":
        return zero.ZeroStrategy(engine_settings(config, hardware), hardware.accelerator)
    return OrderedDDPStrategy(
        process_group_backend="nccl" if hardware.accelerator == "gpu" else "gloo",
        gradient_as_bucket_view=True,  # without it every gradient exists twice
        broadcast_buffers=False,  # those of a quantised base, which every process makes itself and which never change
    )

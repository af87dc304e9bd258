"""What a full state holds, by parameter name: one format for every strategy and any number of processes.

Per trained parameter: `master` (fp32 weights), `exp_avg` and `exp_avg_sq` (Adam's moments, fp32); per idle one (layer
0's value residual, never trained): `idle`. Of an adapted model's frozen base nothing: its file is there. Under ZeRO
each process holds partitions; they pass through rank 0 tensor by tensor, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from src.config import ModelConfig
from src.model import RWKV7
from src.training.checkpoint.storage import DamagedStateError
from src.training.console import is_rank_zero
from src.training.distributed.engine_adamw import EngineAdamW
from src.training.distributed.sharded_init import gathered
from src.training.module import TrainingModule
from src.training.optim import MasterAdamW

Shard = dict[str, Tensor]
KINDS = ("master", "exp_avg", "exp_avg_sq")
# names of fields in states of format version 1
OLD_POSITION_NAMES = {"unit": "mini_epoch_samples", "holes": "skipped_samples"}


@dataclass
class Position:
    """Where a run is between two steps: all numbers, since the order of the data is a pure function of the sample
    number."""

    step: int  # steps taken
    samples: int  # samples read
    mini_epoch_samples: int  # samples of a mini-epoch
    restarted_at_sample: int = 0  # where a fresh optimizer began on trained weights, for the warm-up; 0: never
    mini_epoch_losses: list[float] = field(default_factory=list)  # of the steps since the last mini-epoch's end
    skipped_samples: list[tuple[int, int]] = field(default_factory=list)  # left out for good: (first, count)
    weights_written: bool = False  # whether there was a rwkv-N.pth already


@dataclass(frozen=True)
class SavedState:
    """The part of a full state that is no tensor."""

    position: Position
    settings: dict[str, Any]
    counters: dict[str, float]  # of the optimizer
    saved_at: float  # time.time()

    def payload(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> SavedState:
        """What `payload` gave, of this or an earlier format version. Raises DamagedStateError when it is malformed."""
        try:
            position = {OLD_POSITION_NAMES.get(name, name): value for name, value in payload["position"].items()}
            known = {column.name for column in fields(Position)}  # a later version may have added some
            restored = Position(**{name: value for name, value in position.items() if name in known})
            if "weights_written" not in position:  # the first versions did not record it
                restored.weights_written = restored.samples >= restored.mini_epoch_samples
            restored.skipped_samples = [(int(first), int(count)) for first, count in restored.skipped_samples]
            restored.mini_epoch_losses = [float(loss) for loss in restored.mini_epoch_losses]
            counters = {str(name): float(value) for name, value in payload["counters"].items()}
            return cls(restored, dict(payload["settings"]), counters, float(payload["saved_at"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedStateError(f"state.json is malformed ({type(error).__name__}: {error})") from error


def gather_full_state(module: pl.LightningModule) -> Iterator[tuple[str, Tensor]]:
    """(name/kind, tensor) of each parameter on rank 0, on its device. Other ranks take part and have to go through all
    of it too; what they get is of no use."""
    assert isinstance(module, TrainingModule)
    optimizer = module.optimizer
    for name, parameter in held_parameters(module.model).items():
        if not parameter.requires_grad:
            yield f"{name}/idle", whole(parameter)
            continue
        for kind in KINDS:
            yield f"{name}/{kind}", _gathered(optimizer, parameter, kind)


def held_parameters(model: RWKV7) -> dict[str, nn.Parameter]:
    """The parameters that a state holds, by name: all but an adapted model's frozen base."""
    return {name: p for name, p in model.named_parameters() if name not in model.frozen_base}


def _gathered(optimizer: MasterAdamW | EngineAdamW, parameter: nn.Parameter, kind: str) -> Tensor:
    if isinstance(optimizer, EngineAdamW):
        return _collect(optimizer, parameter, kind)
    return optimizer.master_of(parameter).detach() if kind == "master" else optimizer.moments(parameter)[kind]


@torch.no_grad()
def scatter_full_state(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    shards: Iterable[Shard],
    counters: dict[str, float],
) -> None:
    """Put back what `gather_full_state` gave, in one pass over `shards`, of which only rank 0's are used, and the
    optimizer's `counters`.

    Every rank takes part. Raises DamagedStateError, on every rank, when rank 0's shards do or when a tensor is missing.
    """
    assert isinstance(module, TrainingModule)
    optimizer = module.optimizer
    parameters = held_parameters(module.model)
    missing = {
        f"{name}/{kind}"
        for name, parameter in parameters.items()
        for kind in (KINDS if parameter.requires_grad else ("idle",))
    }
    for key, tensor in _from_rank_zero(trainer, shards, set(missing), parameters):
        name, kind = key.rsplit("/", 1)
        parameter = parameters[name]
        if kind == "idle":
            _set_whole(parameter, tensor)
        elif isinstance(optimizer, EngineAdamW):
            if part := optimizer.part_of(parameter):
                optimizer.tensor_of(part, kind).copy_(tensor.flatten().narrow(0, part.start, part.count))
        elif kind == "master":
            optimizer.master_of(parameter).copy_(tensor)
            parameter.copy_(tensor)
        else:
            optimizer.moments(parameter)[kind].copy_(tensor)
        missing.discard(key)
    if missing:
        raise DamagedStateError(f"{min(missing)} is missing")
    if isinstance(optimizer, EngineAdamW):
        optimizer.round_masters_into_parameters()
    optimizer.load_counters(counters)


def weights_of_state(shards: Iterable[Shard], sizes: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The plain weights in `dtype` of a model of these sizes, from a full state's shards. Raises DamagedStateError when
    one is missing."""
    weights = {}
    for shard in shards:
        for key, tensor in shard.items():
            name, kind = key.rsplit("/", 1)
            if kind in ("master", "idle"):
                weights[name] = tensor.to(dtype)
    with torch.device("meta"):
        names = list(RWKV7(sizes).state_dict())
    if missing := [name for name in names if name not in weights]:
        raise DamagedStateError(f"{missing[0]} is missing")
    return {name: weights[name] for name in names}


def gather_adapter(module: TrainingModule) -> dict[str, Tensor] | None:
    """What an adapted model has beside its frozen base, fp32 on the CPU, on rank 0; None on the others, which take
    part."""
    tensors = {}
    for name, parameter in held_parameters(module.model).items():
        trained = parameter.requires_grad
        tensor = _gathered(module.optimizer, parameter, "master") if trained else whole(parameter)
        if is_rank_zero():
            tensors[name] = tensor.to("cpu", torch.float32, copy=True)
    return tensors if is_rank_zero() else None


def adapter_of_state(shards: Iterable[Shard]) -> dict[str, Tensor]:
    """What `gather_adapter` gives, from a full state's shards."""
    entries = [(key.rsplit("/", 1), tensor) for shard in shards for key, tensor in shard.items()]
    return {name: tensor.float() for (name, kind), tensor in entries if kind in ("master", "idle")}


def gather_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """The model's state dict on the CPU, in the run's precision, on rank 0; None on the others, which take part (stage
    3)."""
    weights = {}
    for name, parameter in model.named_parameters():
        tensor = whole(parameter)
        if is_rank_zero():
            weights[name] = tensor.to("cpu").contiguous()
    return weights if is_rank_zero() else None


def _from_rank_zero(
    trainer: pl.Trainer, shards: Iterable[Shard], wanted: set[str], parameters: dict[str, nn.Parameter]
) -> Iterator[tuple[str, Tensor]]:
    """Each wanted (name/kind, tensor) of rank 0's shards, on every rank."""
    iterator = iter(shards)
    if trainer.world_size == 1:
        while (shard := _next_shard(iterator, wanted, parameters)) is not None:
            yield from shard.items()
        return
    device = trainer.strategy.root_device
    while True:
        shard = None
        announced: list[str] | DamagedStateError | None = None
        if is_rank_zero():
            try:
                shard = _next_shard(iterator, wanted, parameters)
                announced = None if shard is None else list(shard)
            except DamagedStateError as error:  # has to reach the ranks that wait for the next tensor
                announced = error
        announced = trainer.strategy.broadcast(announced)
        if isinstance(announced, DamagedStateError):
            raise announced
        if announced is None:
            return
        for key in announced:
            parameter = parameters[key.rsplit("/", 1)[0]]
            dtype = parameter.dtype if key.endswith("/idle") else torch.float32
            if shard is None:
                tensor = torch.empty(_whole_shape(parameter), dtype=dtype, device=device)
            else:
                tensor = shard[key].to(device, dtype)
            dist.broadcast(tensor, src=0)
            yield key, tensor


def _next_shard(iterator: Iterator[Shard], wanted: set[str], parameters: dict[str, nn.Parameter]) -> Shard | None:
    """The wanted tensors of the next shard, which have the shapes of their parameters; None after the last one."""
    for shard in iterator:
        for key in wanted & shard.keys():
            shape = _whole_shape(parameters[key.rsplit("/", 1)[0]])
            if shard[key].shape != shape:
                raise DamagedStateError(f"{key} has the shape {list(shard[key].shape)} instead of {list(shape)}")
        return {key: tensor for key, tensor in shard.items() if key in wanted}
    return None


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # of a partitioned parameter, `shape` is empty


def _collect(optimizer: EngineAdamW, parameter: nn.Parameter, kind: str) -> Tensor:
    """The partitions of all processes combined on rank 0."""
    # Summed as integers, with zeros for the other ranks' partitions: that keeps every bit, the sign of a zero too.
    bits = torch.zeros(_whole_shape(parameter), dtype=torch.int32, device=parameter.device)
    if part := optimizer.part_of(parameter):
        bits.view(-1).narrow(0, part.start, part.count).copy_(optimizer.tensor_of(part, kind).view(torch.int32))
    dist.reduce(bits, dst=0)
    return bits.view(torch.float32)


def whole(parameter: nn.Parameter) -> Tensor:
    """The parameter's values; under ZeRO's stage 3 gathered from all ranks, which take part."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    with gathered(parameter):
        return parameter.detach().clone()


def _set_whole(parameter: nn.Parameter, tensor: Tensor) -> None:
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(tensor)
        return
    with gathered(parameter, modified_by=0):
        parameter.copy_(tensor)

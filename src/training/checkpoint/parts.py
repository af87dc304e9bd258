"""What a rank holds of the full state, by parameter: one format for every strategy and any number of processes.

Per trained parameter: `master` (fp32 weights), `exp_avg` and `exp_avg_sq` (Adam's moments, fp32); per idle one (layer
0's value residual, never trained): `idle`. Of an adapted model's frozen base nothing: its file is there. Under ZeRO a
rank holds consecutive values of the flattened tensors; what all ranks hold alike is written and read by one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import pytorch_lightning as pl
from torch import Tensor, nn

from src.model import RWKV7
from src.training.distributed.deepspeed_internals import is_partitioned, partition_in_place, whole_shape
from src.training.distributed.engine_adamw import EngineAdamW
from src.training.module import TrainingModule

KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Part:
    """Values of a tensor of the state, in place: those from `start` on, where the whole is flattened."""

    key: str  # name/kind
    tensor: Tensor  # contiguous, of any shape
    shape: tuple[int, ...]  # of the whole
    start: int = 0
    is_replicated: bool = False  # whether every rank holds the same

    @property
    def flat(self) -> Tensor:
        """The values [count], sharing their memory."""
        return self.tensor.detach().view(-1)

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()

    @property
    def size(self) -> int:
        """Bytes."""
        return self.tensor.numel() * self.tensor.element_size()

    @property
    def is_whole(self) -> bool:
        return self.tensor.numel() == math.prod(self.shape)


def whole_part(key: str, tensor: Tensor, is_replicated: bool = False) -> Part:
    """A tensor that this rank holds whole."""
    return Part(key, tensor.detach(), tuple(tensor.shape), 0, is_replicated)


def held_parameters(model: RWKV7) -> dict[str, nn.Parameter]:
    """The parameters that a state holds, by name: all but an adapted model's frozen base."""
    return {name: p for name, p in model.named_parameters() if name not in model.frozen_base}


def state_parts(module: pl.LightningModule) -> list[Part]:
    """All that this rank holds, replicated tensors included."""
    assert isinstance(module, TrainingModule)
    optimizer = module.optimizer
    parts: list[Part] = []
    for name, parameter in held_parameters(module.model).items():
        if isinstance(optimizer, EngineAdamW):
            parts += _engine_parts(optimizer, name, parameter)
            continue
        tensors: dict[str, Tensor] = {"idle": parameter}
        if parameter.requires_grad:
            moments = optimizer.moments(parameter)
            tensors = {"master": optimizer.master_of(parameter), **{kind: moments[kind] for kind in KINDS[1:]}}
        parts += [whole_part(f"{name}/{kind}", tensor, is_replicated=True) for kind, tensor in tensors.items()]
    return parts


def _engine_parts(optimizer: EngineAdamW, name: str, parameter: nn.Parameter) -> Iterator[Part]:
    shape = tuple(whole_shape(parameter))
    if not parameter.requires_grad:
        if not is_partitioned(parameter):
            yield whole_part(f"{name}/idle", parameter, is_replicated=True)
            return
        tensor, start = partition_in_place(parameter)
        if tensor.numel():
            yield Part(f"{name}/idle", tensor, shape, start)
    elif (partition := optimizer.part_of(parameter)) is not None:
        for kind in KINDS:
            yield Part(f"{name}/{kind}", optimizer.tensor_of(partition, kind), shape, partition.start)


def owners(parts: Iterable[Part], world_size: int) -> dict[str, int]:
    """The rank that writes and reads each replicated part, by key: about as many bytes for each rank. The same on
    every rank, without a message."""
    replicated = [part for part in parts if part.is_replicated]
    if world_size == 1:
        return {part.key: 0 for part in replicated}
    from torch.distributed.checkpoint import DefaultSavePlanner  # half a second, which one process doesn't need

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    # the largest first: the planner gives each to the rank that has least so far
    planner.set_up_planner({part.key: part.tensor for part in sorted(replicated, key=lambda part: -part.size)})
    plans, _ = planner.create_global_plan([planner.create_local_plan()] * world_size)
    return {item.index.fqn: rank for rank, plan in enumerate(plans) for item in plan.items}


def own_parts(parts: Iterable[Part], owner: dict[str, int], rank: int) -> list[Part]:
    """What `rank` writes and reads: its partitions, and its share of the replicated parts."""
    return [part for part in parts if not part.is_replicated or owner[part.key] == rank]


def in_shards(parts: Iterable[Part], limit: int) -> Iterator[list[Part]]:
    """The parts in groups of `limit` bytes, but for the last: a part at the boundary is divided."""
    shard: list[Part] = []
    free = limit
    # by the size of an element: what follows 2-byte values need not begin at a multiple of 4 bytes
    for part in sorted(parts, key=lambda part: -part.tensor.element_size()):
        flat, begin = part.flat, 0
        while begin < flat.numel():
            count = min(flat.numel() - begin, free // flat.element_size())
            if count:
                shard.append(replace(part, tensor=flat.narrow(0, begin, count), start=part.start + begin))
                begin, free = begin + count, free - count * flat.element_size()
            if begin < flat.numel():
                yield shard
                shard, free = [], limit
    if shard:
        yield shard

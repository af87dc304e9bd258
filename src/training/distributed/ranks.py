"""Which rank a launcher (our own agent, torchrun, srun, DeepSpeed's launcher, mpirun) gave to this process.

Every launcher tells it in environment variables of its own. `export_ranks` sets those of torchrun for all of them,
which torch.distributed and Lightning's TorchElasticEnvironment read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from lightning_fabric.plugins.environments import SLURMEnvironment

from src.errors import UserError
from src.training.distributed.failure import is_supervised

# Names of (rank, world size, local rank, local world size) by launcher. The first row whose names are all set holds.
LAUNCHER_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),  # DeepSpeed
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)


@dataclass(frozen=True)
class RankInfo:
    """The rank of this process among all processes of the run, and where rank 0 listens."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int

    @property
    def node_rank(self) -> int:
        return self.rank // self.local_world_size


def rank_from_launcher(environment: Mapping[str, str]) -> RankInfo | None:
    """The rank that a launcher gave this process; None without a launcher, or where it started only one process.

    A Slurm job counts when srun started several tasks: a batch script that calls train.py is one process that may start
    others. Raises UserError when the variables are no numbers or contradict each other.
    """
    for names in LAUNCHER_VARIABLES:
        # all four: some of these variables are set by other programs too
        if all(name in environment for name in names):
            rank, world_size, local_rank, local_world_size = (_number(environment, name) for name in names)
            if world_size == 1 and not is_supervised(environment):  # no reason to set up a process group
                return None
            address, port = environment.get("MASTER_ADDR", "127.0.0.1"), _number(environment, "MASTER_PORT", 29500)
            return _checked(RankInfo(rank, world_size, local_rank, local_world_size, address, port), names)
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES")
    world_size = _number(environment, names[1], 1)
    if world_size == 1 or names[0] not in environment:
        return None
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "127.0.0.1")
    address = environment.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(nodes)
    # derived from the job's number: the same on every node, and two jobs on one node don't collide
    port = _number(environment, "MASTER_PORT", 15000 + _number(environment, "SLURM_JOB_ID", 0) % 10000)
    rank, local_rank = _number(environment, names[0]), _number(environment, names[2])
    num_nodes = _number(environment, names[3], 1)
    if num_nodes < 1 or world_size % num_nodes:
        raise _contradiction(f"{names[1]} is {world_size} and {names[3]} {num_nodes}", "as many tasks on every node")
    return _checked(RankInfo(rank, world_size, local_rank, world_size // num_nodes, address, port), names)


def export_ranks(info: RankInfo, environment: MutableMapping[str, str]) -> None:
    """Set what torchrun would set for this rank."""
    environment.update(
        RANK=str(info.rank),
        WORLD_SIZE=str(info.world_size),
        LOCAL_RANK=str(info.local_rank),
        LOCAL_WORLD_SIZE=str(info.local_world_size),
        GROUP_RANK=str(info.node_rank),
        MASTER_ADDR=info.master_addr,
        MASTER_PORT=str(info.master_port),
    )


def _checked(info: RankInfo, names: tuple[str, ...]) -> RankInfo:
    rank, world_size, local_rank = names[:3]
    if not 0 <= info.rank < info.world_size:
        raise _contradiction(f"{rank} is {info.rank} and {world_size} {info.world_size}", "a rank below the world size")
    if not 0 <= info.local_rank < info.local_world_size:
        problem = f"{local_rank} is {info.local_rank}, of {info.local_world_size} processes on this machine"
        raise _contradiction(problem, "a local rank below that number")
    if info.world_size % info.local_world_size:
        problem = f"{world_size} is {info.world_size}, with {info.local_world_size} processes on this machine"
        raise _contradiction(problem, "as many processes on every machine")
    if not 1 <= info.master_port <= 65535:
        raise UserError(
            f"MASTER_PORT {info.master_port}: the processes could not find each other",
            expected="a port, 1 to 65535",
            advice="name one (torchrun on one machine: --standalone)",
        )
    return info


def _contradiction(problem: str, expected: str) -> UserError:
    return UserError(
        f"the environment variables of the launcher contradict each other: {problem}",
        expected=expected,
        advice="unset those that another program left behind",
    )


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not re.fullmatch("-?[0-9]{1,9}", text):  # int() takes "4_1", an array job's id, for 41
        advice = "it is set by a launcher, or by hand where there is none; unset it for a run of one process"
        raise UserError(f"the environment variable {name} is {text!r}", expected="a whole number", advice=advice)
    return int(text)

"""Which rank this process is: as a launcher says, or as the first of those that `python train.py --devices N` starts.

A launcher (torchrun, srun, DeepSpeed's launcher, mpirun) tells each process its rank in environment variables.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment

from src.errors import UserError


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


# Names of (rank, world size, local rank, local world size) by launcher. The first row whose four names are all set
# holds.
LAUNCHER_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),  # DeepSpeed
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)


def rank_from_launcher(environment: Mapping[str, str]) -> RankInfo | None:
    """The rank that a launcher gave this process; None without a launcher, or where it started only one process.

    A Slurm job counts when srun started several tasks: a batch script that calls train.py is one process that may start
    others.
    """
    for names in LAUNCHER_VARIABLES:
        # all four: some of these variables are set by other programs too
        if all(name in environment for name in names):
            rank, world_size, local_rank, local_world_size = (_number(environment, name) for name in names)
            if world_size == 1:  # no reason to set up a process group
                return None
            address = environment.get("MASTER_ADDR", "127.0.0.1")
            port = _number(environment, "MASTER_PORT", 29500)
            return RankInfo(rank, world_size, local_rank, local_world_size, address, port)
    world_size = _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    if world_size > 1 and "SLURM_PROCID" in environment:
        return _rank_from_slurm(environment, world_size)
    return None


def _rank_from_slurm(environment: Mapping[str, str], world_size: int) -> RankInfo:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "127.0.0.1")
    address = environment.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(nodes)
    # derived from the job's number: the same on every node, and two jobs on one node don't collide
    port = _number(environment, "MASTER_PORT", 15000 + _number(environment, "SLURM_JOB_ID", 0) % 10000)
    num_nodes = _number(environment, "SLURM_STEP_NUM_NODES", 1)
    rank, local_rank = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_LOCALID")
    return RankInfo(rank, world_size, local_rank, world_size // num_nodes, address, port)


def rank_of_first_process(environment: Mapping[str, str], devices: int, num_nodes: int) -> RankInfo:
    """The rank of the process that a user started by hand on a node: its first, which starts the node's others.

    On several nodes NODE_RANK, MASTER_ADDR and MASTER_PORT say which node this is and where the first one listens.
    """
    if num_nodes == 1:
        return RankInfo(0, devices, 0, devices, "127.0.0.1", _free_port())
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise UserError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set",
            flag="num_nodes",
            given=num_nodes,
            expected=f"without a launcher, NODE_RANK (0 to {num_nodes - 1}), MASTER_ADDR and MASTER_PORT of the first "
            "node in the environment of every node",
            advice="set them, or start the run with torchrun, srun or deepspeed",
        )
    rank = _number(environment, "NODE_RANK") * devices
    address, port = environment["MASTER_ADDR"], _number(environment, "MASTER_PORT")
    return RankInfo(rank, devices * num_nodes, 0, devices, address, port)


def environment_variables(info: RankInfo) -> dict[str, str]:
    """What torchrun would set for this rank."""
    return {
        "RANK": str(info.rank),
        "WORLD_SIZE": str(info.world_size),
        "LOCAL_RANK": str(info.local_rank),
        "LOCAL_WORLD_SIZE": str(info.local_world_size),
        "MASTER_ADDR": info.master_addr,
        "MASTER_PORT": str(info.master_port),
    }


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        advice = "it is set by a launcher, or by hand where there is none; unset it for a run of one process"
        raise UserError(
            f"the environment variable {name} is {text!r}", expected="a whole number", advice=advice
        ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class KnownClusterEnvironment(ClusterEnvironment):
    """Tells Lightning the ranks that are known already, so that it starts and numbers no process itself."""

    def __init__(self, info: RankInfo) -> None:
        super().__init__()
        self.info = info

    # they exist already, whoever started them
    creates_processes_externally = True  # type: ignore[assignment]

    @property
    def main_address(self) -> str:
        return self.info.master_addr

    @property
    def main_port(self) -> int:
        return self.info.master_port

    @staticmethod
    def detect() -> bool:
        return False  # it is passed to the Trainer, never searched for

    def world_size(self) -> int:
        return self.info.world_size

    def global_rank(self) -> int:
        return self.info.rank

    def local_rank(self) -> int:
        return self.info.local_rank

    def node_rank(self) -> int:
        return self.info.node_rank

    def set_world_size(self, size: int) -> None:
        assert size == self.info.world_size

    def set_global_rank(self, rank: int) -> None:
        assert rank == self.info.rank

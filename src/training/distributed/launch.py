"""Where a process stands among all of a run: as a launcher says, or as the first of those that `python train.py --devices N` starts.

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
    """Where a process stands among all of them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str  # where rank 0 is
    port: int

    @property
    def node_rank(self) -> int:
        return self.rank // self.local_size


# rank, number of processes, rank on this machine, processes on this machine: the names that launchers use
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),  # DeepSpeed's
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)


def rank_from_launcher(environment: Mapping[str, str]) -> RankInfo | None:
    """What a launcher told this process; None where there is no launcher, or only one process.

    A Slurm job counts when srun started several tasks: a batch script that calls train.py is one process that may start others.
    """
    for names in LAUNCHERS:
        if all(name in environment for name in names):
            rank, size, local_rank, local_size = (int(environment[name]) for name in names)
            address = environment.get("MASTER_ADDR", "127.0.0.1")
            port = int(environment.get("MASTER_PORT", "29500"))
            return RankInfo(rank, size, local_rank, local_size, address, port) if size > 1 else None
    size = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if size > 1 and "SLURM_PROCID" in environment:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "127.0.0.1")
        address = environment.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(nodes)
        # the same port on every machine, another one for each job
        port = int(environment.get("MASTER_PORT", 15000 + int(environment.get("SLURM_JOB_ID", "0")) % 10000))
        machines = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
        return RankInfo(
            int(environment["SLURM_PROCID"]), size, int(environment["SLURM_LOCALID"]), size // machines, address, port
        )
    return None


def rank_of_first_process(environment: Mapping[str, str], devices: int, num_nodes: int) -> RankInfo:
    """That of the process which a user started by hand on a machine: its first, which starts the machine's others.

    On several machines NODE_RANK, MASTER_ADDR and MASTER_PORT say which machine this is and where the first one listens.
    """
    if num_nodes == 1:
        return RankInfo(0, devices, 0, devices, "127.0.0.1", _free_port())
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise UserError(
            f"--num_nodes {num_nodes}: without a launcher (torchrun, srun, deepspeed) each machine needs NODE_RANK (0 .. "
            f"{num_nodes - 1}), MASTER_ADDR and MASTER_PORT of the first machine in its environment; {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set"
        )
    rank = int(environment["NODE_RANK"]) * devices
    return RankInfo(rank, devices * num_nodes, 0, devices, environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class KnownClusterEnvironment(ClusterEnvironment):
    """Tells Lightning what is known already, so that it starts and names no process."""

    def __init__(self, place: RankInfo) -> None:
        super().__init__()
        self.place = place

    creates_processes_externally = True  # type: ignore[assignment]

    @property
    def main_address(self) -> str:
        return self.place.address

    @property
    def main_port(self) -> int:
        return self.place.port

    @staticmethod
    def detect() -> bool:
        return False  # it is handed over, never looked for

    def world_size(self) -> int:
        return self.place.size

    def global_rank(self) -> int:
        return self.place.rank

    def local_rank(self) -> int:
        return self.place.local_rank

    def node_rank(self) -> int:
        return self.place.node_rank

    def set_world_size(self, size: int) -> None:
        assert size == self.place.size

    def set_global_rank(self, rank: int) -> None:
        assert rank == self.place.rank

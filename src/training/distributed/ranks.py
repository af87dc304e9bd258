"""The rank of this process, as its launcher gives it: our own agent, torchrun, srun, DeepSpeed's launcher, mpirun.

Every launcher tells it in environment variables of its own. `export_ranks` sets those of torchrun for all of them,
which torch.distributed and Lightning's TorchElasticEnvironment read.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from lightning_fabric.plugins.environments import SLURMEnvironment

from src.errors import UserError
from src.training.distributed.failure import ERROR_FILE

ROLE = "train.py"  # torchelastic's ROLE_NAME: of the ranks whose agent is launch.py's, not torchrun's
LAUNCHED_AT, RESTARTED, AGENT = "TRAIN_LAUNCHED_AT", "TRAIN_RESTARTED", "TRAIN_AGENT"  # variables from agent to rank
RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"  # torchrun's
# Names of (rank, world size, local rank, local world size) by launcher. The first row whose names are all set holds.
LAUNCHER_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),  # DeepSpeed
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    # Slurm; not set in a batch script, which is one process that may start others. "4(x2)": 4 tasks on each of 2 nodes
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


class RankInfo(NamedTuple):
    """The rank of this process among all processes of the run, and where rank 0 listens."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int


def rank_from_launcher(environment: Mapping[str, str]) -> RankInfo | None:
    """The rank that a launcher gave this process; None without a launcher, or where it started only one process.

    Raises UserError when the variables are no numbers or contradict each other.
    """
    # all four: some of these variables are set by other programs too
    names = next((names for names in LAUNCHER_VARIABLES if all(name in environment for name in names)), None)
    if names is None:
        return None
    rank, world_size, local_rank, local_world_size = (_number(environment, name) for name in names)
    if world_size == 1 and not is_supervised(environment):  # no reason to set up a process group
        return None
    address, port = "127.0.0.1", 29500
    if names[0] == "SLURM_PROCID":
        address = SLURMEnvironment.resolve_root_node_address(environment.get("SLURM_STEP_NODELIST", address))
        # the same on every node, and two jobs on one node don't collide
        port = 15000 + _number(environment, "SLURM_JOB_ID", 0) % 10000
    address, port = environment.get("MASTER_ADDR") or address, _number(environment, "MASTER_PORT", port)
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size and world_size % local_world_size == 0):
        raise UserError(
            "the environment variables of the launcher contradict each other: "
            + ", ".join(f"{name} is {environment[name]}" for name in names),
            expected="ranks below the numbers of processes, and as many processes on every machine",
            advice="unset those that another program left behind",
        )
    if not 1 <= port <= 65535:
        problem = f"MASTER_PORT {port}: the processes could not find each other"
        advice = "name one (torchrun on one machine: --standalone)"
        raise UserError(problem, expected="a port, 1 to 65535", advice=advice)
    return RankInfo(rank, world_size, local_rank, local_world_size, address, port)


def export_ranks(info: RankInfo, environment: MutableMapping[str, str]) -> None:
    """Set what torchrun would set for this rank."""
    environment.update({name.upper(): str(value) for name, value in info._asdict().items()})
    environment["GROUP_RANK"] = str(info.rank // info.local_world_size)


def is_supervised(environment: Mapping[str, str]) -> bool:
    """Whether the agent of launch.py started this process: it prints the error that ends a run, once."""
    return environment.get("ROLE_NAME") == ROLE and bool(environment.get(ERROR_FILE))


def is_restarted() -> bool:
    """In a rank: whether the ranks of this machine were started before."""
    return RESTARTED in os.environ or os.environ.get(RESTART_COUNT, "0") != "0"


def launch_id() -> str:
    """In a rank of our own agent: the same in all attempts of a command, and in no other command; '' elsewhere."""
    return os.environ[LAUNCHED_AT] if is_supervised(os.environ) else ""


def launched_at() -> float:
    """When the run's command was started, by time.monotonic(): of a rank that was started again, the first time."""
    return float(launch_id() or time.monotonic())


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    # int() takes "4_1", an array job's id, for 41
    if not (found := re.fullmatch(r"(-?[0-9]{1,9})(\(x[0-9]+\))?", text)):
        advice = "it is set by a launcher, or by hand where there is none; unset it for a run of one process"
        raise UserError(f"the environment variable {name} is {text!r}", expected="a whole number", advice=advice)
    return int(found[1])

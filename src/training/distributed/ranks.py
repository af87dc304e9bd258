"""The rank of this process, as its launcher gives it: our own agent, torchrun, srun, DeepSpeed's launcher, mpirun.

Lightning's environments tell it, as far as they can: TorchElasticEnvironment reads torchrun's variables, and gets to
read those of the other launchers under torchrun's names. SLURMEnvironment takes a batch script for one of its tasks and
refuses `srun --ntasks`; MPIEnvironment needs mpi4py, which nothing else here does; and none of them tells how many
processes a machine has, or which variable makes no sense.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping

from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

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


def cluster_environment() -> TorchElasticEnvironment | None:
    """What the launcher of this process tells, as Lightning reads it; None without a launcher, or where it started only
    one process. Sets torchrun's variables where another launcher has set others.

    Raises UserError when the variables are no numbers or contradict each other.
    """
    # all four: some of these variables are set by other programs too
    if not (names := next((row for row in LAUNCHER_VARIABLES if all(name in os.environ for name in row)), None)):
        return None
    rank, world_size, local_rank, per_machine = numbers = [_number(name) for name in names]
    if world_size == 1 and not is_supervised(os.environ):  # no reason to set up a process group
        return None
    if not (rank < world_size and local_rank < per_machine and world_size % per_machine == 0):
        raise UserError(
            "the environment variables of the launcher contradict each other: "
            + ", ".join(f"{name} is {os.environ[name]}" for name in names),
            expected="ranks below the numbers of processes, and as many processes on every machine",
            advice="unset those that another program left behind",
        )
    # under srun nobody sets these: the same on every node, and two jobs on one node don't collide
    os.environ.setdefault("MASTER_PORT", str(15000 + _number("SLURM_JOB_ID") % 10000))
    nodes = os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")
    os.environ["MASTER_ADDR"] = os.environ.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(nodes)
    _number("MASTER_PORT", least=1, most=65535)
    os.environ.update(zip(LAUNCHER_VARIABLES[0], map(str, numbers), strict=True), GROUP_RANK=str(rank // per_machine))
    return TorchElasticEnvironment()


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


def _number(name: str, least: int = 0, most: int = 999_999_999) -> int:
    text = os.environ.get(name, "0")
    # int() takes "4_1", an array job's id, for 41
    if not (found := re.fullmatch(r"([0-9]{1,9})(\(x[0-9]+\))?", text)) or not least <= int(found[1]) <= most:
        expected = f"a whole number from {least} to {most}"
        advice = "set by a launcher (torchrun on one machine: --standalone) or by hand; one process needs none of them"
        raise UserError(f"the environment variable {name} is {text!r}", expected=expected, advice=advice)
    return int(found[1])

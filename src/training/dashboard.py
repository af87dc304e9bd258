"""Creates a Weights & Biases dashboard for the runs of a project.

    python -m src.training.dashboard PROJECT [--entity TEAM]

Saves a view of the project's workspace with losses, learning rate, speed and the health of the optimizer, and prints
its address. Needs `pip install wandb wandb-workspaces`, a login (`wandb login`) and a project with at least one run.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from src.errors import UserError

NAME = "RWKV-7 training"
INSTALL = "pip install wandb wandb-workspaces"
# Section -> panels of (title, x axis, metrics, logarithmic). Metrics have the names that reporting/loggers.py logs;
# "_runtime" is wandb's own, the seconds since the start of the run.
LAYOUT: dict[str, tuple[tuple[str, str, tuple[str, ...], bool], ...]] = {
    # Against tokens and not against steps: runs with other batch sizes can be compared.
    "Loss": (
        ("loss by tokens", "Gtokens", ("loss",), False),
        ("held-out loss by tokens", "Gtokens", ("val loss",), False),
        ("loss by time", "_runtime", ("loss", "val loss"), False),
        ("mean of each mini-epoch", "Gtokens", ("mini-epoch loss",), False),
    ),
    "Schedule": (
        ("learning rate", "Gtokens", ("lr",), False),
        ("weight decay", "Gtokens", ("wd",), False),
    ),
    "Speed": (
        ("thousand tokens per second", "Gtokens", ("kt/s",), False),
        ("model FLOPs utilization", "Gtokens", ("MFU",), False),
        ("memory (GiB)", "Gtokens", ("memory GiB",), False),
        ("tokens by time", "_runtime", ("tokens",), False),
    ),
    # Gradient norm and updates are logarithmic: a failing run changes them by orders of magnitude.
    "Health": (
        ("gradient norm", "Gtokens", ("grad norm",), True),
        ("update / weights", "Gtokens", ("update ratio/w0", "update ratio/matrices", "update ratio/others"), True),
        ("largest logit", "Gtokens", ("largest logit",), False),
    ),
}


def workspace(project: str, entity: str) -> Any:
    """The view of LAYOUT, not yet saved. Raises UserError when wandb-workspaces is missing."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ModuleNotFoundError as error:  # not in requirements.txt: only this command uses it
        raise UserError("the package wandb-workspaces is missing", advice=INSTALL) from error
    sections = [
        workspaces.Section(
            name=name,
            is_open=True,
            panels=[panels.LinePlot(title=title, x=x, y=list(y), log_y=log or None) for title, x, y, log in plots],
        )
        for name, plots in LAYOUT.items()
    ]
    return workspaces.Workspace(name=NAME, entity=entity, project=project, sections=sections)


def save(project: str, entity: str) -> str:
    """Save the view and return its address. Raises UserError without packages, login, network or project."""
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise UserError("the package wandb is missing", advice=INSTALL) from error
    try:
        return workspace(project, entity or _default_entity()).save().url
    # wandb raises the same errors for a wrong login, no network and an unknown project.
    except (wandb.Error, OSError) as error:
        # The cause is in the message, since wandb's own often names the setting that helps.
        raise UserError(
            f"no access to the wandb project {project} ({error})",
            advice="check the login (`wandb login`), the network, and that the project has a run",
        ) from error


def _default_entity() -> str:
    import wandb

    entity = wandb.Api().default_entity
    if not entity:
        raise UserError("this wandb login has no default team or user", flag="entity", expected="a team or user")
    return entity


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m src.training.dashboard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("project", metavar="PROJECT", help="value of --wandb")
    parser.add_argument("--entity", default="", help="team or user that owns the project [your default]")
    options = parser.parse_args(argv)
    try:
        print(save(options.project, options.entity))
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

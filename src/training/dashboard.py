"""A ready Weights & Biases dashboard for the runs of a project.

    python -m src.training.dashboard PROJECT [--entity TEAM]

Makes a saved view of the project's workspace: losses, learning rate, speed, health of the optimizer, samples. Needs
`pip install wandb wandb-workspaces`, a login (`wandb login`) and a project that has a run already; prints the view's address.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from src.errors import UserError

NAME = "RWKV-7 training"
# sections -> panels: title, x, what is drawn over it (names as reporting/loggers.py writes them), logarithmic
LAYOUT: dict[str, tuple[tuple[str, str, tuple[str, ...], bool], ...]] = {
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
        ("thousand tokens a second", "Gtokens", ("kt/s",), False),
        ("share of the devices' peak", "Gtokens", ("MFU",), False),
        ("memory (GiB)", "Gtokens", ("memory GiB",), False),
        ("tokens by time", "_runtime", ("tokens",), False),
    ),
    "Health": (
        ("gradient norm", "Gtokens", ("grad norm",), True),
        ("update / weights", "Gtokens", ("update ratio/w0", "update ratio/matrices", "update ratio/others"), True),
        ("largest logit", "Gtokens", ("largest logit",), False),
    ),
}


def workspace(project: str, entity: str) -> Any:
    """The view, not yet saved. Raises ValueError when the package is missing."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ModuleNotFoundError as error:
        raise UserError("the package wandb-workspaces is missing; pip install wandb wandb-workspaces") from error
    sections = [
        workspaces.Section(
            name=name,
            is_open=True,
            panels=[panels.LinePlot(title=title, x=x, y=list(y), log_y=log or None) for title, x, y, log in plots],
        )
        for name, plots in LAYOUT.items()
    ]
    return workspaces.Workspace(name=NAME, entity=entity, project=project, sections=sections)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m src.training.dashboard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("project", metavar="PROJECT", help="what --wandb was given")
    parser.add_argument("--entity", default="", help="team or user that has the project [yours]")
    options = parser.parse_args(argv)
    try:
        print(save(options.project, options.entity))
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


def save(project: str, entity: str) -> str:
    """The address of the saved view. Raises ValueError when a package, the login, the network or the project is missing."""
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise UserError("the package wandb is missing; pip install wandb wandb-workspaces") from error
    try:
        view = workspace(project, entity or _own_entity())
        return view.save().url
    except (wandb.Error, OSError) as error:
        raise UserError(
            f"wandb's server gave no access to {project} ({error}); it needs a login that works (`wandb login`), the network, and a "
            "project that has a run already"
        ) from error


def _own_entity() -> str:
    import wandb

    entity = wandb.Api().default_entity
    if not entity:
        raise UserError("this login has no default team or user; name one with --entity")
    return entity


if __name__ == "__main__":
    sys.exit(main())

"""What a run minimises: each objective in a file of its own."""

from src.training.objectives.next_token import NextToken
from src.training.objectives.objective import Objective

# A new objective is a file in this package, a subclass of Objective, and a row here.
OBJECTIVES: dict[str, type[Objective]] = {"next_token": NextToken}

__all__ = ["OBJECTIVES", "NextToken", "Objective"]

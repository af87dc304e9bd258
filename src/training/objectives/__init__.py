"""Objectives: what a run minimises. Each is a module that maps (model, batch) to a loss and named metrics, in a file of
its own."""

from src.training.objectives.next_token import NextToken

# A new objective is a file in this package and a row here.
OBJECTIVES = {"next_token": NextToken}

__all__ = ["OBJECTIVES", "NextToken"]

"""Figures and the report page, made from the logs of a run."""

"""A loss becomes weights: the run and its parts; `preflight/` comes before it, `reporting/` goes with it.

`plot`, `html_report` and `dashboard` are commands on runs that are there already (`python -m src.training.plot`).
Nothing is loaded by importing this package or its two parts: name the module that is meant.
"""

"""The version of this project: the newest heading of CHANGELOG.md, and what `train.py --version` prints."""

__version__ = "0.3.0"

"""How a run reads the media of its conversations: where they are, and what is handed in of the encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.dataset.media_files import MediaError, Picture, Sound, read_medium
from src.errors import UserError


@dataclass(frozen=True)
class MediaReader:
    """`count(medium)`: how many tokens it takes; `identity`: what that depends on, as JSON; `is_strict`: a file that
    can't be used is an error, and not a conversation less."""

    kind: str
    folder: str
    max_seconds: float
    count: Callable[[Picture | Sound], int]
    identity: dict[str, Any]
    is_strict: bool = False

    def path(self, name: str) -> Path:
        """Relative names are below `folder`."""
        return Path(self.folder) / name

    def read(self, name: str) -> Picture | Sound:
        """Raises MediaError, with `is_strict` UnusableMediaError, both with the path; MissingPackageError."""
        path = self.path(name)
        try:
            return read_medium(self.kind, path, self.max_seconds)
        except MediaError as error:
            if self.is_strict:
                raise UnusableMediaError(error.problem, flag="broken_media", given=path) from error
            raise MediaError(error.problem, given=path) from error


class UnusableMediaError(UserError):
    """A file that can't be used, where that is to stop the run."""

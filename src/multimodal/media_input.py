"""From the name of a medium in a run's data to the input of its encoder, in the processes that read samples."""

from __future__ import annotations

from torch import Tensor

from src.dataset.media_reader import MediaReader
from src.dataset.watched_file import DataFileError
from src.errors import UserError
from src.multimodal.config import MediaConfig
from src.multimodal.feature_cache import FeatureCache


class MediaInput:
    """`media_input(name, tokens)` is the prepared input [n, ...] of a medium that took so many tokens when the data
    were tokenized.

    features   of a frozen encoder, computed before (feature_cache.py): then they are the input; None without
    """

    def __init__(self, config: MediaConfig, reader: MediaReader) -> None:
        self.spec, self.reader = config.spec, reader
        self.features: FeatureCache | None = None

    @property
    def blank(self) -> Tensor:
        """An input of the same kind; of its first dimension any part may be taken, none too."""
        return self.spec.blank() if self.features is None else self.features.blank

    def __call__(self, name: str, tokens: int) -> Tensor:
        """Raises DataFileError where the file has changed since, and can't be used any more."""
        if self.features is not None:
            return self.features[name]
        # Its conversation has its place in a row by now. To leave it out would make other rows of the same data.
        try:
            medium = self.reader.read(name)
        except UserError as error:
            raise DataFileError(f"{error.problem}, readable when the data were tokenized", given=error.given) from error
        if self.spec.count(medium) != tokens:
            raise DataFileError("changed since the data were tokenized", given=self.reader.path(name))
        return self.spec.prepare(medium)

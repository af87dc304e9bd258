"""A run's folder, shown while it trains: curves, samples, and whether there are newer weights than those served."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from src.errors import UserError
from src.inference.serve.errors import ApiError
from src.inference.serve.registry import Registry
from src.inference.serve.served_model import ServedModel
from src.run_folder import ADAPTER, SAMPLES, TUNED_STATE, newest_result, newest_weights
from src.run_log import Curves, Numbers, read_curves

MOST_POINTS = 1000  # of a curve; more than a screen has columns
SHOWN_SETTINGS = (
    *("n_layer", "n_embd", "vocab_size", "ctx_len", "micro_bsz", "lr_init", "lr_final", "my_exit_tokens"),
    *("data_file", "data_type", "precision", "strategy"),
)


class LiveRun:
    """`snapshot()` is what the page draws; `load_newest()` serves the newest weights of the run.

    load   (name, path of weights) -> the model, ready to be served
    """

    def __init__(self, folder: Path, registry: Registry, name: str, load: Callable[[str, Path], ServedModel]) -> None:
        self.folder, self.registry, self.name, self._load = folder, registry, name, load
        self._loading = threading.Lock()
        self._served = self._version(self._newest())

    def snapshot(self) -> dict[str, Any]:
        """Curves and samples for JSON: unknown values are null. What can't be read yet is empty, with the reason."""
        newest = self._newest()
        result: dict[str, Any] = {
            "name": self.folder.name,
            "model": self.name,
            "newest_weights": newest.name if newest is not None else None,
            "has_newer_weights": self._version(newest) != self._served,
            "samples": self._samples(),
        }
        try:
            curves = read_curves(self.folder)
        except UserError as error:  # nothing has been logged yet, or a file that is just being written
            return {**result, "problem": error.problem, "curves": {}, "settings": {}}
        settings = {name: curves.settings[name] for name in SHOWN_SETTINGS if name in curves.settings}
        return {**result, "problem": "", "curves": _points(curves), "settings": settings}

    def load_newest(self) -> ServedModel:
        """Raises ApiError when there are none, or while others are being loaded; UserError when they can't be read."""
        newest = self._newest()
        if newest is None:
            raise ApiError(409, f"{self.folder} has no weights yet")
        if not self._loading.acquire(blocking=False):
            raise ApiError(409, "weights are being loaded already")
        try:
            version = self._version(newest)
            model = self._load(self.name, newest)
            self.registry.replace(model)
            self._served = version
            return model
        finally:
            self._loading.release()

    def _newest(self) -> Path | None:
        """Of weights, else of what the run trains instead."""
        others = (newest_result(self.folder, names) for names in (ADAPTER, TUNED_STATE))
        return newest_weights(self.folder) or next((path for path in others if path is not None), None)

    def _samples(self) -> list[dict[str, str]]:
        try:
            samples = json.loads((self.folder / SAMPLES).read_text(encoding="utf-8"))
            return [{str(k): str(v) for k, v in sample.items()} for sample in samples]
        except (OSError, ValueError, AttributeError, TypeError):  # written at the end of a run
            return []

    @staticmethod
    def _version(weights: Path | None) -> tuple[str, int]:
        """What tells weights from later ones, also under the same name."""
        try:
            return ("", 0) if weights is None else (weights.name, weights.stat().st_mtime_ns)
        except OSError:
            return "", 0


def _points(curves: Curves) -> dict[str, list[float | None]]:
    smoothed, _ = curves.smoothed()
    count = len(curves.tokens)
    chosen = np.unique(np.linspace(0, max(0, count - 1), min(count, MOST_POINTS)).astype(np.int64))
    series = {
        "tokens": curves.tokens,
        "loss": curves.loss,
        "smoothed_loss": smoothed,
        "lr": curves.lr,
        "tokens_per_second": curves.speed,
        "seconds": curves.seconds,
    }
    result = {name: _finite(values[chosen]) for name, values in series.items()}
    return {**result, "val_tokens": _finite(curves.val_tokens), "val_loss": _finite(curves.val_loss)}


def _finite(values: Numbers) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]

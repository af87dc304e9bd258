"""The models of a server by name."""

from __future__ import annotations

import threading

from src.inference.serve.errors import ApiError
from src.inference.serve.served_model import ServedModel


class Registry:
    """`find(name, adapter)`; the first model is the default. A model with an adapter is NAME:ADAPTER."""

    def __init__(self, models: list[ServedModel]) -> None:
        self._lock = threading.Lock()
        self._models = {model.name: model for model in models}

    @property
    def models(self) -> list[ServedModel]:
        with self._lock:
            return list(self._models.values())

    def find(self, name: str, adapter: str | None) -> ServedModel:
        """Raises ApiError for a model or an adapter that isn't served."""
        models = {model.name: model for model in self.models}
        name = name or next(iter(models))
        if adapter is not None:
            name = f"{name}:{adapter}"
        if name not in models:
            known = ", ".join(models)
            raise ApiError(404, f"no model {name!r}; there are: {known}", "model", "model_not_found")
        return models[name]

    def replace(self, model: ServedModel) -> None:
        """Serve `model` under its name instead of the one before, whose answers are finished."""
        with self._lock:
            old = self._models.get(model.name)
            self._models[model.name] = model
        if old is not None:
            threading.Thread(target=old.engine.close, args=(float("inf"),), daemon=True).start()

    def close(self, drain_seconds: float) -> None:
        """Let the engines finish what is being written."""
        threads = [threading.Thread(target=m.engine.close, args=(drain_seconds,)) for m in self.models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

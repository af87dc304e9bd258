"""What a run trains, as files: plain weights, or an adapter beside a base that stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from src.adapt.adapter import portable
from src.adapt.adapter_files import Adapter, write_adapter
from src.adapt.config import adapter_of
from src.config import RunConfig
from src.model.weights import save_weights
from src.run_folder import ADAPTER, TUNED_STATE, WEIGHTS, ResultNames
from src.training.checkpoint.state import gather_adapter, gather_weights
from src.training.module import TrainingModule


@dataclass(frozen=True)
class Results:
    """Names of the files, and how they are written. `adapter`: without tensors; None where all weights are trained."""

    names: ResultNames = WEIGHTS
    adapter: Adapter | None = None

    def write(self, module: TrainingModule, path: Path) -> None:
        """Every rank takes part: under ZeRO each holds a partition."""
        if self.adapter is None:
            weights = gather_weights(module.model)
            if weights is not None:
                save_weights(weights, path)
        else:
            tensors = gather_adapter(module)
            if tensors is not None:
                self.write_tensors(tensors, path)

    def write_tensors(self, tensors: dict[str, Tensor], path: Path) -> None:
        """Of an adapter, from a full state or a module."""
        assert self.adapter is not None
        config, tensors = portable(self.adapter.config, tensors)
        write_adapter(path, replace(self.adapter, config=config, tensors=tensors))


def result_names(config: RunConfig) -> ResultNames:
    """The names of what a run trains."""
    adapter = adapter_of(config)
    if adapter is None:
        return WEIGHTS
    return TUNED_STATE if adapter.kind == "state" else ADAPTER


def results_of(config: RunConfig, base: Path | None, base_sha256: str) -> Results:
    """The results of a run. `base`: the weights that an adapter changes, with their hash."""
    adapter = adapter_of(config)
    if adapter is None:
        return Results()
    assert base is not None, "an adapter's run has a base"
    return Results(result_names(config), Adapter(adapter, {}, base_sha256, str(base.absolute())))

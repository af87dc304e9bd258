"""What a run trains, as files: plain weights, or an adapter beside a base that stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from src.adapt.adapter import portable
from src.adapt.adapter_files import Adapter, write_adapter
from src.adapt.config import adapter_of
from src.config import RunConfig
from src.model.weights import Weights, save_weights
from src.run_folder import ADAPTER, TUNED_STATE, WEIGHTS, ResultNames
from src.training.checkpoint.gather import gather_adapter, gather_weights
from src.training.module import TrainingModule


@dataclass(frozen=True)
class Results:
    """Names of the files, and how they are written.

    adapter       without tensors; None where all weights are trained
    check_folder  raises where the run's folder is another run's by now
    """

    names: ResultNames = WEIGHTS
    adapter: Adapter | None = None
    check_folder: Callable[[], None] = lambda: None

    def write(
        self, module: TrainingModule, path: Path, accept: Callable[[Weights], None] = lambda tensors: None
    ) -> None:
        """Every rank takes part: under ZeRO each holds a partition. `accept` raises for what must not be written."""
        tensors = gather_weights(module.model, path.parent) if self.adapter is None else gather_adapter(module)
        if tensors is not None:
            accept(tensors)
            self.write_tensors(tensors, path)

    def write_tensors(self, tensors: Weights, path: Path) -> None:
        """Of a full state or a module, on rank 0."""
        self.check_folder()  # here too: where the folder is gone, writing the temporary file would fail first
        if self.adapter is None:
            save_weights(tensors, path, self.check_folder)
            return
        config, tensors = portable(self.adapter.config, tensors)
        write_adapter(path, replace(self.adapter, config=config, tensors=tensors))


def result_names(config: RunConfig) -> ResultNames:
    """The names of what a run trains."""
    adapter = adapter_of(config)
    if adapter is None:
        return WEIGHTS
    return TUNED_STATE if adapter.kind == "state" else ADAPTER


def results_of(config: RunConfig, base: Path | None, base_sha256: str, check_folder: Callable[[], None]) -> Results:
    """The results of a run. `base`: the weights that an adapter changes, with their hash."""
    adapter = adapter_of(config)
    if adapter is None:
        return Results(check_folder=check_folder)
    assert base is not None, "an adapter's run has a base"
    return Results(result_names(config), Adapter(adapter, {}, base_sha256, str(base.absolute())), check_folder)

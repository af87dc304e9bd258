"""What a run trains, as files: plain weights; an adapter beside a base that stays as it is; or, with an encoder, one
folder of all that was trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from src.adapt.adapter import portable
from src.adapt.adapter_files import Adapter, write_adapter
from src.adapt.config import adapter_of
from src.config import RunConfig, keeps_base
from src.files import whole_folder
from src.model.weights import Weights, save_weights
from src.multimodal import files as media_files
from src.multimodal.config import media_of
from src.multimodal.files import MediaRecord, write_front_end
from src.multimodal.front_end import PREFIX
from src.run_folder import ADAPTER, MULTIMODAL, TUNED_STATE, WEIGHTS, ResultNames
from src.training.checkpoint.gather import gather_held, gather_weights
from src.training.module import TrainingModule
from src.training.objectives.front_end import frozen_tensors


@dataclass(frozen=True)
class FrontEndResult:
    """`record` without tensors; `frozen`: weights of --load_projector that are not trained, which belong to the result
    all the same; `dtype` of the language model's weights, where it is trained."""

    record: MediaRecord
    dtype: torch.dtype
    frozen: Weights = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """Names of the files, and how they are written.

    adapter       without tensors; None where there is none
    front_end     None without an encoder
    check_folder  raises where the run's folder is another run's by now
    """

    names: ResultNames = WEIGHTS
    adapter: Adapter | None = None
    check_folder: Callable[[], None] = lambda: None
    front_end: FrontEndResult | None = None

    @property
    def are_weights(self) -> bool:
        """Whether the result is a plain state dict."""
        return self.adapter is None and self.front_end is None

    def write(
        self, module: TrainingModule, path: Path, accept: Callable[[Weights], None] = lambda tensors: None
    ) -> None:
        """Every rank takes part: under ZeRO each holds a partition. `accept` raises for what must not be written."""
        tensors = gather_weights(module.model, path.parent) if self.are_weights else gather_held(module)
        if tensors is not None:
            accept(tensors)
            self.write_tensors(tensors, path)

    def write_tensors(self, tensors: Weights, path: Path) -> None:
        """Of a full state or a module, on rank 0."""
        self.check_folder()  # here too: where the folder is gone, writing the temporary file would fail first
        if self.front_end is not None:
            self._write_folder(self.front_end, tensors, path)
        elif self.adapter is None:
            save_weights(tensors, path, self.check_folder)
        else:
            self._write_adapter(self.adapter, tensors, path)

    def _write_adapter(self, adapter: Adapter, tensors: Weights, path: Path) -> None:
        config, tensors = portable(adapter.config, tensors)
        write_adapter(path, replace(adapter, config=config, tensors=tensors))

    def _write_folder(self, result: FrontEndResult, tensors: Weights, path: Path) -> None:
        of_front_end = {
            name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)
        }
        others = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
        with whole_folder(path, self.check_folder) as folder:
            write_front_end(folder, result.record, {**result.frozen, **of_front_end})
            if self.adapter is not None:
                is_state = self.adapter.config.kind == "state"
                self._write_adapter(
                    self.adapter, others, folder / (media_files.STATE if is_state else media_files.ADAPTER)
                )
            elif others:
                weights = {name: tensor.to(result.dtype) for name, tensor in others.items()}
                save_weights(weights, folder / media_files.LANGUAGE_MODEL)


def result_names(config: RunConfig) -> ResultNames:
    """The names of what a run trains."""
    if config.encoder:
        return MULTIMODAL
    adapter = adapter_of(config)
    if adapter is None:
        return WEIGHTS
    return TUNED_STATE if adapter.kind == "state" else ADAPTER


def results_of(
    config: RunConfig, base: Path | None, base_sha256: str, check_folder: Callable[[], None], dtype: torch.dtype
) -> Results:
    """The results of a run. `base`: the weights that stay as they are, with their hash; `dtype` of the model."""
    adapter, media = adapter_of(config), media_of(config)
    path = ""
    if keeps_base(config):
        assert base is not None, "such a run has a base"
        path = str(base.absolute())
    front_end = None
    if media is not None:
        record = MediaRecord(media, path, base_sha256 if path else "")
        front_end = FrontEndResult(record, dtype, frozen_tensors(config))
    of_adapter = Adapter(adapter, {}, base_sha256, path) if adapter is not None else None
    return Results(result_names(config), of_adapter, check_folder, front_end)

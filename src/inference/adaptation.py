"""What is applied to a model when it is loaded: an adapter, merged into its weights, and a tuned initial state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from src.adapt.adapter_files import CONFIG, Adapter, read_adapter
from src.adapt.merge import check_adapter, merge_adapter
from src.errors import UserError
from src.model.weights import Weights
from src.multimodal.files import ADAPTER as MEDIA_ADAPTER
from src.multimodal.files import LANGUAGE_MODEL, is_media_folder, read_record
from src.multimodal.files import STATE as MEDIA_STATE
from src.run_folder import ADAPTER, MULTIMODAL, TUNED_STATE, newest_result, read_run


@dataclass(frozen=True)
class Adaptation:
    """The values of --adapter, --state and what goes with them.

    adapter       a folder of PEFT's, a file, or the folder of a run that trained one; "": none
    state         a file of initial states, or the folder of such a run; "": zeros
    lora_alpha    for files without it
    state_layout  axis order of `state`, one of STATE_LAYOUTS; "": by its format
    other_base    accept an adapter that was trained on other weights of these sizes
    media         a folder with a front end (src/multimodal/files.py); "": the model reads text alone
    """

    adapter: str = ""
    state: str = ""
    lora_alpha: float | None = None
    state_layout: str = ""
    other_base: bool = False
    media: str = ""

    def __bool__(self) -> bool:
        return bool(self.adapter or self.state)

    @property
    def paths(self) -> list[Path]:
        """What is read: of a run's folder its newest result."""
        return [*self._results, *([Path(self.media)] if self.media else [])]

    @property
    def _results(self) -> list[Path]:
        """Adapter and state."""
        # The other kind as well, for the message that says so.
        named = ((self.adapter, ADAPTER, TUNED_STATE), (self.state, TUNED_STATE, ADAPTER))
        return [
            newest_result(Path(path), names) or newest_result(Path(path), others) or Path(path)
            for path, names, others in named
            if path
        ]

    def read(self) -> list[tuple[Path, Adapter]]:
        """The adapter and the state, with where they were read. Raises UserError, also when one is the other."""
        for path, flag in zip(self._results, self._flags, strict=True):
            if not path.exists():
                raise UserError("no such file or folder", flag=flag, given=path)
        adapters = [
            (path, read_adapter(path, self.lora_alpha if flag == "adapter" else None, self.state_layout))
            for path, flag in zip(self._results, self._flags, strict=True)
        ]
        for (path, adapter), flag in zip(adapters, self._flags, strict=True):
            kind = "state" if adapter.config.kind == "state" else "adapter"
            if kind != flag:
                what = "tuned initial states" if kind == "state" else "an adapter"
                raise UserError(what, flag=flag, given=path, advice=f"name it as --{kind}")
        return adapters

    @property
    def _flags(self) -> list[str]:
        return [flag for flag in ("adapter", "state") if getattr(self, flag)]

    def apply(self, weights: Weights, dtype: torch.dtype | None = None) -> Weights:
        """`weights` with the adapter merged, in fp32 and rounded once to `dtype` (None: that of each weight), and with
        the initial states. Raises UserError when one of them doesn't fit."""
        adapters = self.read()
        for path, adapter in adapters:
            check_adapter(adapter, weights, path, self.other_base)
        for _, adapter in adapters:
            weights = merge_adapter(weights, adapter, dtype)
        return weights


NOTHING = Adaptation()


def model_name(weights: Path, adaptation: Adaptation) -> str:
    """The paths of the weights and of what is applied to them, for people."""
    return " + ".join(map(str, [weights, *adaptation.paths]))


def multimodal_folder(path: Path) -> Path | None:
    """The folder with a front end that `path` is, or the newest one of the run whose folder it is; None where there is
    none."""
    if is_media_folder(path):
        return path
    result = newest_result(path, MULTIMODAL) if path.is_dir() else None
    return result if result is not None and is_media_folder(result) else None


def multimodal_model(folder: Path, adaptation: Adaptation) -> tuple[Path, Adaptation]:
    """The weights of the language model that belong to a folder with a front end, and what is applied to them. Raises
    UserError when its base isn't there, or is another one by now."""
    adaptation = replace(adaptation, media=str(folder))
    if (folder / LANGUAGE_MODEL).is_file():
        return folder / LANGUAGE_MODEL, adaptation
    record = read_record(folder)
    base = Path(record.base_path)
    if not record.base_path or not base.exists():
        raise UserError(
            f"its language model {record.base_path} is not there",
            given=folder,
            advice=f"copy those weights to {folder / LANGUAGE_MODEL}",
        )
    if (adapter := folder / MEDIA_ADAPTER).is_dir() and not adaptation.adapter:
        adaptation = replace(adaptation, adapter=str(adapter))
    if (state := folder / MEDIA_STATE).is_file() and not adaptation.state:
        adaptation = replace(adaptation, state=str(state))
    return base, adaptation


def adapted_base(path: Path, adaptation: Adaptation) -> tuple[str, Adaptation] | None:
    """The base that `path` belongs to, and what is applied to it, where `path` is an adapter: the folder of a run that
    trained one, or what such a run has written. None where it isn't. Raises UserError when the base isn't recorded."""
    found: tuple[Path, str] | None = None
    if path.is_dir() and (path / CONFIG).is_file():
        found = path, "adapter"
    elif path.is_dir():
        results = ((newest_result(path, ADAPTER), "adapter"), (newest_result(path, TUNED_STATE), "state"))
        found = next(((result, flag) for result, flag in results if result is not None), None)
    elif path.is_file() and TUNED_STATE.matches(path.name):
        found = path, "state"
    if found is None:
        return None
    result, flag = found
    run = read_run(result.parent)
    # what the run read: rwkv-init.pth where the flag names none
    recorded = run.get("origin", {}).get("path", "") or run.get("settings", {}).get("load_model", "")
    in_file = read_adapter(result, adaptation.lora_alpha).base_path if flag == "adapter" else ""
    base = next((base for base in (recorded, in_file) if base and Path(base).exists()), "")
    if not base:
        missing = f"its base {recorded or in_file} is not there" if recorded or in_file else "its base isn't recorded"
        raise UserError(
            f"an adapter, and {missing}" if flag == "adapter" else f"tuned initial states, and {missing}",
            given=path,
            advice=f"name the base as MODEL, and --{flag} {path}",
        )
    if flag == "adapter":
        return base, replace(adaptation, adapter=adaptation.adapter or str(result))
    return base, replace(adaptation, state=adaptation.state or str(result))

"""Reads and writes adapters: Hugging Face PEFT's folder, and a .pth of initial states.

Read are also the .pth files of RWKV-PEFT, which hold trained tensors only, rwkvtune's folders, and the LoRA and state
files of web-rwkv and Ai00 (.st). PEFT's folder may be over this project's names, or over those of
flash-linear-attention and rwkv7-hf. src/adapt/adapter_names.py has the names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from src.adapt.adapter_names import AdapterName, adapter_name, peft_name
from src.adapt.config import TARGETS, AdapterConfig
from src.errors import UserError
from src.files import atomic_write, whole_folder, write_twice
from src.model.file_kind import file_kind
from src.model.safetensors_file import write_safetensors
from src.model.weights import Weights, read_weights, save_weights

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
TENSORS_FILES = (TENSORS, "adapter_model.bin")  # PEFT's names, in its order
ALPHA = "lora_alpha"  # in adapter_config.json, and in the metadata of a .st file
TIME_STATE = "att.time_state"
# The two axis orders of an initial state [H, N, N]: that of this project, RWKV-LM and RWKV-PEFT, and that of web-rwkv,
# flash-linear-attention and rwkv7-hf.
STATE_LAYOUTS = ("value-key", "key-value")
# Of PEFT's LoraConfig and MissConfig: what would change the formula, and is not read.
UNSUPPORTED = (
    *("rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "kasa_config"),
    *("layer_replication", "alora_invocation_tokens", "monteclora_config", "velora_config", "target_parameters"),
    *("trainable_token_indices",),
)
NUMBERS = ("r", "lora_alpha", "alpha", "lora_dropout", "miss_dropout")  # of those that are read
# The values of init_lora_weights after which A and B belong to the base as it is. The others, such as pissa and olora,
# take something from the base's weights, and the file doesn't hold what.
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """`tensors` by the names of `adapter_names`, fp32 where they come from a file; `base_sha256`: of the base's weights
    (base_hash.py), "" where it isn't known; `base_path`: where they were, for people and as a default."""

    config: AdapterConfig
    tensors: Weights
    base_sha256: str = ""
    base_path: str = ""


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_adapter(path: Path, adapter: Adapter) -> None:
    """Write `adapter`, whole or not at all: of kind "state" a .pth, else a folder that PEFT loads.

    Not for kind "pissa", whose `portable` form is LoRA. Raises OSError when that fails twice.
    """
    if adapter.config.kind == "state":
        save_weights(adapter.tensors, path)
        return
    assert adapter.config.kind != "pissa", "its A and B alone are not the change of the base: write `portable` of it"
    write_twice(path, lambda: _write_folder(path, adapter))


def _write_folder(path: Path, adapter: Adapter) -> None:
    with whole_folder(path) as new:  # its two files belong together
        metadata = {"format": "pt", "base_sha256": adapter.base_sha256}
        write_safetensors({peft_name(name): t for name, t in adapter.tensors.items()}, new / TENSORS, metadata)
        with atomic_write(new / CONFIG, "w") as file:
            json.dump(_peft_config(adapter), file, indent=2)
            file.write("\n")


def _peft_config(adapter: Adapter) -> dict[str, Any]:
    """The content of adapter_config.json."""
    config = adapter.config
    names = [adapter_name(name) for name in adapter.tensors]
    # Norms are modules, which PEFT replaces by trained copies. Single parameters, such as x_r, it loads into the base.
    norms = {name.module: None for name in names if f"{name.module}.bias" in adapter.tensors}
    common = {
        "task_type": None,  # with CAUSAL_LM PEFT asks the base for transformers' methods of generation
        "base_model_name_or_path": adapter.base_path or None,
        "r": config.r,
        "target_modules": [target for target in TARGETS if target in {name.target for name in names}],
        "modules_to_save": list(norms) or None,
        "bias": "none",
        "inference_mode": True,
    }
    if config.kind == "miss":
        return {"peft_type": "MISS", **common, "miss_dropout": config.lora_dropout, "init_weights": True}
    alpha = int(config.lora_alpha) if config.lora_alpha == int(config.lora_alpha) else config.lora_alpha
    return {
        "peft_type": "LORA",
        **common,
        "lora_alpha": alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.kind == "dora",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_adapter(path: str | Path, alpha: float | None = None, state_layout: str = "") -> Adapter:
    """The adapter in a folder or a file, of any of the formats above.

    alpha         lora_alpha, where the file doesn't have it
    state_layout  one of STATE_LAYOUTS; "": value-key in a file of torch.save, key-value in safetensors

    Raises UserError when it can't be read, is not an adapter, or uses what has no counterpart here.
    """
    path = Path(path)
    folder_config = _read_config(path) if path.is_dir() else {}
    file = _tensors_file(path) if path.is_dir() else path
    stored = read_weights(file)
    metadata = _metadata(file)
    names = {name: adapter_name(name) for name in stored}
    _check_names(names, path)
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith(".lora.0"):  # web-rwkv's A is [in, r]
            tensor = tensor.t()
        elif name.endswith(TIME_STATE):
            tensor = _state(tensor, name, path, state_layout or _state_layout(file))
        tensors[str(names[name])] = tensor.float().contiguous()
    if len(tensors) < len(stored):
        raise UserError("holds two tensors for one parameter", given=path, expected="one adapter")
    # web-rwkv's LoRA files as this project writes them have their factor
    settings = {ALPHA: _number(metadata[ALPHA], file), **folder_config} if ALPHA in metadata else folder_config
    config = _config(tensors, settings, alpha, path)
    return Adapter(
        config, tensors, metadata.get("base_sha256", ""), str(folder_config.get("base_model_name_or_path") or "")
    )


def _number(text: str, file: Path) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"its {ALPHA} is {text[:40]!r}", given=file, expected="a number") from error


def _tensors_file(folder: Path) -> Path:
    for name in TENSORS_FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{CONFIG} without tensors", given=folder, expected=" or ".join(TENSORS_FILES))


def _read_config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json. Raises UserError where there is none, or for what is not read."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"contains no {CONFIG}", given=folder, expected="the folder of an adapter, or its file")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"can't be read ({error})", given=path) from error
    if not isinstance(config, dict):
        raise UserError("not the settings of an adapter", given=path, expected="a JSON object")
    for name in NUMBERS:
        if type(value := config.get(name, 0)) not in (int, float, type(None)):
            raise UserError(f"{name} is {json.dumps(value)[:40]}", given=path, expected="a number")
    if (kind := config.get("peft_type", "LORA")) not in ("LORA", "MISS"):
        raise UserError(f"an adapter of type {kind}", given=folder, expected="LORA (DoRA too) or MISS")
    used = [name for name in UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if config.get("init_weights", True) not in (True, False):  # MiSS: "bat" and "mini", which have other formulas
        used.append("init_weights")
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        used.append("init_lora_weights")
    if used:
        raise UserError(
            f"made with {used[0]} {json.dumps(config[used[0]])}, which is not read",
            given=folder,
            expected="plain LoRA, DoRA or MiSS",
            advice="convert it with PEFT, or merge it there and use the merged model",
        )
    return config


def _metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file, {} of another."""
    if file_kind(file) != "safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def _check_names(names: Mapping[str, AdapterName], path: Path) -> None:
    """Raises UserError for files that hold no adapter, and for adapters of what has none here."""
    if whole := next((name for name in names if name.endswith(("emb.weight", ".base_layer.weight"))), ""):
        raise UserError(f"a whole model, not an adapter (it has {whole})", given=path, advice="name it as MODEL")
    for name, parsed in names.items():
        is_adapter = parsed.is_adapter or "lora_" in name
        if is_adapter and not parsed.target:
            raise UserError(f"{name} belongs to no matrix that can be adapted", given=path, expected=", ".join(TARGETS))
    if not any(parsed.is_adapter or str(parsed).endswith(TIME_STATE) for parsed in names.values()):
        raise UserError(
            f"not an adapter (it begins with {', '.join(list(names)[:3])})",
            given=path,
            expected="LoRA, DoRA or MiSS tensors, or initial states",
        )


def _state_layout(file: Path) -> str:
    """The axis order of the states in a file, of which its shape says nothing: by who writes such files."""
    return "key-value" if file_kind(file) == "safetensors" else "value-key"


def _state(tensor: Tensor, name: str, path: Path, layout: str) -> Tensor:
    """An initial state as [H, value, key]. Raises UserError for another shape."""
    # [1, H, N, N] and [H N, N] are the same numbers in the same order.
    n = tensor.shape[-1]
    if not 2 <= tensor.dim() <= 4 or tensor.numel() % (n * n) or tensor.shape[-2] % n:
        raise UserError(f"{name} is {list(tensor.shape)}", given=path, expected="[heads, head size, head size]")
    tensor = tensor.reshape(-1, n, n)
    return tensor.transpose(1, 2) if layout == "key-value" else tensor


def _config(tensors: Weights, stored: dict[str, Any], alpha: float | None, path: Path) -> AdapterConfig:
    """The kind and sizes of an adapter, from its tensors and what adapter_config.json has, {} without one."""
    parts = {name.rpartition(".")[2] for name in tensors}
    names = [adapter_name(name) for name in tensors]
    targets = tuple(target for target in TARGETS if target in {name.target for name in names if name.is_adapter})
    whole = [name for name in names if not name.is_adapter and str(name).rpartition(".")[2] != "time_state"]
    is_norm = {name.module.rpartition(".")[2].startswith("ln") for name in whole}
    train = tuple(part for part, norm in (("ln", True), ("vectors", False)) if norm in is_norm)
    if "miss_block" in parts and "lora_A" in parts:
        raise UserError("holds both LoRA and MiSS tensors", given=path, expected="one adapter")
    given_alpha = stored.get("lora_alpha", stored.get("alpha"))
    if alpha is not None and ("lora_A" not in parts or given_alpha is not None):
        problem = f"the file says {given_alpha}" if given_alpha is not None else "only LoRA has it"
        raise UserError(problem, flag="lora_alpha", given=f"{alpha:g}", advice="leave it out")
    if "lora_A" in parts:
        r = _lora_rank(tensors, path)
        if given_alpha is None and alpha is None:
            raise UserError(
                f"missing, and {path} doesn't contain it",
                flag="lora_alpha",
                expected=f"the value that this LoRA of rank {r} was trained with",
            )
        config = AdapterConfig(
            kind="dora" if "lora_magnitude" in parts else "lora",
            r=r,
            lora_alpha=float(given_alpha if alpha is None else alpha),  # type: ignore[arg-type]
            lora_dropout=float(stored.get("lora_dropout") or 0.0),
            use_rslora=bool(stored.get("use_rslora", False)),
            target_modules=targets,
            train=train,
        )
    elif "miss_block" in parts:
        dropout = float(stored.get("miss_dropout") or 0.0)
        config = AdapterConfig("miss", _miss_rank(tensors, path), 0.0, dropout, target_modules=targets, train=train)
    else:
        config = AdapterConfig("state", target_modules=(), train=train)
    if stored.get("r", config.r) != config.r:
        raise UserError(f"{CONFIG} says rank {stored['r']}, its tensors have {config.r}", given=path)
    return config


def _lora_rank(tensors: Weights, path: Path) -> int:
    """The one rank of all pairs. Raises UserError for a tensor without its other half, and for several ranks."""
    ranks = {}
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        if part not in ("lora_A", "lora_B"):
            continue
        other = tensors.get(f"{stem}.{'lora_B' if part == 'lora_A' else 'lora_A'}")
        if other is None or tensor.dim() != 2 or other.dim() != 2:
            raise UserError(f"{name} {list(tensor.shape)} has no other half", given=path, expected="pairs of matrices")
        ranks[name] = tensor.shape[0 if part == "lora_A" else 1]
    return _one_rank(ranks, path)


def _miss_rank(tensors: Weights, path: Path) -> int:
    """The one rank of all blocks. Raises UserError for several, and for the form "bat"."""
    blocks = {name: tensor for name, tensor in tensors.items() if name.endswith(".miss_block")}
    if bat := next((name for name, tensor in blocks.items() if tensor.dim() != 2), ""):
        raise UserError(
            f"{bat} is {list(blocks[bat].shape)}: MiSS in the form bat, which is not read",
            given=path,
            expected="[rank, out] (the form bone, PEFT's default)",
        )
    return _one_rank({name: tensor.shape[0] for name, tensor in blocks.items()}, path)


def _one_rank(ranks: Mapping[str, int], path: Path) -> int:
    first = next(iter(ranks))
    if other := next((name for name, r in ranks.items() if r != ranks[first]), ""):
        raise UserError(f"{first} has rank {ranks[first]}, {other} has {ranks[other]}", given=path, expected="one rank")
    return ranks[first]

"""Weights files: read without executing code, sizes inferred from the tensors, checked against a model."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from src.config import ModelConfig
from src.errors import UserError
from src.files import atomic_write

Weights = dict[str, Tensor]
# Unused by the model; official files contain them, some other files don't.
IDLE_IN_LAYER_0 = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
# Put before parameter names by DeepSpeed and Lightning, DDP, and torch.compile.
WRAPPER_PREFIXES = ("_forward_module.", "module.", "_orig_mod.")
# Parameters whose two dimensions give the model's sizes.
SIZE_PARAMETERS = (
    *("emb.weight", "head.weight"),
    *("blocks.0.att.r_k", "blocks.0.att.w1", "blocks.0.att.a1", "blocks.0.att.g1", "blocks.0.ffn.key.weight"),
)
SHOWN_MISMATCHES = 3  # of what may be every parameter of the model: a message has two lines


def read_weights(path: str | Path) -> Weights:
    """The tensors of a .pth or .safetensors file by parameter name, on the CPU; no code in the file is executed.

    Raises UserError when the file is missing, truncated, not a state dict, or contains more than plain tensors.
    """
    path = Path(path)
    if path.is_dir():
        examples = ", ".join(sorted(file.name for file in path.glob("*.pth"))[:4])
        raise UserError(
            "a folder", given=path, expected="a weights file" + (f" in it ({examples})" if examples else "")
        )
    if not path.is_file():
        raise UserError("no such weights file", given=path, advice="check the path (--load_model, --proj_dir)")
    try:
        path.open("rb").close()  # so that a missing permission isn't taken for a damaged file below
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror})", given=path, advice="check its permissions") from error
    try:
        loaded = _load(path)
    except Exception as error:  # torch.load raises half a dozen types for a damaged file
        # Only the text of torch's error has the rejected name: "Unsupported global: GLOBAL os.system was not ...".
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"not opened, as it contains more than plain tensors: that could run code, it calls {code[1]}",
                given=path,
                expected="a state dict saved by torch.save",
            ) from error
        raise UserError(
            "cut short or not a weights file", given=path, advice="copy or download it again, or name another file"
        ) from error
    return _state_dict(loaded, path)


def _load(path: Path) -> object:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    # Mapped, so that memory holds only what is used; files of torch < 1.6 aren't zip archives and can't be mapped.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _state_dict(loaded: object, path: Path) -> Weights:
    """`loaded` under plain names. Raises UserError unless it maps strings to dense tensors."""
    expected = "a state dict (a mapping from parameter names to tensors)"
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(f"contains a {type(loaded).__name__}", given=path, expected=expected)
    invalid = [name for name, value in loaded.items() if not _is_entry(name, value)]
    if invalid:
        nested = [name for name in invalid if _is_rwkv(loaded[name])]
        raise UserError(
            f"not a state dict: the entry {', '.join(map(repr, invalid[:3]))} is not a parameter",
            given=path,
            expected=expected,
            advice=f"its entry {nested[0]!r} contains the weights: save that one alone with torch.save"
            if nested
            else "",
        )
    return {_plain_name(name): tensor for name, tensor in loaded.items()}


def _is_entry(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided


def _is_rwkv(value: object) -> bool:
    """Whether a value within a checkpoint of another trainer looks like the model's state dict."""
    return isinstance(value, dict) and "emb.weight" in (_plain_name(str(name)) for name in value)


def _plain_name(name: str) -> str:
    for prefix in WRAPPER_PREFIXES:
        name = name.removeprefix(prefix)
    return name


def config_from_weights(weights: Weights, source: str, kernel: str = "auto") -> ModelConfig:
    """The configuration of the model that a state dict belongs to. Raises UserError when it isn't an RWKV-7 model's."""
    if missing := [name for name in SIZE_PARAMETERS if name not in weights]:
        raise UserError(
            f"not RWKV-7 weights: {missing[0]} is missing (the file begins with {', '.join(list(weights)[:3])})",
            given=source,
            expected="the state dict of an RWKV-7 (x070) model",
        )
    if reshaped := [f"{name} is {list(weights[name].shape)}" for name in SIZE_PARAMETERS if weights[name].dim() != 2]:
        raise UserError(
            f"the model's sizes are unknown: {', '.join(reshaped)}", given=source, expected="two dimensions each"
        )
    layers = {int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}
    if layers != set(range(len(layers))):
        gaps = sorted(set(range(max(layers))) - layers)
        raise UserError(f"blocks {gaps} are missing", given=source, advice="copy or download it again")
    vocab_size, n_embd = weights["emb.weight"].shape
    # Layer 0's v1 may be missing or a placeholder of another shape, so layer 1's is preferred where there is one.
    value_residuals = [v1 for i in (1, 0) if (v1 := weights.get(f"blocks.{i}.att.v1")) is not None and v1.dim() == 2]
    return ModelConfig(
        n_layer=len(layers),
        n_embd=n_embd,
        vocab_size=vocab_size,
        head_size=weights["blocks.0.att.r_k"].shape[1],
        dim_ffn=weights["blocks.0.ffn.key.weight"].shape[0],
        d_decay_lora=weights["blocks.0.att.w1"].shape[1],
        d_aaa_lora=weights["blocks.0.att.a1"].shape[1],
        d_mv_lora=value_residuals[0].shape[1] if value_residuals else 0,
        d_gate_lora=weights["blocks.0.att.g1"].shape[1],
        kernel=kernel,
    )


def fit_weights(weights: Weights, model: nn.Module, source: str, partial: bool = False) -> Weights:
    """`weights` with exactly the names and shapes of `model`'s state dict.

    Layer 0's unused v0, v1, v2 become zeros where the file lacks them. With `partial`, other parameters that the file
    lacks keep the model's values. Raises UserError for other missing or unknown names, for shapes that differ, with the
    sizes that the weights would fit, and for integer tensors: quantised weights can't be used without their scales.
    """
    integers = [f"{name} is {_dtype_name(t)}" for name, t in weights.items() if not t.is_floating_point()]
    if integers:
        raise UserError(
            ", ".join(integers[:SHOWN_MISMATCHES]),
            given=source,
            expected="floating point weights (fp32, bf16, fp16)",
            advice="use the file from before quantisation",
        )
    targets = model.state_dict()
    fitted = _with_idle_parameters(weights, targets)
    # Released files may store w0 and other vectors as [C] instead of [1, 1, C].
    for name, tensor in fitted.items():
        if name in targets and tensor.squeeze().shape == targets[name].squeeze().shape:
            fitted[name] = tensor.reshape(targets[name].shape)
    if partial:
        fitted = {**targets, **fitted}
    if mismatches := _mismatches(fitted, targets):
        more = len(mismatches) - SHOWN_MISMATCHES
        raise UserError(
            f"these weights don't fit the model: {', '.join(mismatches[:SHOWN_MISMATCHES])}"
            + (f", and {more} more" if more > 0 else ""),
            given=source,
            advice=_sizes_of(weights, source),
        )
    return {name: fitted[name] for name in targets}  # in the model's order, in which files are then written


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _with_idle_parameters(weights: Weights, targets: Mapping[str, Tensor]) -> Weights:
    """A copy of `weights` in which layer 0's unused parameters have the model's shapes."""
    fitted = dict(weights)
    for name in IDLE_IN_LAYER_0:
        if name in targets and (name not in fitted or fitted[name].shape != targets[name].shape):
            dtype = weights.get("emb.weight", targets[name]).dtype  # of the file: a file has one dtype
            fitted[name] = torch.zeros(targets[name].shape, dtype=dtype)
    return fitted


def _mismatches(weights: Weights, targets: Mapping[str, Tensor]) -> list[str]:
    """What differs between two state dicts, a clause per parameter: shapes, then missing names, then unknown ones."""
    shapes = [
        f"{name} is {list(weights[name].shape)}, expected {list(target.shape)}"
        for name, target in targets.items()
        if name in weights and weights[name].shape != target.shape
    ]
    missing = [f"{name} is missing" for name in targets if name not in weights]
    return shapes + missing + [f"{name} is unknown" for name in weights if name not in targets]


def _sizes_of(weights: Weights, source: str) -> str:
    """The flags of the model that the weights belong to."""
    try:
        config = config_from_weights(weights, source)
    except UserError as error:
        return f"they are not a complete RWKV-7 model: {error.problem}"
    sizes = ("n_layer", "n_embd", "vocab_size", "head_size", "dim_ffn")
    ranks = ("d_decay_lora", "d_aaa_lora", "d_mv_lora", "d_gate_lora")
    return "they fit " + " ".join(f"--{name} {getattr(config, name)}" for name in (*sizes, *ranks))


def save_weights(weights: Weights, path: Path) -> None:
    """Write a state dict to `path`, whole or not at all; the tensors may be on any device.

    Raises OSError with the path when that fails twice (disk full, folder removed, no permission).
    """
    weights = {name: tensor.detach().to("cpu").contiguous() for name, tensor in weights.items()}
    # A second attempt, as network file systems fail for a moment. Then the run stops: it shouldn't train without
    # saving.
    for attempt in (1, 2):
        try:
            with atomic_write(path) as file:
                torch.save(weights, file)
            return
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a failed write
            if attempt == 2:
                raise OSError(
                    f"{path} could not be written ({str(error).splitlines()[0]}). Weights saved before are complete: "
                    "free disk space or repair the folder and run the same command again, which continues from them"
                ) from error

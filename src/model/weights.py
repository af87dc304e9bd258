"""Weights files: reading them without running code, their sizes, and whether they fit a model."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from src.config import ModelConfig
from src.errors import UserError
from src.files import atomic_write

Weights = dict[str, Tensor]
IDLE_IN_LAYER_0 = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")  # files may lack them
# what DeepSpeed, DDP and torch.compile put before names
FOREIGN_PREFIXES = ("_forward_module.", "module.", "_orig_mod.")


def read_weights(path: str | Path) -> Weights:
    """The tensors of a .pth (or .safetensors) file by name, on the CPU, without executing anything that the file may contain.

    Raises ValueError with the path and what to do when the file is missing, cut, not a weights file, or not safe to open.
    """
    path = Path(path)
    if path.is_dir():
        some = ", ".join(sorted(file.name for file in path.glob("*.pth"))[:4])
        raise UserError(f"{path}: a folder; name a weights file" + (f" in it ({some})" if some else " (.pth)"))
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; check the path (--load_model, --proj_dir)")
    loaded: object
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); make it readable, or name another file") from error
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded = load_file(path)
        else:
            loaded = _torch_load(path)
    except Exception as error:  # torch raises half a dozen types here; all mean that the file is not usable
        if called := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path}: holds more than plain tensors and was not opened: that could run code, it calls {called.group(1)}; "
                "expected a state dict saved by torch.save"
            ) from error
        raise UserError(
            f"{path}: cut short or not a weights file; copy or download it again, or name another file"
        ) from error
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(f"{path}: not a state dict (a mapping from parameter names to tensors)")
    strange = [
        key
        for key, t in loaded.items()
        if not (isinstance(key, str) and isinstance(t, Tensor) and t.layout == torch.strided)
    ]
    if strange:
        inner = [
            key
            for key in strange
            if isinstance(loaded[key], dict) and "emb.weight" in map(_plain_name, map(str, loaded[key]))
        ]
        advice = (
            f"; the weights are in its part {inner[0]!r}: save that alone (torch.save(torch.load(FILE)[{inner[0]!r}], NEW))"
            if inner
            else ""
        )
        some = ", ".join(map(repr, strange[:3]))
        raise UserError(
            f"{path}: not a state dict (a mapping from parameter names to tensors): {some} is no such entry{advice}"
        )
    return {_plain_name(name): tensor for name, tensor in loaded.items()}


def _torch_load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # a file of torch < 1.6 can't be mapped


def _plain_name(name: str) -> str:
    for prefix in FOREIGN_PREFIXES:
        name = name.removeprefix(prefix)
    return name


def config_from_weights(weights: Weights, source: str, kernel: str = "auto") -> ModelConfig:
    """The model that a state dict belongs to. Raises ValueError when it is no RWKV-7 model's."""
    needed = (
        "emb.weight",
        "head.weight",
        *(f"blocks.0.att.{name}" for name in ("r_k", "w1", "a1", "g1")),
        "blocks.0.ffn.key.weight",
    )
    lacking = [name for name in needed if name not in weights]
    if lacking:
        some = ", ".join(list(weights)[:3])
        raise UserError(
            f"{source}: not RWKV-7 weights: {lacking[0]} is missing (the file begins with {some}); expected the state dict of an RWKV-7 (x070) model"
        )
    if flat := [f"{name} is {list(weights[name].shape)}" for name in needed if weights[name].dim() != 2]:
        raise UserError(
            f"{source}: the model's sizes can't be read: {', '.join(flat)}, expected two dimensions each; save it with its own shape"
        )
    layers = {int(m.group(1)) for m in (re.match(r"blocks\.(\d+)\.", name) for name in weights) if m}
    if layers != set(range(len(layers))):
        raise UserError(
            f"{source}: blocks {sorted(set(range(max(layers))) - layers)} are missing; copy or download it again, whole"
        )
    vocab_size, n_embd = weights["emb.weight"].shape
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
    """`weights` completed and checked for `model`: the same names and shapes, all there.

    Layer 0's idle v0, v1, v2 are made up where a file lacks them. With `partial`, parameters that the file lacks keep the
    model's values. Raises ValueError with the first names that don't fit and the sizes that would, and for numbers that are no
    floating point ones: those of a quantised file mean nothing without their scales.
    """
    if whole := [
        f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in weights.items()
        if not tensor.is_floating_point()
    ]:
        raise UserError(
            f"{source}: {', '.join(whole[:3])}: expected floating point weights (fp32, bf16, fp16); use the file before it was quantised"
        )
    wanted = model.state_dict()
    fitted = dict(weights)
    for name in IDLE_IN_LAYER_0:
        if name in wanted and (name not in fitted or fitted[name].shape != wanted[name].shape):
            like = weights["emb.weight"] if "emb.weight" in weights else wanted[name]
            fitted[name] = torch.zeros(wanted[name].shape, dtype=like.dtype)
    # a released file may carry w0 and the like as [C]; only the number of values matters, as it does to every reader
    for name, tensor in fitted.items():
        if (
            name in wanted
            and tensor.shape != wanted[name].shape
            and tensor.squeeze().shape == wanted[name].squeeze().shape
        ):
            fitted[name] = tensor.reshape(wanted[name].shape)
    missing = [name for name in wanted if name not in fitted]
    if partial:
        fitted.update({name: wanted[name] for name in missing})
        missing = []
    foreign = [name for name in fitted if name not in wanted]
    misfits = [
        f"{name} is {list(fitted[name].shape)}, expected {list(wanted[name].shape)}"
        for name in wanted
        if name in fitted and fitted[name].shape != wanted[name].shape
    ]
    misfits += [f"{name} is missing" for name in missing] + [f"{name} is unknown" for name in foreign]
    if misfits:
        raise UserError(
            f"{source}: these weights don't fit the model: {'; '.join(misfits[:3])}"
            + (f"; and {len(misfits) - 3} more" if len(misfits) > 3 else "")
            + f".\n{_size_that_would_fit(weights, source)}"
        )
    return {name: fitted[name] for name in wanted}


def _size_that_would_fit(weights: Weights, source: str) -> str:
    try:
        own = config_from_weights(weights, source)
    except ValueError as error:
        return f"They are not a whole RWKV-7 model: {error}"
    return (
        f"They would fit --n_layer {own.n_layer} --n_embd {own.n_embd} --vocab_size {own.vocab_size} --head_size {own.head_size}"
        f" --dim_ffn {own.dim_ffn} --d_decay_lora {own.d_decay_lora} --d_aaa_lora {own.d_aaa_lora}"
        f" --d_mv_lora {own.d_mv_lora} --d_gate_lora {own.d_gate_lora}"
    )


def save_weights(weights: Weights, path: Path) -> None:
    """Write a state dict under `path`, whole or not at all; tensors on any device.

    Tried twice. Then OSError (disk full, folder gone, no permission) with the path: a run stops rather than train on without being saved.
    """
    weights = {name: tensor.detach().to("cpu").contiguous() for name, tensor in weights.items()}
    for last_try in (False, True):
        try:
            with atomic_write(path) as file:
                torch.save(weights, file)
            return
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            if last_try:
                raise OSError(
                    f"{path} could not be written ({str(error).splitlines()[0]}). The weights saved before are whole; "
                    "free some space or repair the folder and run the same command again: it continues from them"
                ) from error

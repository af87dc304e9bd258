"""Weights files: read without executing code, sizes inferred from the tensors, checked against a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from src.config import ModelConfig
from src.errors import UserError, UserErrors
from src.files import atomic_write, write_twice
from src.model.file_kind import file_kind
from src.model.shared_memory import IDLE_IN_LAYER_0, separate
from src.model.torch_file import damaged_file, read_torch_file

Weights = dict[str, Tensor]
MAX_LAYERS = 1024  # the largest released model has 61
# Put before parameter names by DeepSpeed and Lightning, DDP, torch.compile, and the RWKV-7 class that was proposed for
# transformers, whose names are otherwise these.
WRAPPER_PREFIXES = ("_forward_module.", "module.", "_orig_mod.", "rwkv7.")
# Parameters whose two dimensions give the model's sizes.
SIZE_PARAMETERS = (
    *("emb.weight", "head.weight"),
    *("blocks.0.att.r_k", "blocks.0.att.w1", "blocks.0.att.a1", "blocks.0.att.g1", "blocks.0.ffn.key.weight"),
)
ADAPTER_ADVICE = "merge them: python -m src.inference.export BASE MERGED.pth --adapter FILE; chat takes --adapter, too"
# Parameters that an RWKV-7 state dict doesn't have: a pattern, what a file with them is, and what to do. The first
# match counts, so what is specific comes first: RWKV-7b has the parameters of 7a as well.
OTHER_FILES = (
    (
        r"lora_(A|B|magnitude)|\.(att|ffn)\.\w+\.lora\.[01]$",
        "LoRA weights, which change a base model",
        ADAPTER_ADVICE,
    ),
    (
        r"\.(disha|bone|miss_block)\b",
        "MiSS (DiSHA, Bone) weights, which change a base model",
        ADAPTER_ADVICE,
    ),
    (
        r"\.att\.time_state$",
        "tuned initial states",
        "name the weights that they belong to; programs that run them take --state",
    ),
    (r"^blocks\.\d+\.qkv\.", "weights of an RWKV-7b model, with DeepEmbed and its attention", ""),
    (
        r"^blocks\.\d+\.att\.query\.",
        "weights of a hybrid, some of whose blocks are attention",
        "load them in Python: RWKV7(ModelConfig(blocks=...)).load_state_dict(...) (docs/layers.md)",
    ),
    (r"\.ffn\.s_emb", "weights of an RWKV-7a model, with DeepEmbed", ""),
    (r"\.time_(decay|first|faaaa|maa_\w+|mix_\w+)", "weights of an earlier version, RWKV-4, 5 or 6", ""),
)
SHOWN_MISMATCHES = 3  # of what may be every parameter of the model: a message has two lines


def read_weights(path: str | Path) -> Weights:
    """The tensors of a weights file by parameter name, on the CPU; no code in the file is executed.

    It is read as what its first bytes say (`file_kind`), whatever its name: torch.save's format, also that of PyTorch
    before 1.6, or safetensors. Raises UserError when it is missing, truncated, of another program, not a state dict,
    or contains more than plain tensors.
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
        return _state_dict(_load(path), path)
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror})", given=path, advice="check its permissions") from error


def _load(path: Path) -> object:
    if file_kind(path) != "safetensors":
        return read_torch_file(path, mmap=True)  # mapped, so that memory holds only what is used
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a dtype that torch doesn't have
        raise damaged_file(path) from error


def _state_dict(loaded: object, path: Path) -> Weights:
    """`loaded` under plain names. Raises UserError unless it maps strings to plain tensors with memory of their own."""
    expected = "a state dict (a mapping from parameter names to tensors)"
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(f"contains a {type(loaded).__name__}", given=path, expected=expected)
    invalid = [name for name, value in loaded.items() if not _is_entry(name, value)]
    if invalid:
        nested = [name for name in invalid if _is_rwkv(loaded[name])]
        raise UserError(
            f"not a state dict: the entry {', '.join(repr(name)[:80] for name in invalid[:3])} is not a parameter",
            given=path,
            expected=expected,
            advice=f"its entry {nested[0]!r} contains the weights: save it alone with torch.save" if nested else "",
        )
    weights = {plain_name(name): tensor for name, tensor in loaded.items()}
    if len(weights) < len(loaded):
        raise UserError(
            "two entries are one parameter, with and without the prefix of a wrapper", given=path, expected=expected
        )
    for name, tensor in weights.items():
        if not tensor.numel() and name not in IDLE_IN_LAYER_0:
            raise UserError(f"{name} is {list(tensor.shape)}", given=path, expected="a value in each parameter")
    separate(weights, path)
    return weights


def _is_entry(name: object, value: object) -> bool:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and value.device.type == "cpu" and not (value.is_nested or value.is_quantized)


def _is_rwkv(value: object) -> bool:
    """Whether a value within a checkpoint of another trainer looks like the model's state dict."""
    return isinstance(value, dict) and "emb.weight" in (plain_name(str(name)) for name in value)


def plain_name(name: str) -> str:
    """The name of a parameter without the prefixes of the modules that wrapped the model."""
    for prefix in WRAPPER_PREFIXES:
        name = name.removeprefix(prefix)
    return name


def config_from_weights(weights: Weights, source: str, kernel: str = "auto") -> ModelConfig:
    """The configuration of the model that a state dict belongs to. Raises UserError when it isn't an RWKV-7 model's."""
    _check_kind(weights, source)
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
    # Of few digits, and compared with a bound: the list of the missing ones, or the model, would fill the memory.
    numbers = {match[1] for name in weights if (match := re.match(r"blocks\.([0-9]+)\.", name))}
    if too_large := [number for number in numbers if len(number) > 9 or int(number) >= MAX_LAYERS]:
        raise UserError(f"has a block {too_large[0][:20]}", given=source, expected=f"at most {MAX_LAYERS} blocks")
    layers = {int(number) for number in numbers}
    if layers != set(range(len(layers))):
        gaps = sorted(set(range(max(layers))) - layers)
        raise UserError(f"blocks {gaps} are missing", given=source, advice="copy or download it again")
    vocab_size, n_embd = weights["emb.weight"].shape
    # Layer 0's v1 may be missing or a placeholder of another shape, so layer 1's is preferred where there is one.
    value_residuals = [v1 for i in (1, 0) if (v1 := weights.get(f"blocks.{i}.att.v1")) is not None and v1.dim() == 2]
    try:
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
    except UserErrors as error:  # it names flags, and these sizes come from a file
        sizes = ", ".join(f"{fault.flag} {fault.given}, expected {fault.expected}" for fault in error.faults)
        raise UserError(f"no model has these sizes: {sizes}", given=source) from error


def split_states(weights: Weights) -> tuple[Weights, Weights]:
    """The weights of a model and the tuned initial states beside them; a file of states alone stays one."""
    states = {name: tensor for name, tensor in weights.items() if name.endswith(".att.time_state")}
    if "emb.weight" not in weights or not states:
        return weights, {}
    return {name: tensor for name, tensor in weights.items() if name not in states}, states


def _check_kind(weights: Weights, source: str) -> None:
    """Raises UserError, saying what the file is, when its names show something else than an RWKV-7 model."""
    if states := split_states(weights)[1]:
        raise UserError(
            f"a model with tuned initial states beside its weights ({next(iter(states))})",
            given=source,
            expected="weights alone: a model that is trained, or resized, begins every text from zeros",
            advice="name the base that the states were tuned for",
        )
    for pattern, kind, advice in OTHER_FILES:
        if name := next((name for name in weights if re.search(pattern, name)), ""):
            raise UserError(
                f"{kind} ({name})",
                given=source,
                expected="the state dict of an RWKV-7 (x070) model",
                advice=advice,
            )


def fit_weights(weights: Weights, model: nn.Module, source: str, partial: bool = False) -> Weights:
    """`weights` with exactly the names and shapes of `model`'s state dict.

    Layer 0's unused v0, v1, v2 become zeros where the file lacks them. With `partial`, other parameters that the file
    lacks keep the model's values. Raises UserError for files of other kinds (`OTHER_FILES`), for other missing or
    unknown names, for shapes that differ, with the sizes that the weights fit, for integer tensors (quantised weights
    can't be used without their scales), and for values that are not finite.
    """
    _check_kind(weights, source)
    integers = [f"{name} is {_dtype_name(t)}" for name, t in weights.items() if not t.is_floating_point()]
    if integers:
        raise UserError(
            ", ".join(integers[:SHOWN_MISMATCHES]),
            given=source,
            expected="floating point weights (fp32, bf16, fp16)",
            advice="use the file from before quantisation",
        )
    targets = model.state_dict()
    fitted = _reshaped(weights, targets)
    if partial:
        fitted = {**targets, **fitted}
    if mismatches := _mismatches(fitted, targets):
        more = len(mismatches) - SHOWN_MISMATCHES
        raise UserError(
            f"these weights don't fit the model: {', '.join(mismatches[:SHOWN_MISMATCHES])}"
            + (f", and {more} more" if more > 0 else ""),
            given=source,
            advice=_advice(weights, model, source, partial),
        )
    # Here, where the cause is known: later it would be a loss of NaN, or a first token that can't be drawn.
    # Layer 0's v0, v1, v2 are exempt: no result depends on them, and a file may hold uninitialised memory there.
    used = {name: tensor for name, tensor in fitted.items() if name not in IDLE_IN_LAYER_0}
    if damaged := [name for name, tensor in used.items() if not _is_finite(tensor)]:
        subject = f"{damaged[0]} contains" if len(damaged) == 1 else f"{damaged[0]} and {len(damaged) - 1} more contain"
        raise UserError(
            f"{subject} values that are not finite (NaN or infinite)",
            given=source,
            advice="download or copy it again, or use weights that were saved before the training diverged",
        )
    return {name: fitted[name] for name in targets}  # in the model's order, in which files are then written


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta or not tensor.numel():  # on meta: the model's own values, with `partial`
        return True
    if tensor.element_size() == 1:  # fp8, for which the operation below doesn't exist
        tensor = tensor.float()
    # One pass without a copy, where isfinite() would allocate. Where there is a NaN it is both minimum and maximum.
    return all(bool(bound.isfinite()) for bound in tensor.aminmax())


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _reshaped(weights: Weights, targets: Mapping[str, Tensor]) -> Weights:
    """A copy of `weights` with the shapes of `targets` where only dimensions of size 1 differ, and with layer 0's
    unused parameters in the shapes of `targets` in any case."""
    fitted = dict(weights)
    for name in IDLE_IN_LAYER_0:
        if name in targets and (name not in fitted or fitted[name].shape != targets[name].shape):
            dtype = weights.get("emb.weight", targets[name]).dtype  # of the file: a file has one dtype
            fitted[name] = torch.zeros(targets[name].shape, dtype=dtype)
    # Released files may store w0 and other vectors as [C] instead of [1, 1, C].
    for name, tensor in fitted.items():
        target = targets.get(name, tensor)
        if tensor.shape != target.shape and tensor.squeeze().shape == target.squeeze().shape:
            fitted[name] = tensor.reshape(target.shape)
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


def _advice(weights: Weights, model: nn.Module, source: str, partial: bool) -> str:
    """The flags of the model that the weights fit, once they were fitted to it; or that there is none."""
    try:
        config = config_from_weights(weights, source)
    except UserError as error:
        return f"they are not a complete RWKV-7 model: {error.problem}"
    # Of the same class, without an import of it: rwkv7.py imports this module. On meta it takes no memory.
    with torch.device("meta"):
        targets = type(model)(config).state_dict()
    fitted = {**(targets if partial else {}), **_reshaped(weights, targets)}
    if mismatches := _mismatches(fitted, targets):
        return f"no sizes make them fit ({mismatches[0]}): the file is incomplete or of another architecture"
    sizes = ("n_layer", "n_embd", "vocab_size", "head_size", "dim_ffn")
    ranks = ("d_decay_lora", "d_aaa_lora", "d_mv_lora", "d_gate_lora")
    return "they fit " + " ".join(f"--{name} {getattr(config, name)}" for name in (*sizes, *ranks))


def save_weights(weights: Weights, path: Path, check: Callable[[], None] = lambda: None) -> None:
    """Write a state dict to `path`, whole or not at all, unless `check` raises; the tensors may be on any device.

    Raises OSError with the path when that fails twice (disk full, folder removed, no permission).
    """
    weights = {name: tensor.detach().to("cpu").contiguous() for name, tensor in weights.items()}

    def write() -> None:
        with atomic_write(path, check=check) as file:
            torch.save(weights, file)

    write_twice(path, write)

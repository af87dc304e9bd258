"""Finds and loads what MODEL names on a command line: weights, and the tokenizer that belongs to them."""

from __future__ import annotations

from pathlib import Path

import torch

from src.adapt.adapter_files import CONFIG as ADAPTER_CONFIG
from src.dataset.tokenizer import WORLD_VOCAB_SIZE, Tokenizer, load_tokenizer
from src.errors import UserError
from src.inference.adaptation import NOTHING, Adaptation, adapted_base, multimodal_folder, multimodal_model
from src.inference.formats.fla import CONFIG, from_fla, is_fla, is_fla_folder, read_config, read_fla
from src.inference.formats.gguf import read_gguf
from src.inference.formats.gguf_file import is_gguf
from src.inference.formats.gguf_tokenizer import tokenizer_of_gguf
from src.inference.formats.hf_tokenizer import is_world_folder
from src.inference.formats.shards import is_part, read_json
from src.inference.formats.web_rwkv import from_web_rwkv, is_web_rwkv
from src.model import RWKV7
from src.model.weights import Weights, config_from_weights, read_weights, split_states
from src.multimodal.files import RECORD, is_media_folder, load_front_end, read_record
from src.ops.devices import default_precision, find_device
from src.run_folder import BEST, FINAL, INIT, TOKENIZER, TUNED_STATE, newest_weights, numbered_weights, read_run

WEIGHTS_SUFFIXES = (".pth", ".safetensors", ".st", ".gguf")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def holds_model(path: Path) -> bool:
    """Whether `path` is itself what `load_weights` reads: a file, or a folder in a Hugging Face layout."""
    return path.is_file() or is_fla_folder(path)


def find_weights(model: str | Path) -> Path:
    """The path of the weights that `model` names.

    A weights file or a Hugging Face folder is its own path; in a run's folder it is rwkv-final.pth, else the highest
    rwkv-N.pth, else rwkv-init.pth. Raises UserError when there is none.
    """
    path = Path(model)
    if holds_model(path):
        return path
    if (folder := multimodal_folder(path)) is not None:
        language_model, beside = multimodal_model(folder, Adaptation())
        if beside.adapter:
            raise UserError(
                "its language model is a base with an adapter",
                given=path,
                advice=f"merge it first: python -m src.inference.export {path} MERGED.pth; then use --load_model "
                f"MERGED.pth --load_projector {path}",
            )
        if beside.state:
            raise UserError(
                "its language model is a base with tuned initial states",
                given=path,
                advice=f"name the base, --load_model {language_model}, and --load_projector {path}",
            )
        return language_model
    if not path.is_dir():
        raise UserError("no such file or folder", given=path, expected="a weights file or a run's folder (--proj_dir)")
    if (weights := newest_weights(path)) is not None:
        return weights
    if (found := adapted_base(path, Adaptation())) is not None:
        base, adaptation = found
        if adaptation.state:  # a file with states beside the weights couldn't be trained either
            raise UserError("the folder of tuned initial states", given=path, advice=f"name their base, {base}")
        raise UserError(
            "the folder of an adapter (LoRA or similar), which changes a base model",
            given=path,
            advice=f"merge it first: python -m src.inference.export {path} MERGED.pth",
        )
    if (path / CONFIG).is_file() and "model_type" in read_json(path / CONFIG):
        read_config(path)  # for its error, as it is another model's
    others = sorted(file for file in path.iterdir() if file.suffix in WEIGHTS_SUFFIXES)
    raise UserError(
        f"the folder contains no {FINAL}, rwkv-N.pth or {INIT}",
        given=path,
        advice="name a weights file" + (f", such as {others[0]} (one of {len(others)})" if others else ""),
    )


def find_model(model: str | Path, adaptation: Adaptation = NOTHING) -> tuple[Path, Adaptation]:
    """As `find_weights`, and what is applied to the weights: `model` may also be the folder of a run that trained an
    adapter or initial states, or such a result, and names its base with it."""
    path = Path(model)
    if (folder := multimodal_folder(path)) is not None:
        return multimodal_model(folder, adaptation)
    base: str | Path = path
    if not holds_model(path) or TUNED_STATE.matches(path.name):
        is_run_of_weights = path.is_dir() and newest_weights(path) is not None
        if not is_run_of_weights and (found := adapted_base(path, adaptation)) is not None:
            base, adaptation = found
    if adaptation.state_layout and not adaptation.state:
        raise UserError("needs --state", flag="state_layout", given=adaptation.state_layout)
    return find_weights(base), adaptation


def latest_trained_weights(out: Path) -> Path:
    """The newest weights or adapter of all runs under `out`, by time, except initial weights.

    Raises UserError if there are none.
    """
    # By time and not by run: the run of interest is the one that was trained last. Archived runs are older.
    folders = {path.parent for path in out.glob("**/*.pth")}
    named = [folder / name for folder in folders for name in (FINAL, BEST)]
    candidates = [path for path in named if path.is_file()]
    candidates += [path for folder in folders for path in numbered_weights(folder).values()]
    candidates += [path for path in out.glob("**/*.pth") if TUNED_STATE.matches(path.name)]
    candidates += [path.parent for path in out.glob(f"**/{ADAPTER_CONFIG}")]
    candidates = [path for path in candidates if not is_media_folder(path.parent)]  # its part: the folder counts
    candidates += [path.parent for path in out.glob(f"**/{RECORD}")]
    if not candidates:
        raise UserError(
            f"MODEL is missing, and there are no trained weights under {out}/", advice="name a weights file"
        )
    return max(candidates, key=lambda path: path.stat().st_mtime)


class UnknownTokenizerError(UserError):
    """Nothing says which tokenizer belongs to the weights."""


def find_tokenizer(weights: Path, vocab_size: int, given: str = "", adaptation: Adaptation = NOTHING) -> Tokenizer:
    """The tokenizer of `weights`: `given`, else that of the run that trained the adapter, else the one in a GGUF file,
    else that of the folder or run of the weights, else World for a vocabulary of its size.

    Raises UnknownTokenizerError when none of these exists, another UserError when it can't be read or has an id that
    the model lacks.
    """
    name = given or next(filter(None, map(_tokenizer_of_result, adaptation.paths)), "")
    contains_one = not name and is_gguf(weights)
    if not name and not contains_one:
        name = _tokenizer_within(weights) if weights.is_dir() else _tokenizer_of_run(weights.parent)
    if not name and not contains_one:
        # A weights file has no other hint. Released World models have exactly this many rows.
        if vocab_size != WORLD_VOCAB_SIZE:
            raise UnknownTokenizerError(
                f"missing, and nothing next to {weights} names one",
                flag="tokenizer",
                expected="world or a Hugging Face tokenizer folder",
            )
        name = "world"
    tokenizer = tokenizer_of_gguf(weights) if contains_one else load_tokenizer(name)
    # The other way round is common: vocabularies are padded to a multiple of 64 or more.
    if tokenizer.largest_id >= vocab_size:
        raise UserError(
            f"its largest id is {tokenizer.largest_id}, but {weights} has a vocabulary of {vocab_size}",
            flag="tokenizer",
            given=tokenizer.name,
            expected="the tokenizer that the model was trained with",
        )
    return tokenizer


def _tokenizer_of_result(path: Path) -> str:
    """The tokenizer of an adapter, a state or a folder with a front end: that of its own record or of its run."""
    if is_media_folder(path) and (name := read_record(path).tokenizer):
        return name if name == "world" else str(path / name)
    return _tokenizer_of_run(path.parent)


def _tokenizer_within(folder: Path) -> str:
    """The tokenizer of a Hugging Face model folder: the folder itself, "world", or ""."""
    if is_world_folder(folder):
        return "world"
    return str(folder) if (folder / "tokenizer.json").is_file() else ""


def _tokenizer_of_run(folder: Path) -> str:
    """The tokenizer that a run recorded: "world", the copy in its folder, the path it was read from, or ""."""
    recorded = read_run(folder).get("tokenizer", "")
    if recorded == "world":
        return recorded
    # The copy comes first: the recorded path may have changed since, or be that of another machine.
    copy = folder / TOKENIZER
    return str(copy) if copy.is_dir() else recorded


def pretrained_only(weights: Path, adaptation: Adaptation = NOTHING) -> bool:
    """Whether what was trained last, the adapter or the weights, lies in a pretraining run's folder: the model
    continues text and hasn't learned to chat."""
    runs = [path.parent for path in adaptation.paths] or [weights.parent] * (not weights.is_dir())
    kinds = [read_run(folder).get("settings", {}).get("data_type") for folder in runs]
    return "binidx" in kinds and "sft" not in kinds


def load_weights(path: Path) -> Weights:
    """The state dict in `path` (from `find_weights`) under the names of `RWKV7`, whichever format it is stored in.

    Raises UserError when it can't be read; whether it is a whole RWKV-7 model is for `fit_weights` to say.
    """
    # A folder is in a Hugging Face layout; a run's folder was resolved to a file by `find_weights`.
    if path.is_dir():
        return read_fla(path)
    if is_part(path):
        raise UserError("one of several parts of a model", given=path, advice=f"name its folder, {path.parent}")
    if is_gguf(path):
        return read_gguf(path)
    weights = read_weights(path)
    if is_fla(weights):
        return from_fla(weights)
    return from_web_rwkv(weights) if is_web_rwkv(weights) else weights


def load_model(
    weights: Path, dtype: str | None = None, device: str | None = None, adaptation: Adaptation = NOTHING
) -> RWKV7:
    """The model in `weights` (a path from `find_weights`), in evaluation mode and without gradients.

    dtype       a key of DTYPES, or "as is" for that of the file; None: bf16 on GPUs of cuda and xpu, else fp32
    device      None: the first GPU, without one the CPU
    adaptation  an adapter is merged, so that decoding is as fast as without; an initial state is where texts begin

    Raises UserError when the weights, the adapter or the device can't be used.
    """
    target = find_device(device or ("cuda" if torch.cuda.is_available() else "cpu"), "device")
    # bf16 halves the memory and doubles the speed on a GPU. A CPU keeps fp32 arithmetic: decoding reads weights that
    # came from bf16 in compressed form all the same.
    torch_dtype = None if dtype == "as is" else DTYPES[dtype or default_precision(target.type)]
    tensors = load_weights(weights)
    if adaptation:
        config_from_weights(split_states(tensors)[0], str(weights))  # for its error, where this is no model
        tensors = adaptation.apply(tensors, torch_dtype)
    model = RWKV7.from_weights(tensors, str(weights), torch_dtype, target)
    if adaptation.media:
        load_front_end(model, Path(adaptation.media))
    return model.eval().requires_grad_(False)

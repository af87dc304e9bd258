"""What MODEL means on a command line: a weights file or a run's folder, and the tokenizer that belongs to it."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from src.dataset.tokenizer import WORLD_VOCAB_SIZE, Tokenizer, load_tokenizer
from src.errors import UserError
from src.inference.fla import is_fla_folder, read_fla
from src.model import RWKV7

MODEL_HELP = "weights (.pth, .safetensors), a run's folder, or a Hugging Face folder in flash-linear-attention's layout"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_weights(model: str | Path) -> Path:
    """What `model` names: itself where it is a weights file or a Hugging Face folder; in a run's folder rwkv-final.pth, else the
    highest rwkv-N.pth, else rwkv-init.pth. ValueError when there is none."""
    model = Path(model)
    if model.is_file() or is_fla_folder(model):
        return model
    if not model.is_dir():
        raise UserError(f"MODEL {model}: no such file or folder; expected a .pth file or a run's folder (--proj_dir)")
    for path in _weights_of_run(model):
        return path
    others = sorted(path.name for path in model.iterdir() if path.suffix in (".pth", ".safetensors"))
    one_of = f", for example {model / others[0]} (there are {len(others)})" if others else ""
    raise UserError(
        f"MODEL {model}: the folder holds no rwkv-final.pth, rwkv-N.pth or rwkv-init.pth; name the weights file itself{one_of}"
    )


def _weights_of_run(folder: Path) -> Iterator[Path]:
    """A run's weights, the furthest trained first."""
    numbered = [
        (int(m.group(1)), path)
        for path in folder.glob("rwkv-*.pth")
        if (m := re.fullmatch(r"rwkv-(\d+)\.pth", path.name))
    ]
    candidates = [
        folder / "rwkv-final.pth",
        *(path for _, path in sorted(numbered, reverse=True)),
        folder / "rwkv-init.pth",
    ]
    return (path for path in candidates if path.is_file())


def find_tokenizer(weights: Path, vocab_size: int, given: str = "") -> Tokenizer:
    """The tokenizer of `weights`: the one `given`, else what the run recorded beside them, else World for a vocabulary of its size.

    ValueError when it can't be known, or when it has more entries than the model has rows.
    """
    recorded = _tokenizer_within(weights) if weights.is_dir() else _recorded_tokenizer(weights.parent)
    tokenizer = load_tokenizer(given or recorded or _by_size(weights, vocab_size))
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"--tokenizer {tokenizer.name} has {tokenizer.vocab_size} entries, {weights} only {vocab_size} rows: they don't belong "
            "together; give the tokenizer that the model was trained with"
        )
    return tokenizer


def _tokenizer_within(folder: Path) -> str:
    return str(folder) if (folder / "tokenizer.json").is_file() else ""


def pretrained_only(weights: Path) -> bool:
    """Whether the run that `weights` lie in says that it was pretraining: such a model continues text and can't chat."""
    return not weights.is_dir() and _record(weights.parent).get("settings", {}).get("data_type") == "binidx"


def _record(folder: Path) -> dict[str, Any]:
    """What a run wrote down about itself; {} in other folders."""
    record = folder / "run.json"
    try:
        return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{record}: can't be read ({error}); mend it, or move the weights to a folder of their own"
        ) from error


def _recorded_tokenizer(folder: Path) -> str:
    recorded = _record(folder).get("tokenizer", "")
    if recorded == "world":
        return recorded
    copy = folder / "tokenizer"  # what the run recorded may have moved since; its own copy goes with the weights
    return str(copy) if copy.is_dir() else recorded


def _by_size(weights: Path, vocab_size: int) -> str:
    if vocab_size != WORLD_VOCAB_SIZE:
        raise UserError(f"--tokenizer: {weights} doesn't say which; expected world or a Hugging Face tokenizer folder")
    return "world"


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def newest_weights(out: Path) -> Path:
    """The trained weights that were written last in the runs under `out`. ValueError when there are none."""
    found = [path for path in out.glob("**/rwkv-*.pth") if path.name != "rwkv-init.pth"]
    if not found:
        raise UserError(
            f"MODEL: missing, and there are no trained weights under {out}/; name a .pth file or a run's folder"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def add_model_arguments(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """MODEL and how to load it: the same words for every program here."""
    if optional:
        parser.add_argument(
            "model", metavar="MODEL", nargs="?", default="", help=f"{MODEL_HELP}; default: the newest under out/"
        )
    else:
        parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--tokenizer", default="", help='"world" or a Hugging Face folder; default: what the run recorded'
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default=None, help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ...; default: a GPU where there is one")


def load_model(weights: Path, dtype: str | None = None, device: str | None = None) -> RWKV7:
    """The model in `weights` (from `find_weights`), for inference. dtype "as is": that of the file.

    ValueError when the weights or the device are not usable.
    """
    device = device or default_device()
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device}: no such device; expected cpu, cuda or cuda:1") from error
    if named.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: not supported; expected cpu, cuda or cuda:1 (AMD's GPUs are cuda too)")
    if named.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: PyTorch sees no GPU; leave the flag out to use the CPU")
    if named.type == "cuda" and (named.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: there are {torch.cuda.device_count()} GPUs, counted from cuda:0")
    chosen = None if dtype == "as is" else DTYPES[dtype or ("fp32" if named.type == "cpu" else "bf16")]
    if weights.is_dir():
        model = RWKV7.from_weights(read_fla(weights), str(weights), chosen, device)
    else:
        model = RWKV7.from_checkpoint(weights, chosen, device)
    return model.eval().requires_grad_(False)

"""Writes a model in another format or precision, reads it back and compares the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from src.adapt.adapter import add_adapter
from src.config import ModelConfig
from src.dataset.tokenizer import Tokenizer, copy_tokenizer
from src.errors import UserError
from src.files import atomic_write, sync_folder
from src.inference.adaptation import NOTHING, Adaptation
from src.inference.formats.fla import TENSORS, write_fla
from src.inference.load import load_model
from src.model import RWKV7
from src.model.weights import Weights

VERIFIED_TOKENS = 64
# Largest accepted difference between the fp32 logits of what was read back and of the weights that should have been
# written: sums may be computed in another order, and nothing else may differ.
TOLERANCE = 1e-5


def _write_pth(weights: Weights, config: ModelConfig, path: Path, eos_id: int) -> None:
    with atomic_write(path) as file:
        torch.save(weights, file)


def _write_safetensors(weights: Weights, config: ModelConfig, path: Path, eos_id: int) -> None:
    from safetensors.torch import save_file

    with atomic_write(path) as file:
        save_file(weights, file.name)


@dataclass(frozen=True)
class Format:
    """`write(weights, config, path, eos_id)` creates `path`: a file that ends in `suffix`, or ("") a folder.

    `holds_states`: tuned initial states have a place in it, blocks.N.att.time_state beside the weights.
    """

    suffix: str
    write: Callable[[Weights, ModelConfig, Path, int], None]
    holds_states: bool = False

    @property
    def is_folder(self) -> bool:
        return not self.suffix


# A new format is a module with its reader and writer, a row here, and its reader in load.py.
FORMATS = {
    "pth": Format(".pth", _write_pth, holds_states=True),
    "safetensors": Format(".safetensors", _write_safetensors, holds_states=True),
    "fla": Format("", write_fla),
}


@dataclass(frozen=True)
class Parity:
    """The logits of the written model against the original's, in fp32 over VERIFIED_TOKENS tokens.

    write_error     largest difference to the original rounded to the written dtype: not 0 if the format is at fault
    rounding_error  largest difference to the original itself: what the written dtype loses
    agreement       share of positions with the same most likely token
    original        what the original is: with an adapter, the base with the adapter beside it, not merged
    """

    write_error: float
    rounding_error: float
    agreement: float
    original: str = "the original"

    def __str__(self) -> str:
        return (
            f"read back: logits differ by {self.write_error:.1e} from the weights that were written, by "
            f"{self.rounding_error:.1e} from {self.original}; the most likely token agrees at "
            f"{100 * self.agreement:.0f} % of {VERIFIED_TOKENS} positions"
        )


class VerificationError(RuntimeError):
    """What was read back isn't the model that was written."""


def convert_model(
    source: Path,
    out: Path,
    format: str,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    adaptation: Adaptation = NOTHING,
) -> Parity:
    """Write the model in `source` (a path from `find_weights`) to `out`, read it back and compare logits.

    `dtype` None keeps that of `source`. A `tokenizer` is copied next to the weights in formats that are folders. An
    adapter of `adaptation` is merged, and the logits compared are those of the base with the adapter beside it. An
    existing `out` is replaced once the new one has been verified, and not before. Raises UserError when the format
    can't express the model or `out` contains other weights, OSError when it can't be written, VerificationError when
    another model is read back.
    """
    target = FORMATS[format]
    if target.is_folder:
        _check_folder(out)
    if adaptation.state and not target.holds_states:
        raise UserError(
            f"--format {format} has no place for initial states",
            flag="state",
            given=adaptation.state,
            expected="--format " + " or ".join(name for name, other in FORMATS.items() if other.holds_states),
        )
    # Rounded here, once: the writers store what they get, and the comparison below knows what that was.
    if adaptation:
        weights = merged_weights(source, adaptation, dtype)
        original, rounded = unmerged_model(source, adaptation), RWKV7.from_weights(weights, str(source))
    else:
        original = load_model(source, "as is", "cpu")
        weights = {name: t.to(dtype or t.dtype).contiguous() for name, t in original.state_dict().items()}
        rounded = RWKV7.from_weights(weights, str(source)) if dtype else original
    # The tokenizer's own end token, if it has one besides 0, the end of a document.
    eos_id = max(tokenizer.eos_ids) if tokenizer else 0
    out.parent.mkdir(parents=True, exist_ok=True)
    # On the file system of `out`, where moving is a rename; in an existing folder, as its parent may be read-only.
    folder = out if target.is_folder and out.is_dir() else out.parent
    with TemporaryDirectory(prefix=".export-", dir=folder) as temporary:
        new = Path(temporary) / f"model{target.suffix}"
        target.write(weights, original.config, new, eos_id)
        parity = compare(original, rounded, load_model(new, "as is", "cpu"))
        if adaptation:
            parity = replace(parity, original="the base with the adapter beside it")
        if not parity.write_error <= TOLERANCE:  # not ">", which is false for NaN
            raise VerificationError(f"{out}: not written, as another model was read back ({parity})")
        if target.is_folder:
            out.mkdir(exist_ok=True)
            for file in new.iterdir():
                file.replace(out / file.name)
        else:
            new.replace(out)
    if target.is_folder and tokenizer and tokenizer.name != "world":  # World has no files to copy
        copy_tokenizer(Path(tokenizer.name), out)
    sync_folder(out if target.is_folder else out.parent)
    return parity


def merged_weights(source: Path, adaptation: Adaptation, dtype: torch.dtype | None) -> Weights:
    """The weights in `source` with `adaptation` merged, in `dtype` (None: each in its own); states stay fp32."""
    # through the model, for the names and shapes of its state dict
    base = load_model(source, "as is", "cpu").state_dict()
    merged = adaptation.apply(base, dtype)
    return {name: (t.to(dtype or t.dtype) if name in base else t).contiguous() for name, t in merged.items()}


def unmerged_model(source: Path, adaptation: Adaptation) -> RWKV7:
    """The base in fp32 with each adapter beside its matrices, as in training."""
    model = load_model(source, "fp32", "cpu")
    weights = model.state_dict()
    for path, adapter in adaptation.read():
        if adapter.config.kind == "state":
            model.set_initial_states(adapter.tensors, str(path))
            continue
        add_adapter(model, replace(adapter.config, train=()))
        # not strict: an adapter may leave out blocks, whose pairs then keep the B of zeros
        tensors = adapter.tensors.items()
        model.load_state_dict({n: t.view_as(weights[n]) if n in weights else t for n, t in tensors}, strict=False)
    return model.eval().requires_grad_(False)


def _check_folder(out: Path) -> None:
    """Raises UserError when `out` contains weights of other names, as readers would merge the two."""
    # the index of an earlier download, too, which names other files
    others = sorted(file.name for file in out.glob("*.safetensors*") if file.name != TENSORS)
    if others:
        raise UserError(f"contains other weights ({others[0]})", given=out, advice="name another folder")


@torch.no_grad()
def compare(original: RWKV7, rounded: RWKV7, written: RWKV7) -> Parity:
    """The parity of `written` with `original`; `rounded` is a copy of it in the written dtype. Converts all to fp32."""
    # 7919 is a prime, so that the tokens are spread over the vocabulary.
    tokens = torch.arange(VERIFIED_TOKENS).mul(7919).remainder(original.config.vocab_size).unsqueeze(0)
    exact, expected, actual = (model.float()(tokens)[0] for model in (original, rounded, written))
    return Parity(
        write_error=float((expected - actual).abs().max()),
        rounding_error=float((exact - actual).abs().max()),
        agreement=float((exact.argmax(-1) == actual.argmax(-1)).float().mean()),
    )

"""Writes a model in another format or precision, reads it back and compares it with the original."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from src.adapt.adapter import add_adapter
from src.adapt.adapter_files import TIME_STATE
from src.dataset.tokenizer import Tokenizer
from src.errors import UserError
from src.files import atomic_write, sync_folder
from src.inference.adaptation import Adaptation
from src.inference.formats.fla import TENSORS, write_fla
from src.inference.formats.format import Export, Format, Program, VerificationError, rounded
from src.inference.formats.gguf import TYPES, gguf_weights, stored_values, write_gguf
from src.inference.formats.hf import write_hf
from src.inference.formats.hf_tokenizer import HF_TOKENIZER_FILES, write_hf_tokenizer
from src.inference.formats.lazy import mapped
from src.inference.formats.model_card import CARD_FILES, is_edited_card
from src.inference.formats.ollama import MODEL, MODELFILE, create_command, read_ollama, write_ollama
from src.inference.formats.parity import TOLERANCE, Parity, compare, sample_tokens
from src.inference.formats.web_rwkv import in_fp16, write_web_rwkv
from src.inference.load import load_model, load_weights
from src.model import RWKV7
from src.model.safetensors_file import write_safetensors
from src.run_folder import RUN


def _write_pth(export: Export, path: Path) -> None:
    with atomic_write(path) as file:
        torch.save(dict(export.weights), file)


def _write_safetensors(export: Export, path: Path) -> None:
    write_safetensors(export.weights, path)


def _write_fla(export: Export, folder: Path) -> None:
    write_fla(dict(export.weights), export.config, folder, export.eos_id)
    if export.tokenizer:
        write_hf_tokenizer(export.tokenizer, folder)


# A new format is a module with its reader and writer, a row here, and its reader in load.py. Where two formats have one
# suffix, the first is its default.
FORMATS = {
    "pth": Format(
        "the state dict of RWKV-LM",
        ".pth",
        _write_pth,
        load_weights,
        (Program("RWKV-LM, the rwkv package", "RWKV(model='OUT without .pth', strategy='cpu fp32')"),),
        holds_states=True,
    ),
    "safetensors": Format(
        "the same names and shapes in safetensors", ".safetensors", _write_safetensors, load_weights, holds_states=True
    ),
    "fla": Format(
        "a Hugging Face folder in flash-linear-attention's layout",
        "",
        _write_fla,
        load_weights,
        (Program("flash-linear-attention", "fla.models.RWKV7ForCausalLM.from_pretrained('OUT')"),),
        files=(TENSORS,),
    ),
    "hf": Format(
        "the same with its own code, for transformers alone",
        "",
        write_hf,
        load_weights,
        (
            Program("transformers, PEFT, TRL", "AutoModelForCausalLM.from_pretrained('OUT', trust_remote_code=True)"),
            Program("rwkv7-hf", "rwkv7_hf.RWKV7ForCausalLM.from_pretrained('OUT')"),
            Program("flash-linear-attention", "fla.models.RWKV7ForCausalLM.from_pretrained('OUT')"),
        ),
        files=(TENSORS,),
    ),
    "st": Format(
        "fp16 in web-rwkv's layout",
        ".st",
        write_web_rwkv,
        load_weights,
        (
            Program("Ai00", "put OUT into assets/models and name it in assets/configs/Config.toml"),
            Program("web-rwkv", "cargo run --release --example chat -- --model OUT"),
        ),
        types=("f16",),
        stored=in_fp16,
    ),
    "gguf": Format(
        "a GGUF file with the tokenizer",
        ".gguf",
        write_gguf,
        gguf_weights,
        (
            Program("llama.cpp", "llama-cli -m OUT"),
            Program("LM Studio, KoboldCpp, RWKV-Runner", "open OUT"),
            Program("Ollama", "use --format ollama"),
        ),
        types=tuple(TYPES),
        stored=stored_values,
        needs_tokenizer=True,
    ),
    "ollama": Format(
        "a GGUF file with a Modelfile",
        "",
        write_ollama,
        read_ollama,
        (Program("Ollama", "ollama create NAME -f OUT/Modelfile, then ollama run NAME"),),
        types=tuple(TYPES),
        stored=stored_values,
        files=(MODEL, MODELFILE),
        needs_tokenizer=True,
        next_command=create_command,
    ),
}


def convert_model(
    model: RWKV7,
    out: Path,
    format: str,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    type: str = "",
    title: str = "",
    windows: Tensor | None = None,
    run: Path | None = None,
    unmerged: RWKV7 | None = None,
) -> Parity:
    """Write `model` (on the CPU) to `out`, read it back and compare both.

    dtype      of the tensors to write; None: that of `model`
    tokenizer  of the model: stored in formats that contain one, copied next to the weights in those that are folders
    type       one of the format's `types`; "": its first
    title      name of the model for formats that store one; "": that of `out`
    windows    held-out data int64 [B, T + 1], on which the losses of both are computed
    run        the folder of the run that trained it, for formats that describe the training
    unmerged   what `model` was merged from, with the adapter beside its base: their logits are compared, too

    An existing `out` is replaced once the new one has been verified, and not before. Raises UserError when the format
    can't express the model or `out` contains other weights, OSError when it can't be written, VerificationError when
    another model is read back.
    """
    target = FORMATS[format]
    if target.is_folder:
        _check_folder(out, target)
    original: Mapping[str, Tensor] = model.state_dict()
    if states := [name for name in original if name.endswith(TIME_STATE)]:
        check_states(format, states[0])
    # Lazily, so that memory holds one changed tensor at a time where the writer stores one after the other.
    weights = mapped(original, lambda name, t: rounded(name, t, dtype or t.dtype).contiguous())
    chosen = type or (target.types[0] if target.types else "")
    expected = mapped(weights, lambda name, t: target.stored(name, t, chosen))
    export = Export(weights, model.config, title or out.stem, tokenizer, chosen, run)
    out.parent.mkdir(parents=True, exist_ok=True)
    # On the file system of `out`, where moving is a rename; in an existing folder, as its parent may be read-only.
    folder = out if target.is_folder and out.is_dir() else out.parent
    with TemporaryDirectory(prefix=".export-", dir=folder) as temporary:
        new = Path(temporary) / f"model{target.suffix}"
        target.write(export, new)
        written = target.read(new)
        tokens = sample_tokens(model.config.vocab_size, tokenizer)
        parity = compare(original, expected, written, model.config, tokens, windows)
        if unmerged is not None:
            parity = replace(parity, merge_error=_largest_difference(unmerged, model, tokens))
        if parity.different or not parity.write_error <= TOLERANCE:  # not ">", which is false for NaN
            problem = f"{out}: not written, as another model was read back"
            raise VerificationError(f"{problem} ({parity.different} differs; {parity})")
        if target.is_folder:
            _move_files(new, out, replaces_tokenizer=tokenizer is not None)
        else:
            new.replace(out)
    sync_folder(out if target.is_folder else out.parent)
    return parity


def check_states(format: str, given: str, flag: str = "") -> None:
    """Raises UserError when `format` has no place for tuned initial states: `given`, by `flag` or in the model."""
    if not FORMATS[format].holds_states:
        raise UserError(
            f"--format {format} has no place for tuned initial states",
            flag=flag,
            given=given,
            expected="--format " + " or ".join(name for name, other in FORMATS.items() if other.holds_states),
        )


def unmerged_model(base: Path, adaptation: Adaptation) -> RWKV7:
    """The base in fp32 with each adapter beside its matrices, as in training."""
    model = load_model(base, "fp32", "cpu")
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


@torch.no_grad()
def _largest_difference(first: RWKV7, second: RWKV7, tokens: Tensor) -> float:
    """Of the logits in fp32."""
    return float((first.float()(tokens)[0] - copy.deepcopy(second).float()(tokens)[0]).abs().max())


def _move_files(new: Path, out: Path, replaces_tokenizer: bool) -> None:
    """Move the files in `new` to `out`, where a tokenizer of an earlier export is removed if there is a new one."""
    out.mkdir(exist_ok=True)
    written = {file.name for file in new.iterdir()}
    for name in written:
        if name not in CARD_FILES or not is_edited_card(out):
            (new / name).replace(out / name)
    # A template of another tokenizer, for example, would be used with this vocabulary. Without a tokenizer to write,
    # the one that is there may have been put there for this model.
    if replaces_tokenizer:
        for name in set(HF_TOKENIZER_FILES) - written:
            (out / name).unlink(missing_ok=True)


def _check_folder(out: Path, target: Format) -> None:
    """Raises UserError when `out` contains weights of other names, as readers would merge the two, or is the folder of
    a run, whose name would then mean the export."""
    if (out / RUN).is_file():
        raise UserError("the folder of a run", given=out, advice="name another folder")
    # the index of an earlier download, too, which names other files
    others = sorted(file.name for file in out.glob("*.safetensors*") if file.name not in target.files)
    if others:
        raise UserError(f"contains other weights ({others[0]})", given=out, advice="name another folder")

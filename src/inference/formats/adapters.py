"""Writes an adapter in another program's format, reads it back and compares what both make of their base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from src.adapt.adapter_files import Adapter
from src.dataset.tokenizer import Tokenizer
from src.errors import UserError
from src.files import sync_folder
from src.inference.formats.format import Program, VerificationError
from src.inference.formats.gguf_lora import TYPES, read_gguf_lora, write_gguf_lora
from src.inference.formats.lazy import mapped
from src.inference.formats.parity import TOLERANCE, Parity, compare, sample_tokens
from src.model import RWKV7

Pairs = Mapping[str, Tensor]


@dataclass(frozen=True)
class AdapterFormat:
    """How a LoRA adapter is stored: `blocks.N.att.key.lora_A` [r, in] and `.lora_B` [out, r], and the factor of B A.

    write     write(pairs, factor, title, path, type). Raises UserError for what the format can't express
    read      pairs and factor
    types     choices of `--type`, the default first
    """

    summary: str
    suffix: str
    write: Callable[[Pairs, float, str, Path, str], None]
    read: Callable[[Path], tuple[Pairs, float]]
    programs: tuple[Program, ...]
    types: tuple[str, ...]


ADAPTER_FORMATS = {
    "gguf-lora": AdapterFormat(
        "a LoRA adapter as GGUF, beside a base that is exported too",
        ".gguf",
        write_gguf_lora,
        read_gguf_lora,
        (
            Program("llama.cpp", "llama-cli -m BASE.gguf --lora OUT"),
            Program("Ollama", "a line ADAPTER ./OUT in the Modelfile of the base"),
        ),
        tuple(TYPES),
    ),
}


def convert_adapter(
    model: RWKV7,
    adapter: Adapter,
    out: Path,
    format: str,
    tokenizer: Tokenizer | None,
    *,
    type: str = "",
    title: str = "",
    windows: Tensor | None = None,
) -> Parity:
    """Write `adapter` of the base `model` to `out`, read it back, and compare what the base computes with both.

    The other arguments are those of `convert_model`.

    An existing `out` is replaced once the new one has been verified. Raises UserError for an adapter that isn't LoRA
    of matrices alone, OSError, and VerificationError when another adapter is read back.
    """
    target, config = ADAPTER_FORMATS[format], adapter.config
    if config.kind != "lora":
        raise UserError(
            f"an adapter of the kind {config.kind}, which --format {format} can't express",
            flag="adapter",
            expected="LoRA",
            advice="merge it into its base, and export the result",
        )
    base = model.state_dict()
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export-", dir=out.parent) as temporary:
        new = Path(temporary) / out.name
        target.write(adapter.tensors, config.scale, title or out.stem, new, type or target.types[0])
        pairs, factor = target.read(new)
        expected = {name: tensor.to(pairs[name].dtype) for name, tensor in adapter.tensors.items() if name in pairs}
        original, rounded, written = (
            mapped(base, partial(_merged, pairs=each, factor=each_factor))
            for each, each_factor in ((adapter.tensors, config.scale), (expected, config.scale), (pairs, factor))
        )
        tokens = sample_tokens(model.config.vocab_size, tokenizer)
        parity = compare(original, rounded, written, model.config, tokens, windows)
        if pairs.keys() != adapter.tensors.keys() or not parity.write_error <= TOLERANCE:
            raise VerificationError(f"{out}: not written, as another adapter was read back ({parity})")
        new.replace(out)
    sync_folder(out.parent)
    return parity


def _merged(name: str, tensor: Tensor, pairs: Pairs, factor: float) -> Tensor:
    """A parameter of the base, in fp32 with `factor` B A added where there is a pair for it."""
    stem = name.removesuffix(".weight")
    if f"{stem}.lora_A" not in pairs:
        return tensor
    return tensor.float() + factor * (pairs[f"{stem}.lora_B"].float() @ pairs[f"{stem}.lora_A"].float())

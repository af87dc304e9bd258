"""Writes an adapter in another program's format, reads it back and compares what both make of their base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from src.adapt.adapter_files import Adapter
from src.dataset.tokenizer import Tokenizer
from src.errors import UserError
from src.files import sync_folder
from src.inference.formats.format import Program, VerificationError
from src.inference.formats.gguf_lora import TYPES, read_gguf_lora, write_gguf_lora
from src.inference.formats.lazy import mapped
from src.inference.formats.parity import TOLERANCE, Parity, compare, sample_tokens
from src.inference.formats.web_rwkv_tuned import read_st_lora, read_st_state, write_st_lora, write_st_state
from src.model import RWKV7, State

Pairs = Mapping[str, Tensor]


@dataclass(frozen=True)
class AdapterFormat:
    """How an adapter is stored: `blocks.N.att.key.lora_A` [r, in] and `.lora_B` [out, r], and the factor of B A; or
    `blocks.N.att.time_state` [H, value, key], and 1.

    write     write(tensors, factor, title, path, type). Raises UserError for what the format can't express
    read      tensors and factor
    types     choices of `--type`, the default first
    kind      of the adapter: "lora" or "state"
    """

    summary: str
    suffix: str
    write: Callable[[Pairs, float, str, Path, str], None]
    read: Callable[[Path], tuple[Pairs, float]]
    programs: tuple[Program, ...]
    types: tuple[str, ...]
    kind: str = "lora"


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
    "st-lora": AdapterFormat(
        "a LoRA adapter in web-rwkv's layout",
        ".st",
        write_st_lora,
        read_st_lora,
        (Program("Ai00", "under [[lora]] in Config.toml: path = OUT, and the adapter's alpha"),),
        ("f16",),
    ),
    "st-state": AdapterFormat(
        "a tuned initial state in web-rwkv's layout",
        ".st",
        write_st_state,
        read_st_state,
        (Program("Ai00", "under [[state]] in Config.toml: path = OUT, a name and an id"),),
        ("f16",),
        kind="state",
    ),
}
# The kinds of adapters, for messages.
KINDS = {"lora": "LoRA", "state": "a tuned initial state"}


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

    An existing `out` is replaced once the new one has been verified. Raises UserError for an adapter of another kind
    than the format's, OSError, and VerificationError when another adapter is read back.
    """
    target, config = ADAPTER_FORMATS[format], adapter.config
    if config.kind != target.kind:
        raise UserError(
            f"an adapter of the kind {config.kind}, which --format {format} can't express",
            flag="adapter",
            expected=KINDS[target.kind],
            # a state can't be merged into the matrices of its base
            advice="use --format st-state" if config.kind == "state" else "merge it into its base, and export that",
        )
    if target.kind == "state" and windows is not None:
        raise UserError("not compared for initial states", flag="data", advice="leave it out")
    base = model.state_dict()
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export-", dir=out.parent) as temporary:
        new = Path(temporary) / out.name
        target.write(adapter.tensors, config.scale, title or out.stem, new, type or target.types[0])
        pairs, factor = target.read(new)
        expected = {name: tensor.to(pairs[name].dtype) for name, tensor in adapter.tensors.items() if name in pairs}
        tokens = sample_tokens(model.config.vocab_size, tokenizer)
        if target.kind == "state":
            parity = _compare_states(model, (adapter.tensors, expected, pairs), tokens)
        else:
            original, rounded, written = (
                mapped(base, partial(_merged, pairs=each, factor=each_factor))
                for each, each_factor in ((adapter.tensors, config.scale), (expected, config.scale), (pairs, factor))
            )
            parity = compare(original, rounded, written, model.config, tokens, windows)
        if pairs.keys() != adapter.tensors.keys() or not parity.write_error <= TOLERANCE:
            raise VerificationError(f"{out}: not written, as another adapter was read back ({parity})")
        new.replace(out)
    sync_folder(out.parent)
    return parity


@torch.no_grad()
def _compare_states(model: RWKV7, states: tuple[Pairs, Pairs, Pairs], tokens: Tensor) -> Parity:
    """The parity of the written states, the last, with the original ones and with these as rounded, in `model`."""
    exact, rounded, written = (_logits(model, each, tokens) for each in states)
    return Parity(
        write_error=float((rounded - written).abs().max()),
        rounding_error=float((exact - written).abs().max()),
        agreement=float((exact.argmax(-1) == written.argmax(-1)).float().mean()),
        positions=tokens.shape[1],
    )


def _logits(model: RWKV7, states: Pairs, tokens: Tensor) -> Tensor:
    """Of `tokens` int64 [1, T], from the initial states: [T, V]."""
    start = State.zeros(model.config, 1, dtype=model.emb.weight.dtype)
    for i, layer in enumerate(start.layers):
        start.layers[i] = layer._replace(wkv=states[f"blocks.{i}.att.time_state"].float().unsqueeze(0))
    return model(tokens, start)[0][0].float()


def _merged(name: str, tensor: Tensor, pairs: Pairs, factor: float) -> Tensor:
    """A parameter of the base, in fp32 with `factor` B A added where there is a pair for it."""
    stem = name.removesuffix(".weight")
    if f"{stem}.lora_A" not in pairs:
        return tensor
    return tensor.float() + factor * (pairs[f"{stem}.lora_B"].float() @ pairs[f"{stem}.lora_A"].float())

"""The model card of a Hugging Face folder: what the model is, how to run it, and how it was trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src.errors import UserError
from src.files import atomic_write
from src.inference.formats.format import Export
from src.run_folder import FIGURE, read_run
from src.run_log import Curves, read_curves

CARD = "README.md"
CARD_FILES = (CARD, FIGURE)
MARK = "<!-- written by the export, which replaces this page as long as this line is in it -->"
# Of a run's settings, those that tell what a model was trained on and how.
DATA = ("data_type", "data", "val_data_file", "tokenizer", "sft_loss", "packing", "load_model")
SETTINGS = (
    *("ctx_len", "global_batch", "my_exit_tokens", "lr_init", "lr_final", "warmup_steps", "beta1", "beta2", "adam_eps"),
    *("weight_decay", "grad_clip", "precision", "strategy", "random_seed"),
)
# Of runs that trained an adapter, which is merged into the model.
PART = ("peft", "lora_r", "lora_alpha", "use_rslora", "lora_targets", "lora_train", "quant")


def write_card(export: Export, folder: Path) -> None:
    """Write README.md and, of a run that has one, its picture. Raises OSError."""
    curves = _curves(export.run)
    picture = export.run / FIGURE if export.run is not None else None
    if picture is not None and picture.is_file():
        with atomic_write(folder / FIGURE) as file:
            file.write(picture.read_bytes())
    sections = [_header(export), _usage(export)]
    if export.run is not None:
        sections.append(_training(export.run, curves, has_picture=(folder / FIGURE).is_file()))
    with atomic_write(folder / CARD, "w") as file:
        file.write("\n".join(sections))


def is_edited_card(folder: Path) -> bool:
    """Whether `folder` has a README.md that an export must not replace: somebody's own, or an edited card."""
    card = folder / CARD
    return card.exists() and MARK not in card.read_text(encoding="utf-8", errors="replace")


def _curves(run: Path | None) -> Curves | None:
    try:
        return read_curves(run) if run is not None else None
    except UserError:  # nothing has been logged, or the logs were not moved along with the weights
        return None


def _header(export: Export) -> str:
    config = export.config
    parameters = sum(tensor.numel() for tensor in export.weights.values())
    ranks = f"{config.d_decay_lora}, {config.d_aaa_lora}, {config.d_mv_lora}, {config.d_gate_lora}"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [rwkv, rwkv-7, custom_code]
---

{MARK}

# {export.title}

An RWKV-7 language model with {parameters / 1e6:,.1f} M parameters.

| layers | width | heads of | feed-forward | low-rank sizes (w, a, v, g) | vocabulary |
| --- | --- | --- | --- | --- | --- |
| {config.n_layer} | {config.n_embd} | {config.head_size} | {config.dim_ffn} | {ranks} | {config.vocab_size} |
"""


def _usage(export: Export) -> str:
    tokenizer, template = export.tokenizer, export.tokenizer.chat_template if export.tokenizer else None
    lines = [
        "## Use",
        "",
        "The folder has all that it needs besides `torch` and `transformers`:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        "folder = '.'  # this folder, or its name on the Hub",
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
    ]
    if tokenizer:
        # World's answers end with text and not with a token
        stop = r", stop_strings=['\n\n'], tokenizer=tokenizer" if template and tokenizer.name == "world" else ""
        prompt = (
            "tokenizer.apply_chat_template([{'role': 'user', 'content': 'Hello!'}], "
            "add_generation_prompt=True, return_tensors='pt', return_dict=True)"
            if template
            else "tokenizer('Once', return_tensors='pt')"
        )
        lines += [
            "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
            f"inputs = {prompt}",
            f"output = model.generate(**inputs, max_new_tokens=200{stop})",
            "print(tokenizer.decode(output[0]))",
        ]
    else:
        lines.append("output = model.generate(input_ids, max_new_tokens=200)")
    lines += ["```", ""]
    if export.config.head_size != 64:
        lines += [
            "flash-linear-attention and rwkv7-hf compute another epsilon for the norm of heads of this size: use the "
            "code in this folder.",
            "",
        ]
    return "\n".join(lines)


def _training(run: Path, curves: Curves | None, has_picture: bool) -> str:
    record = read_run(run)
    settings = record.get("settings", {})
    lines = ["## Training", ""]
    if curves is not None:
        lines += [*_losses(curves), ""]
    if has_picture:
        lines += [f"![The loss of the run]({FIGURE})", ""]
    lines += ["| setting | value |", "| --- | --- |", *_rows(settings), ""]
    return "\n".join(lines)


def _losses(curves: Curves) -> Iterator[str]:
    smoothed, width = curves.smoothed()
    if len(smoothed):
        unit = "steps" if curves.by_step else "mini-epochs"
        yield f"- {curves.tokens[-1]:,.0f} tokens"
        yield f"- training loss at the end: {smoothed[-1]:.4f} (mean of the last {min(width, len(smoothed))} {unit})"
    if len(curves.val_loss):
        yield f"- held-out loss: {curves.val_loss[-1]:.4f} at the end, {curves.val_loss.min():.4f} at its lowest"


def _rows(settings: dict[str, Any]) -> Iterator[str]:
    # the name alone: the folders of the machine that trained it say nothing to others
    yield from (f"| data_file | {Path(name).name} |" for name in [str(settings.get("data_file") or "")] if name)
    part = PART if settings.get("peft", "none") != "none" else ()
    for name in (*DATA, *part, *SETTINGS):
        value = settings.get(name, "")
        if value not in ("", None):
            yield f"| {name} | {Path(value).name if name in ('load_model', 'val_data_file') else value} |"

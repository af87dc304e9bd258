"""A model that reads pictures or sounds as one folder that needs no other: the result of a run beside a base, or with
an adapter, becomes language model, projector, encoder's settings and tokenizer together."""

from __future__ import annotations

from pathlib import Path

import torch

from src.dataset.tokenizer import Tokenizer
from src.dataset.tokenizer_files import copy_tokenizer
from src.errors import UserError
from src.files import whole_folder
from src.inference.adaptation import Adaptation
from src.inference.formats.format import VerificationError
from src.inference.load import load_model, load_weights
from src.model.weights import read_weights, save_weights
from src.multimodal.files import LANGUAGE_MODEL, TENSORS, MediaRecord, read_record, write_front_end
from src.multimodal.front_end import PREFIX
from src.run_folder import TOKENIZER

NAME = "multimodal"
SUMMARY = "model, projector, encoder's settings and tokenizer in a folder, an adapter merged"


def write_multimodal(weights: Path, adaptation: Adaptation, out: Path, dtype: str | None, tokenizer: Tokenizer) -> None:
    """Write `out`, a new folder. `dtype`: of the language model, None: that of `weights`. Raises UserError,
    VerificationError."""
    if not adaptation.media:
        raise UserError("reads text alone", given=weights, expected="a model with an encoder and a projector")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("exists already", given=out, advice="name a new folder")
    source = Path(adaptation.media)
    model = load_model(weights, dtype or "as is", "cpu", adaptation)
    model.media = None
    is_folder = tokenizer.name != "world"
    with whole_folder(out) as folder:
        record = MediaRecord(read_record(source).config, tokenizer=TOKENIZER if is_folder else "world")
        write_front_end(folder, record, read_weights(source / TENSORS))
        values = model.state_dict()
        save_weights(values, folder / LANGUAGE_MODEL)
        if is_folder:
            copy_tokenizer(Path(tokenizer.name), folder / TOKENIZER)
        written = {**load_weights(folder / LANGUAGE_MODEL), **_prefixed(folder)}
        expected = {**values, **_prefixed(source)}
        if written.keys() != expected.keys() or not all(torch.equal(written[n], expected[n]) for n in expected):
            raise VerificationError(f"{out}: what was written reads back as other numbers")


def _prefixed(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{PREFIX}{name}": tensor for name, tensor in read_weights(folder / TENSORS).items()}

"""Prompts with pictures or sounds: files become rows by the model's front end, and text with their places tokens."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from src.dataset.media_files import MediaError, Picture, Sound, read_medium
from src.dataset.media_tokens import encode_with_media
from src.dataset.tokenizer import Tokenizer
from src.errors import UserError
from src.model import RWKV7
from src.multimodal.front_end import FrontEnd

DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,", re.ASCII)


def front_end_of(model: RWKV7) -> FrontEnd | None:
    """What turns pictures or sounds into rows; None for a model of text alone."""
    assert model.media is None or isinstance(model.media, FrontEnd)
    return model.media


def read_for(model: RWKV7, kind: str, source: Path | bytes) -> Picture | Sound:
    """A medium of this kind for `model`. Raises UserError where the model reads none of it, or it can't be used."""
    front_end = front_end_of(model)
    reads = "text alone" if front_end is None else f"{front_end.spec.kind}s"
    if front_end is None or front_end.spec.kind != kind:
        raise UserError(f"the model reads {reads}, not {kind}s")
    try:
        return read_medium(kind, source, front_end.config.max_seconds)
    except MediaError as error:
        raise MediaError(error.problem, given=source if isinstance(source, Path) else None) from error


def content_of_data_url(url: str) -> bytes:
    """Raises UserError for what is no data URL in base64: nothing is fetched."""
    match = DATA_URL.match(url)
    if match is None:
        raise UserError("not a data URL", given=url[:60], expected="data:image/png;base64,...")
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError("a data URL whose base64 is not valid", given=url[:60]) from error


@torch.no_grad()
def rows_of(model: RWKV7, medium: Picture | Sound) -> Tensor:
    """The rows [tokens, C] of a medium, in the model's precision."""
    front_end = front_end_of(model)
    assert front_end is not None
    weight = model.emb.weight
    prepared = front_end.spec.prepare(medium)
    rows = front_end(prepared.to(weight.device), torch.tensor([len(prepared)], device=weight.device))
    return rows.to(weight.dtype)


def encode_prompt(
    tokenizer: Tokenizer, text: str, rows: Sequence[Tensor], literals: Collection[int] = ()
) -> tuple[list[int], Tensor | None]:
    """(tokens, embeds) of a rendered text with the places of media. Raises UserError where these aren't as many."""
    if not rows:
        return tokenizer.encode_rendered(text, literals), None
    tokens, _ = encode_with_media(tokenizer, text, [len(part) for part in rows], literals)
    return tokens, torch.cat(list(rows))

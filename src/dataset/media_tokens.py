"""Texts with media as tokens: PLACEHOLDER as often as the medium has tokens, in the place of its character."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from src.config import PLACEHOLDER
from src.dataset.media_parts import OBJECT
from src.dataset.tokenizer import Tokenizer
from src.errors import UserError

Span = tuple[int, int]


def encode_with_media(
    tokenizer: Tokenizer,
    text: str,
    counts: Sequence[int],
    literals: Collection[int] = (),
    spans: Sequence[Span] = (),
) -> tuple[list[int], npt.NDArray[np.bool_]]:
    """Ids of `text`, in which the i-th OBJECT is `counts[i]` times PLACEHOLDER, and a mask of those that overlap the
    characters [begin, end) of any of `spans`; `literals` as in `Tokenizer.encode_rendered`.

    UserError, its `problem` a noun phrase, where the text has another number of media than `counts`.
    """
    parts = text.split(OBJECT)
    if len(parts) != len(counts) + 1:
        raise UserError("media that the chat template leaves out or repeats")
    ids: list[int] = []
    masks: list[npt.NDArray[np.bool_]] = []
    begin = 0
    for part, count in zip(parts, [*counts, 0], strict=True):
        end = begin + len(part)
        if part:
            here = [(max(b, begin) - begin, min(e, end) - begin) for b, e in spans if b < end and begin < e]
            inside = {i - begin for i in literals if begin <= i < end}
            tokens, mask = tokenizer.encode_marked(part, here, inside)
            ids += tokens
            masks.append(mask)
        ids += [PLACEHOLDER] * count
        masks.append(np.zeros(count, np.bool_))
        begin = end + 1
    return ids, np.concatenate(masks)


def whole_media(ids: npt.NDArray[np.int64], counts: Sequence[int], length: int) -> tuple[int, int]:
    """(positions, media) that remain of a conversation cut to `length` positions, where no medium is cut: it ends
    before one that doesn't fit whole."""
    places = np.flatnonzero(ids == PLACEHOLDER)
    end = 0
    for number, count in enumerate(counts):
        begin, end = end, end + count
        if places[end - 1] >= length:
            return min(length, int(places[begin])), number
    return length, len(counts)

"""Tokenization of documents for pretraining: what the workers of data/make_data.py compute, piece by piece."""

import sys
import zlib
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from src.dataset.binidx import token_dtype
from src.dataset.corpus.documents import InvalidLine, invalid_line, read_documents
from src.dataset.corpus.text_input import Piece
from src.dataset.tokenizer import load_tokenizer
from src.errors import UserError

_SHOWN_INVALID_LINES = 5

cached_tokenizer = lru_cache(1)(load_tokenizer)  # loaded before the workers are forked, which then share it


class TokenizedPiece(NamedTuple):
    """The documents of one piece of the input.

    tokens     of all documents, concatenated, little-endian
    sizes      number of tokens of each document
    ordinals   number of each document's line over all inputs
    digests    CRC-32 of each text
    invalid    lines without a usable document
    end        bytes of input read, as of `Piece`
    """

    tokens: bytes
    sizes: npt.NDArray[np.int32]
    ordinals: npt.NDArray[np.uint64]
    digests: npt.NDArray[np.uint64]
    invalid: list[InvalidLine]
    end: int


def tokenize_piece(piece: Piece, tokenizer_name: str, field: str, parse_special: bool = False) -> TokenizedPiece:
    """Encodes the texts of a piece, each followed by token 0, and checks that decoding restores each text.

    Special tokens in a text, such as `<|endoftext|>`, are text like any other; with `parse_special` they are tokens.
    """
    tokenizer = cached_tokenizer(tokenizer_name)
    dtype = token_dtype(tokenizer.vocab_size).newbyteorder("<")  # the byte order of the file format
    parts, sizes, ordinals, digests = [], [], [], []
    invalid: list[tuple[int, InvalidLine]] = []
    texts: dict[int, str] = {}
    for index, text in read_documents(piece, field):
        if isinstance(text, InvalidLine):
            invalid.append((index, text))
        else:
            texts[index] = text
    # A document about tokenizers contains special tokens: as tokens, they would end it there.
    encode_batch = tokenizer.encode_batch if parse_special else tokenizer.encode_batch_as_text
    for (index, text), ids in zip(texts.items(), encode_batch(list(texts.values())), strict=True):
        data = text.encode()
        # A tokenizer without byte fallback, or one that normalizes, would silently train on other text.
        if tokenizer.decode_bytes(ids) != data:
            invalid.append((index, invalid_line(piece, index, "a text that its tokens do not restore", text)))
            continue
        ids.append(0)  # the end of a document, in RWKV's data sets and in this project's tokenizers
        parts.append(np.array(ids, dtype).tobytes())
        sizes.append(len(ids))
        ordinals.append(piece.ordinal + index)
        digests.append(zlib.crc32(data))  # fast, and hashed with the seed before use
    return TokenizedPiece(
        b"".join(parts),
        np.array(sizes, np.int32),
        np.array(ordinals, np.uint64),
        np.array(digests, np.uint64),
        [line for _, line in sorted(invalid)],  # in the order of the file
        piece.end,
    )


def split(
    part: TokenizedPiece, selected: npt.NDArray[np.bool_], itemsize: int
) -> tuple[TokenizedPiece, TokenizedPiece]:
    """The selected documents of a piece, and the others; `itemsize` is bytes per token."""
    ends = np.cumsum(part.sizes, dtype=np.int64) * itemsize
    halves = []
    for mask in (selected, ~selected):
        indices = np.flatnonzero(mask)
        tokens = b"".join(part.tokens[ends[i] - part.sizes[i] * itemsize : ends[i]] for i in indices)
        halves.append(part._replace(tokens=tokens, sizes=part.sizes[indices], ordinals=part.ordinals[indices]))
    return halves[0], halves[1]


class InvalidLineReport:
    """Shows the first invalid lines and counts all by reason; with `stop` the first one is a UserError."""

    def __init__(self, stop: bool) -> None:
        self._stop = stop
        self._reasons: Counter[str] = Counter()

    def add(self, lines: list[InvalidLine]) -> None:
        for line in lines:
            if self._stop:  # the workers' results arrive in the order of the input, so this is the first one in it
                raise UserError(str(line), advice="--on_error skip counts and skips such lines")
            self._reasons[line.reason] += 1
            if self._reasons.total() <= _SHOWN_INVALID_LINES:
                tqdm.write(f"left out: {line}", file=sys.stderr)

    def summary(self) -> str:
        by_reason = ", ".join(f"{count} with {reason}" for reason, count in self._reasons.most_common())
        total = self._reasons.total()
        return f"{total} {'line' if total == 1 else 'lines'} left out{': ' if by_reason else ''}{by_reason}"

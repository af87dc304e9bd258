"""Reads the held-out data of an evaluation: token ids, or texts and the ids that a tokenizer makes of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from src.dataset.binidx import MMapIndexedDataset, with_ending
from src.dataset.corpus.documents import EMPTY_LINE, EMPTY_TEXT, read_documents
from src.dataset.corpus.text_input import JSON_LINES, Piece, read_pieces
from src.dataset.tokenizer import Tokenizer
from src.errors import UserError
from src.inference.windows import Tokens
from src.terminal import show


def read_texts(path: Path, flag: str) -> Iterator[str]:
    """The documents of a file, empty ones left out: the "text" of each line of a .jsonl (.gz, .zst), or the whole file.

    Raises UserError with `flag` when the file can't be read, and with the line when one isn't valid.
    """
    name = str(path)
    try:
        # Read by the functions that prepare training data, so that equal files give equal tokens.
        is_json_lines = name.lower().endswith(JSON_LINES)
        for piece in read_pieces([name], "text") if is_json_lines else [Piece(name, 1, 0, [path.read_bytes()], 0)]:
            for _, text in read_documents(piece, "text"):
                if isinstance(text, str):
                    yield text
                elif text.reason not in (EMPTY_LINE, EMPTY_TEXT):
                    raise UserError(f"{text.reason}: {text.excerpt}", flag=flag, given=text.location)
    except OSError as error:
        raise UserError(
            f"can't be read ({error.strerror})", flag=flag, given=path, advice="check its permissions"
        ) from error


def encode_texts(texts: Iterable[str], tokenizer: Tokenizer) -> Tokens:
    """The ids of all texts, int64, each text followed by 0, as the end of a document is marked in training data."""
    return np.fromiter((token for text in texts for token in (*tokenizer.encode_as_text(text), 0)), np.int64)


def is_binidx(path: Path) -> bool:
    """Whether `--data` names token ids: any existing X.bin makes X binidx. Raises UserError when there is no file."""
    binidx = path.suffix in (".bin", ".idx") or with_ending(path, ".bin").is_file()
    if not binidx and not path.is_file():
        expected = "binidx data (X, X.bin), a text file or a .jsonl of texts"
        raise UserError("no such file", flag="data", given=path, expected=expected)
    return binidx


def read_tokens(path: Path, tokenizer: Tokenizer | None) -> Tokens:
    """The ids in binidx data, or those of a file of texts by `tokenizer`: of a .jsonl or of a single document.

    Raises UserError, about --data, when the file can't be read, or holds texts and there is no tokenizer.
    """
    if is_binidx(path):
        # Mapped, not read: only the selected windows are.
        dataset = MMapIndexedDataset(path)
        for warning in dataset.warnings:
            show(f"WARNING: {warning}", file=sys.stderr)
        return dataset.tokens
    if tokenizer is None:
        raise UserError("a file of texts", flag="data", given=path, advice="name the model's --tokenizer, too")
    return encode_texts(read_texts(path, "data"), tokenizer)


def text_bytes(ids: Tokens, tokenizer: Tokenizer) -> int:
    """The length in bytes of the text that `ids` decode to."""
    # 0 ends a document and has no bytes. Where the vocabulary uses it for text as well, the two can't be distinguished.
    text = ids if tokenizer.text_of_0 else ids[ids != 0]
    return len(tokenizer.decode_bytes(text.tolist()))

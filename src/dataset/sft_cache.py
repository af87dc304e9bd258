"""Conversations tokenised once: a token file beside the jsonl, made again when the jsonl or the tokenizer changes.

X.jsonl.sft.bin/.idx   a document a conversation, int32: a token that counts is its id, one that doesn't is ~id
X.jsonl.sft.json       what it was made from, and what was left out
"""

import errno
import hashlib
import json
import tempfile
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from src.dataset.binidx import BinIdxWriter, MMapIndexedDataset, with_ending
from src.dataset.chat_template import RWKV_TEMPLATE
from src.dataset.conversations import check_template, read_conversation, render_with_answers
from src.dataset.documents import Broken, broken, read_lines
from src.dataset.text_input import Piece, check_inputs, read_pieces
from src.dataset.tokenizer import Tokenizer, load_tokenizer
from src.dataset.workers import map_in_order, usable_cores
from src.errors import UserError
from src.files import atomic_write, file_lock

_FORMAT = 1  # another number, and every cache is made again
_SHOWN_BROKEN = 3


class Conversations(NamedTuple):
    """Tokenised conversations, each with a token that counts. `left_out` counts, by reason, the lines that gave none."""

    data: MMapIndexedDataset
    left_out: dict[str, int]
    turns: int
    answer_tokens: int

    def read(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Ids of a conversation, and which of them the assistant wrote."""
        coded = self.data[index].astype(np.int64)
        return np.where(coded < 0, ~coded, coded), coded >= 0


def chat_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer of a run on conversations. ValueError unless it has a chat template that can be masked."""
    tokenizer = load_tokenizer(folder)
    if tokenizer.chat_template is None:
        raise UserError(
            f"--tokenizer {folder} has no chat template: give a Hugging Face tokenizer folder with one, or world."
        )
    try:
        check_template(tokenizer.chat_template, tokenizer.special_tokens)
    except ValueError as error:
        raise UserError(f"--tokenizer {folder}: {error}") from error
    return tokenizer


_load_once = lru_cache(1)(chat_tokenizer)  # forked workers find it loaded


class _Tokenised(NamedTuple):
    coded: bytes
    sizes: npt.NDArray[np.int32]
    turns: int
    answer_tokens: int
    broken: list[Broken]
    end: int


def encode_conversation(tokenizer: Tokenizer, line: bytes) -> tuple[list[int], npt.NDArray[np.bool_], int]:
    """Ids of a conversation, which of them count, how many turns it has. ValueError, its text the reason."""
    assert tokenizer.chat_template is not None
    messages = read_conversation(line)
    text, answers = render_with_answers(tokenizer.chat_template, tokenizer.special_tokens, messages)
    ids, counts = tokenizer.encode_marked(text, answers)
    if not counts[1:].any():  # the first token is never a target
        raise UserError("no answer")
    return ids, counts, len(messages)


def _tokenise(piece: Piece, folder: str) -> _Tokenised:
    tokenizer = _load_once(folder)
    parts, sizes, faults, turns, answer_tokens = [], [], [], 0, 0
    for index, line in read_lines(piece):
        assert isinstance(line, bytes)
        try:
            ids, counts, n_turns = encode_conversation(tokenizer, line)
        except ValueError as error:
            faults.append(broken(piece, index, str(error), line))
            continue
        coded = np.array(ids, "<i4")
        parts.append(np.where(counts, coded, ~coded).tobytes())
        sizes.append(len(ids))
        turns += n_turns
        answer_tokens += int(counts.sum())
    return _Tokenised(b"".join(parts), np.array(sizes, np.int32), turns, answer_tokens, faults, piece.end)


def open_conversations(path: str, folder: str, workers: int | None = None) -> Conversations:
    """The conversations of a jsonl (.gz, .zst too), tokenised now unless that was done before.

    Several processes may call it at once: one works, the others wait. ValueError for a file or tokenizer that can't be
    used, and when no line of the file is a conversation.
    """
    prefix, made_from = _source(path, folder)
    try:
        if found := _read(prefix, made_from):  # also where nothing can be written
            return found
        with file_lock(with_ending(prefix, ".lock"), wait=True):
            return _read(prefix, made_from) or _make(path, folder, prefix, made_from, workers or usable_cores())
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise UserError(
            f"{error}: the tokens of --data_file are kept beside it, so its folder must allow it; copy it to a folder of yours."
        ) from error


def _source(path: str, folder: str) -> tuple[Path, dict[str, Any]]:
    """Where the tokens of `path` are kept, and what they are made from. ValueError for a file that can't hold conversations."""
    check_inputs([path])
    if not path.lower().endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        raise UserError(f"--data_file {path}: conversations come as .jsonl, .jsonl.gz or .jsonl.zst.")
    made_from = {"format": _FORMAT, "file": _fingerprint(Path(path)), "tokenizer": _tokenizer_hash(folder)}
    return with_ending(Path(path), ".sft"), made_from


def look_at_conversations(path: str, folder: str) -> tuple[Conversations, float]:
    """For a check that leaves nothing behind: all conversations where they were tokenised before, else those at the file's beginning;
    and the share of the file that they are. Errors as of `open_conversations`."""
    prefix, made_from = _source(path, folder)
    if found := _read(prefix, made_from):
        return found, 1.0
    _load_once(folder)
    piece = next(iter(read_pieces([path], "conversations")), None)
    if piece is None:
        raise _nothing_usable(path, Counter())
    first = _tokenise(piece, folder)
    left_out = Counter(fault.reason for fault in first.broken)
    if not len(first.sizes):
        raise _nothing_usable(path, left_out)
    with tempfile.TemporaryDirectory() as beside:  # a mapped file stays readable when its name is gone
        with BinIdxWriter(Path(beside) / "first", np.int32) as out:
            out.add_bytes(first.coded, first.sizes)
        data = MMapIndexedDataset(Path(beside) / "first")
    return Conversations(data, dict(left_out), first.turns, first.answer_tokens), first.end / Path(path).stat().st_size


def _nothing_usable(path: str, left_out: Counter[str]) -> ValueError:
    reasons = ", ".join(f"{reason} ({count} lines)" for reason, count in left_out.most_common(3)) or "it is empty"
    return ValueError(
        f"--data_file {path} holds no conversation that can be used: {reasons}. Expected lines like "
        '{"conversations": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
    )


def _fingerprint(path: Path) -> list[Any]:
    """Size, time and the first and last megabyte: a file that changed differs in one of them."""
    stat = path.stat()
    with path.open("rb") as file:
        digest = hashlib.blake2b(file.read(1 << 20))
        file.seek(max(0, stat.st_size - (1 << 20)))
        digest.update(file.read())
    return [stat.st_size, stat.st_mtime_ns, digest.hexdigest()[:32]]


def _tokenizer_hash(name_or_folder: str) -> str:
    if name_or_folder == "world":  # its vocabulary never changes
        parts = [b"world", RWKV_TEMPLATE.encode()]
    else:
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        parts = [file.read_bytes() for name in names if (file := Path(name_or_folder) / name).is_file()]
    return hashlib.blake2b(b"\0".join(parts)).hexdigest()[:32]


def _read(prefix: Path, made_from: dict[str, Any]) -> Conversations | None:
    try:
        notes = json.loads(with_ending(prefix, ".json").read_text())
        if notes["made_from"] == made_from:
            return Conversations(MMapIndexedDataset(prefix), **notes["found"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # none yet, or a cut one: it is made again
    return None


def _make(path: str, folder: str, prefix: Path, made_from: dict[str, Any], workers: int) -> Conversations:
    _load_once(folder)
    notes_path = with_ending(prefix, ".json")
    notes_path.unlink(missing_ok=True)
    left_out: Counter[str] = Counter()
    turns = answer_tokens = 0
    pieces = read_pieces([path], "conversations")
    bar = tqdm(total=Path(path).stat().st_size, desc=f"tokenising {Path(path).name}", unit="B", unit_scale=True)
    with BinIdxWriter(prefix, np.int32) as out, bar:
        for part in map_in_order(partial(_tokenise, folder=folder), pieces, workers):
            for fault in part.broken:
                left_out[fault.reason] += 1
                if left_out.total() <= _SHOWN_BROKEN:
                    tqdm.write(f"left out: {fault}")
            out.add_bytes(part.coded, part.sizes)
            turns += part.turns
            answer_tokens += part.answer_tokens
            bar.update(part.end - bar.n)
        if not out.n_documents:
            raise _nothing_usable(path, left_out)
    found = {"left_out": left_out, "turns": turns, "answer_tokens": answer_tokens}
    with atomic_write(notes_path) as file:
        file.write(json.dumps({"made_from": made_from, "found": found}).encode())
    return Conversations(MMapIndexedDataset(prefix), dict(left_out), turns, answer_tokens)

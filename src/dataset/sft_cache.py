"""Cache of tokenized conversations next to their file, rebuilt when the file, the tokenizer or the format changes.

X.jsonl.sft.bin/.idx   one document per conversation, int32: a token with a loss is its id, one without is ~id
X.jsonl.sft.json       {"made_from": format version and fingerprints of the inputs, "found": counts}, written last

Of conversations with pictures or sounds also:

X.jsonl.sft-media.bin/.idx   one document per conversation, uint8: its media as JSON, [[name, number of tokens], ...]
X.jsonl.sft-broken.txt       the files that can't be used, each with the reason
"""

import errno
import hashlib
import json
import tempfile
from collections import Counter
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from src.config import PLACEHOLDER
from src.dataset.binidx import BinIdxWriter, MMapIndexedDataset, with_ending
from src.dataset.chat_template import RWKV_TEMPLATE
from src.dataset.conversation_files import check_conversation_file, read_conversation_pieces
from src.dataset.conversations import MARK_ADVICE, check_template
from src.dataset.corpus.documents import InvalidLine, invalid_line, read_lines
from src.dataset.corpus.text_input import Piece
from src.dataset.encode_conversation import chat_tokenizer, encode_conversation
from src.dataset.media_files import MediaError, MissingPackageError
from src.dataset.media_reader import MediaReader, UnusableMediaError
from src.dataset.unusable_lines import advice, by_reason
from src.dataset.workers import map_in_order, usable_cores
from src.errors import UserError
from src.files import atomic_write, file_lock
from src.terminal import printable

# Version of the cache. To be increased whenever the same inputs give other tokens, so that older caches are rebuilt.
_FORMAT = 2
_SHOWN_INVALID_LINES = 3
# PLACEHOLDER as a token of the cache, where ~PLACEHOLDER would be a token 0 with a loss; no vocabulary is as large
MEDIA_CODE = 1 << 30
_SHOWN_UNUSED = 10  # kinds; some sets have a field per line


class Conversations(NamedTuple):
    """Tokenized conversations, each with at least one token with a loss.

    data            ids with a loss as they are, others as ~id; see `read`
    left_out        number of unusable lines by reason
    turns           number of turns of all conversations
    answer_tokens   number of tokens with a loss
    unused          number of things in usable lines that are not in the tokens, such as "field 'id'", by kind
    """

    data: MMapIndexedDataset
    left_out: dict[str, int]
    turns: int
    answer_tokens: int
    unused: dict[str, int] = {}  # noqa: RUF012 (read only)
    media: MMapIndexedDataset | None = None  # None: read without an encoder

    def read(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Ids of a conversation, PLACEHOLDER for those of media, and a mask of those that the assistant wrote."""
        coded = self.data[index].astype(np.int64)
        ids = np.where(coded < 0, ~coded, coded)
        return np.where(ids == MEDIA_CODE, PLACEHOLDER, ids), coded >= 0

    def media_of(self, index: int) -> list[tuple[str, int]]:
        """(name, number of tokens) of each medium of a conversation, in order."""
        if self.media is None:
            return []
        return [(name, count) for name, count in json.loads(self.media[index].tobytes())]

    def largest_id(self) -> int:
        """Of the tokens of text."""
        largest = 0
        for start in range(0, self.data.n_tokens, 1 << 24):  # 16 M at a time
            coded = self.data.read(start, start + (1 << 24))
            ids = np.where(coded < 0, ~coded, coded)
            largest = max(largest, int(ids[ids != MEDIA_CODE].max(initial=0)))
        return largest


_cached_tokenizer = lru_cache(1)(chat_tokenizer)  # loaded before the workers are forked, which then share it


class _TokenizedPiece(NamedTuple):
    """The conversations of one piece of the file, encoded as in the cache."""

    tokens: bytes
    sizes: npt.NDArray[np.int32]
    turns: int
    answer_tokens: int
    invalid: list[InvalidLine]
    unused: Counter[str]
    end: int  # bytes of input read, as of `Piece`
    media: list[bytes]  # of each conversation, as in the cache
    broken: list[str]  # files that can't be used


def _tokenize_piece(
    piece: Piece, folder: str, parse_special: bool, think: str, reader: MediaReader | None
) -> _TokenizedPiece:
    """Raises UserError for what isn't a matter of one line: a missing package, and media that may not be left out."""
    tokenizer = _cached_tokenizer(folder, think)
    parts, sizes, invalid, turns, answer_tokens = [], [], [], 0, 0
    unused: Counter[str] = Counter()
    media: list[bytes] = []
    broken: list[str] = []
    for index, line in read_lines(piece):
        assert isinstance(line, bytes)
        try:
            encoded = encode_conversation(tokenizer, line, parse_special, reader)
        except (MissingPackageError, UnusableMediaError):
            raise
        except UserError as error:
            invalid.append(invalid_line(piece, index, error.problem, line))
            if isinstance(error, MediaError):
                broken.append(f"{error.given}: {error.problem}")
            continue
        tokens = np.array(encoded.ids, "<i4")
        tokens[tokens == PLACEHOLDER] = MEDIA_CODE
        # ~id is negative for every id, unlike -id, which can't mark id 0.
        parts.append(np.where(encoded.is_answer, tokens, ~tokens).tobytes())
        sizes.append(len(tokens))
        turns += encoded.turns
        answer_tokens += int(encoded.is_answer.sum())
        unused += encoded.unused
        media.append(json.dumps(encoded.media).encode())
    lengths = np.array(sizes, np.int32)
    return _TokenizedPiece(b"".join(parts), lengths, turns, answer_tokens, invalid, unused, piece.end, media, broken)


def open_conversations(
    path: str,
    folder: str,
    workers: int | None = None,
    parse_special: bool = False,
    think: str = "",
    reader: MediaReader | None = None,
) -> Conversations:
    """The conversations of a file, from the cache or tokenized now; `parse_special` as for `encode_conversation`.

    `think` as for `chat_tokenizer`; `reader`: of media, None where there are none.

    Several processes may call it at the same time: one builds the cache, the others wait. UserError for a file or
    tokenizer that is not usable, and when no line of the file is a conversation. Prints what is left out while it
    tokenizes; of a cached file `left_out` and `unused` have the counts.
    """
    prefix, made_from = _identify_cache(path, folder, parse_special, think, reader)
    try:
        # Before locking, so that a finished cache is usable in a folder without write permission.
        if cached := _read_cache(prefix, made_from):
            return cached
        # The lock file is left behind: deleting it while others wait for it would cost them a retry.
        with file_lock(with_ending(prefix, ".lock"), wait=True):
            # Read again: another process may have built it while this one waited.
            return _read_cache(prefix, made_from) or _build_cache(
                path, folder, prefix, made_from, workers or usable_cores(), parse_special, think, reader
            )
    except OSError as error:
        # A full disk or a failing one is not the user's choice of folder: those keep their own message.
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise UserError(
            f"the cache of its tokens can't be written next to it ({error})",
            flag="data_file",
            given=path,
            advice="copy the file to a folder with write permission",
        ) from error


def _identify_cache(
    path: str, folder: str, parse_special: bool, think: str, reader: MediaReader | None
) -> tuple[Path, dict[str, Any]]:
    """Prefix of the cache of `path`, and the `made_from` of a valid one. UserError for a file of another kind."""
    check_conversation_file(path)
    made_from = {
        "format": _FORMAT,
        "file": _fingerprint(Path(path)),
        "tokenizer": _tokenizer_hash(folder),
        "parse_special": parse_special,
        "think": think,
    }
    if reader is not None:
        made_from["media"] = [reader.kind, str(Path(reader.folder).resolve()), reader.max_seconds, reader.identity]
    # Next to the data, so that several runs, and users of a shared folder, use one cache.
    return with_ending(Path(path), ".sft"), made_from


def look_at_conversations(
    path: str, folder: str, parse_special: bool = False, think: str = "", reader: MediaReader | None = None
) -> tuple[Conversations, float]:
    """The conversations of a file without writing a cache: all of a cached file, else those of the first piece.

    Also returns the fraction of the file that they cover. Raises as `open_conversations`.
    """
    prefix, made_from = _identify_cache(path, folder, parse_special, think, reader)
    if cached := _read_cache(prefix, made_from):
        return cached, 1.0
    _cached_tokenizer(folder, think)
    # Reading stops after one piece: the check must be quick for a file of gigabytes.
    piece = next(iter(read_conversation_pieces(path)), None)
    if piece is None:
        raise _no_conversation(path, Counter())
    first = _tokenize_piece(piece, folder, parse_special, think, reader)
    left_out = Counter(line.reason for line in first.invalid)
    if not len(first.sizes):
        raise _no_conversation(path, left_out)
    with tempfile.TemporaryDirectory() as temporary:  # a mapped file stays readable after it is deleted
        with BinIdxWriter(Path(temporary) / "first", np.int32) as out:
            out.add_bytes(first.tokens, first.sizes)
        data, media = MMapIndexedDataset(Path(temporary) / "first"), None
        if reader is not None:
            with BinIdxWriter(Path(temporary) / "media", np.uint8) as out:
                _add_media(out, first.media)
            media = MMapIndexedDataset(Path(temporary) / "media")
    share = first.end / Path(path).stat().st_size
    return Conversations(data, dict(left_out), first.turns, first.answer_tokens, dict(first.unused), media), share


def _add_media(out: BinIdxWriter, media: list[bytes]) -> None:
    out.add_bytes(b"".join(media), np.array([len(record) for record in media], np.int32))


def _media_prefix(prefix: Path) -> Path:
    return with_ending(prefix, "-media")


def _no_conversation(path: str, left_out: Counter[str]) -> UserError:
    return UserError(
        f"no usable conversation ({by_reason(left_out) or 'the file is empty'})",
        flag="data_file",
        given=path,
        expected='lines like {"conversations": [{"role": "user", "content": "..."}, '
        '{"role": "assistant", "content": "..."}]}',
        advice=advice(left_out),
    )


def _fingerprint(path: Path) -> list[Any]:
    """Size, modification time, and a hash of the first and last megabyte: hashing a whole file of gigabytes is slow."""
    stat = path.stat()
    with path.open("rb") as file:
        digest = hashlib.blake2b(file.read(1 << 20))
        file.seek(max(0, stat.st_size - (1 << 20)))
        digest.update(file.read())
    return [stat.st_size, stat.st_mtime_ns, digest.hexdigest()[:32]]


def _tokenizer_hash(name_or_folder: str) -> str:
    if name_or_folder == "world":  # the vocabulary is fixed, the template is ours and may change
        parts = [b"world", RWKV_TEMPLATE.encode()]
    else:
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        # What `load_tokenizer` reads of a folder.
        parts = [file.read_bytes() for name in names if (file := Path(name_or_folder) / name).is_file()]
    return hashlib.blake2b(b"\0".join(parts)).hexdigest()[:32]


def _read_cache(prefix: Path, made_from: dict[str, Any]) -> Conversations | None:
    """The cache, or None where there is none for these inputs in this format: missing, outdated, older or damaged."""
    try:
        record = json.loads(with_ending(prefix, ".json").read_text(encoding="utf-8"))
        if record["made_from"] != made_from:
            return None
        found = record["found"]
        left_out = {str(reason): int(count) for reason, count in found["left_out"].items()}
        unused = {str(kind): int(count) for kind, count in found["unused"].items()}
        counts = int(found["turns"]), int(found["answer_tokens"])
        data = MMapIndexedDataset(prefix)
        media = MMapIndexedDataset(_media_prefix(prefix)) if "media" in made_from else None
        if media is not None and len(media) != len(data):
            return None
        return Conversations(data, left_out, *counts, unused, media)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        # Not JSON, of another structure, or a token file that doesn't match: rebuilding is always safe.
        return None


def _build_cache(
    path: str,
    folder: str,
    prefix: Path,
    made_from: dict[str, Any],
    workers: int,
    parse_special: bool,
    think: str,
    reader: MediaReader | None,
) -> Conversations:
    tokenizer = _cached_tokenizer(folder, think)
    assert tokenizer.chat_template is not None
    # Not an error: most files have no thoughts, and lines with them are counted as unusable.
    if reason := check_template(tokenizer.chat_template, tokenizer.special_tokens):
        tqdm.write(
            "note: conversations with thoughts in <think> tags are unusable with this chat template, because of "
            f"{printable(reason)};\n  if there are any, {MARK_ADVICE}"
        )
    record = with_ending(prefix, ".json")
    # The record goes first and comes last: it never exists next to tokens that it doesn't describe.
    record.unlink(missing_ok=True)
    left_out: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    turns = answer_tokens = 0
    pieces = read_conversation_pieces(path)
    progress = tqdm(
        total=Path(path).stat().st_size, desc=f"tokenizing {printable(Path(path).name)}", unit="B", unit_scale=True
    )
    broken: list[str] = []
    with ExitStack() as files, BinIdxWriter(prefix, np.int32) as out, progress:
        media_out = files.enter_context(BinIdxWriter(_media_prefix(prefix), np.uint8)) if reader is not None else None
        tokenize = partial(_tokenize_piece, folder=folder, parse_special=parse_special, think=think, reader=reader)
        for part in map_in_order(tokenize, pieces, workers):
            for line in part.invalid:
                left_out[line.reason] += 1
                if left_out.total() <= _SHOWN_INVALID_LINES:
                    tqdm.write(printable(f"left out: {line}"))
            out.add_bytes(part.tokens, part.sizes)
            if media_out is not None:
                _add_media(media_out, part.media)
            broken += part.broken
            turns += part.turns
            answer_tokens += part.answer_tokens
            unused += part.unused
            progress.update(part.end - progress.n)
        if not out.n_documents:
            raise _no_conversation(path, left_out)
    if broken:
        listed = with_ending(prefix, "-broken.txt")
        with atomic_write(listed, "w") as file:
            file.write("".join(f"{printable(line)}\n" for line in broken))
        tqdm.write(f"{len(broken):,} conversations are left out for a file that can't be used; {listed} names them")
    found = {"left_out": left_out, "turns": turns, "answer_tokens": answer_tokens, "unused": unused}
    with atomic_write(record) as file:
        file.write(json.dumps({"made_from": made_from, "found": found}).encode())
    media = MMapIndexedDataset(_media_prefix(prefix)) if reader is not None else None
    conversations = Conversations(MMapIndexedDataset(prefix), dict(left_out), turns, answer_tokens, dict(unused), media)
    if unused:
        tqdm.write(
            "not used: "
            + printable(", ".join(f"{kind} ({count:,} times)" for kind, count in unused.most_common(_SHOWN_UNUSED)))
        )
    return conversations

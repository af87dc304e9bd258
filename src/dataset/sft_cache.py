"""Cache of tokenized conversations next to their file, rebuilt when the file, the tokenizer or the format changes.

X.jsonl.sft.bin/.idx   one document per conversation, int32: a token with a loss is its id, one without is ~id
X.jsonl.sft.json       {"made_from": format version and fingerprints of the inputs, "found": counts}, written last
"""

import errno
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Collection
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from src.dataset.binidx import BinIdxWriter, MMapIndexedDataset, with_ending
from src.dataset.chat_template import RWKV_TEMPLATE
from src.dataset.control_tokens import ContentMarks
from src.dataset.conversation_files import check_conversation_file, read_conversation_pieces
from src.dataset.conversation_formats import Conversation, read_conversation
from src.dataset.conversations import MARK_ADVICE, RenderedConversation, check_template, render_with_answers
from src.dataset.corpus.documents import InvalidLine, invalid_line, read_lines
from src.dataset.corpus.text_input import Piece
from src.dataset.tokenizer import Tokenizer, load_tokenizer
from src.dataset.unusable_lines import advice, by_reason
from src.dataset.workers import map_in_order, usable_cores
from src.errors import UserError
from src.files import atomic_write, file_lock

# Version of the cache. To be increased whenever the same inputs give other tokens, so that older caches are rebuilt.
_FORMAT = 2
_SHOWN_INVALID_LINES = 3
_SHOWN_UNUSED = 10  # kinds; some sets have a field per line
_LONGEST_NAME = 40  # of a field that is counted and printed


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

    def read(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Ids of a conversation, and a mask of those that the assistant wrote."""
        coded = self.data[index].astype(np.int64)
        return np.where(coded < 0, ~coded, coded), coded >= 0


def chat_tokenizer(folder: str, think: str = "") -> Tokenizer:
    """The tokenizer for conversations, its template with a mode of THINK_MODES or "" (as the data are).

    UserError for --tokenizer without a usable chat template, and for a mode that the template lacks.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer.chat_template is None:
        raise UserError(
            "no chat template",
            flag="tokenizer",
            given=folder,
            expected="world, or a tokenizer folder with a chat template",
        )
    tokenizer.chat_template = tokenizer.chat_template.thinking(think)
    try:
        check_template(tokenizer.chat_template, tokenizer.special_tokens)
    except UserError as error:
        raise UserError(error.problem, flag="tokenizer", given=folder, advice=error.advice) from error
    return tokenizer


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


class EncodedConversation(NamedTuple):
    """Ids of a conversation, a mask of the tokens with a loss, the number of turns, and `Conversations.unused`."""

    ids: list[int]
    is_answer: npt.NDArray[np.bool_]
    turns: int
    unused: Counter[str]


def encode_conversation(tokenizer: Tokenizer, line: bytes, parse_special: bool = False) -> EncodedConversation:
    """Encodes a JSON line. UserError, its `problem` the reason, when the line is not a usable conversation.

    Special tokens in contents, such as `<|im_end|>`, are text like any other; with `parse_special` they are tokens.
    """
    assert tokenizer.chat_template is not None
    try:
        conversation = read_conversation(line)
        if parse_special:
            rendered = render_with_answers(tokenizer.chat_template, tokenizer.special_tokens, conversation)
            literals: Collection[int] = ()
        else:
            rendered, literals = _render_as_text(tokenizer, conversation)
    except RecursionError:  # JSON may be parsed at a depth that can't be walked through
        raise UserError("fields that are nested too deeply") from None
    ids, is_answer = tokenizer.encode_marked(rendered.text, rendered.answers, literals)
    if not is_answer[1:].any():  # the first token is never a target
        raise UserError("no answer")
    unused = Counter(f"field {field[:_LONGEST_NAME]!r}" for field in conversation.unused_fields)
    if rendered.omitted_thoughts:
        unused["earlier thought (left out by the chat template)"] = rendered.omitted_thoughts
    return EncodedConversation(ids, is_answer, len(conversation.messages), unused)


def _render_as_text(tokenizer: Tokenizer, conversation: Conversation) -> tuple[RenderedConversation, Collection[int]]:
    """The rendered conversation, and the first characters of the special tokens in it that stand in its contents."""
    template, special_tokens = tokenizer.chat_template, tokenizer.special_tokens
    assert template is not None
    contents = [conversation.messages, conversation.tools]
    marks = ContentMarks(special_tokens, [template.source, json.dumps(contents, ensure_ascii=False)])
    messages = [marks.add_to_message(message) for message in conversation.messages]
    tools = marks.add_to_strings(conversation.tools)
    rendered = render_with_answers(template, special_tokens, conversation._replace(messages=messages, tools=tools))
    text, literals = marks.remove(rendered.text)
    if json.dumps(marks.mark)[1:-1] in text:  # `tojson(ensure_ascii=true)` wrote the mark as an escape sequence
        raise UserError("a special token in a value that the chat template writes with escape sequences")
    answers = marks.spans_without_marks(rendered.text, rendered.answers)
    return rendered._replace(text=text, answers=answers), literals


def _tokenize_piece(piece: Piece, folder: str, parse_special: bool, think: str) -> _TokenizedPiece:
    tokenizer = _cached_tokenizer(folder, think)
    parts, sizes, invalid, turns, answer_tokens = [], [], [], 0, 0
    unused: Counter[str] = Counter()
    for index, line in read_lines(piece):
        assert isinstance(line, bytes)
        try:
            encoded = encode_conversation(tokenizer, line, parse_special)
        except UserError as error:
            invalid.append(invalid_line(piece, index, error.problem, line))
            continue
        tokens = np.array(encoded.ids, "<i4")
        # ~id is negative for every id, unlike -id, which can't mark id 0.
        parts.append(np.where(encoded.is_answer, tokens, ~tokens).tobytes())
        sizes.append(len(tokens))
        turns += encoded.turns
        answer_tokens += int(encoded.is_answer.sum())
        unused += encoded.unused
    return _TokenizedPiece(b"".join(parts), np.array(sizes, np.int32), turns, answer_tokens, invalid, unused, piece.end)


def open_conversations(
    path: str, folder: str, workers: int | None = None, parse_special: bool = False, think: str = ""
) -> Conversations:
    """The conversations of a file, from the cache or tokenized now; `parse_special` as for `encode_conversation`.

    `think` as for `chat_tokenizer`.

    Several processes may call it at the same time: one builds the cache, the others wait. UserError for a file or
    tokenizer that is not usable, and when no line of the file is a conversation. Prints what is left out while it
    tokenizes; of a cached file `left_out` and `unused` have the counts.
    """
    prefix, made_from = _identify_cache(path, folder, parse_special, think)
    try:
        # Before locking, so that a finished cache is usable in a folder without write permission.
        if cached := _read_cache(prefix, made_from):
            return cached
        # The lock file is left behind: deleting it while others wait for it would cost them a retry.
        with file_lock(with_ending(prefix, ".lock"), wait=True):
            # Read again: another process may have built it while this one waited.
            return _read_cache(prefix, made_from) or _build_cache(
                path, folder, prefix, made_from, workers or usable_cores(), parse_special, think
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


def _identify_cache(path: str, folder: str, parse_special: bool, think: str) -> tuple[Path, dict[str, Any]]:
    """Prefix of the cache of `path`, and the `made_from` of a valid one. UserError for a file of another kind."""
    check_conversation_file(path)
    made_from = {
        "format": _FORMAT,
        "file": _fingerprint(Path(path)),
        "tokenizer": _tokenizer_hash(folder),
        "parse_special": parse_special,
        "think": think,
    }
    # Next to the data, so that several runs, and users of a shared folder, use one cache.
    return with_ending(Path(path), ".sft"), made_from


def look_at_conversations(
    path: str, folder: str, parse_special: bool = False, think: str = ""
) -> tuple[Conversations, float]:
    """The conversations of a file without writing a cache: all of a cached file, else those of the first piece.

    Also returns the fraction of the file that they cover. Raises as `open_conversations`.
    """
    prefix, made_from = _identify_cache(path, folder, parse_special, think)
    if cached := _read_cache(prefix, made_from):
        return cached, 1.0
    _cached_tokenizer(folder, think)
    # Reading stops after one piece: the check must be quick for a file of gigabytes.
    piece = next(iter(read_conversation_pieces(path)), None)
    if piece is None:
        raise _no_conversation(path, Counter())
    first = _tokenize_piece(piece, folder, parse_special, think)
    left_out = Counter(line.reason for line in first.invalid)
    if not len(first.sizes):
        raise _no_conversation(path, left_out)
    with tempfile.TemporaryDirectory() as temporary:  # a mapped file stays readable after it is deleted
        with BinIdxWriter(Path(temporary) / "first", np.int32) as out:
            out.add_bytes(first.tokens, first.sizes)
        data = MMapIndexedDataset(Path(temporary) / "first")
    share = first.end / Path(path).stat().st_size
    return Conversations(data, dict(left_out), first.turns, first.answer_tokens, dict(first.unused)), share


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
        return Conversations(MMapIndexedDataset(prefix), left_out, *counts, unused)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        # Not JSON, of another structure, or a token file that doesn't match: rebuilding is always safe.
        return None


def _build_cache(
    path: str, folder: str, prefix: Path, made_from: dict[str, Any], workers: int, parse_special: bool, think: str
) -> Conversations:
    tokenizer = _cached_tokenizer(folder, think)
    assert tokenizer.chat_template is not None
    # Not an error: most files have no thoughts, and lines with them are counted as unusable.
    if reason := check_template(tokenizer.chat_template, tokenizer.special_tokens):
        tqdm.write(
            "note: conversations with thoughts in <think> tags are unusable with this chat template, because of "
            f"{reason};\n  if there are any, {MARK_ADVICE}"
        )
    record = with_ending(prefix, ".json")
    # The record goes first and comes last: it never exists next to tokens that it doesn't describe.
    record.unlink(missing_ok=True)
    left_out: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    turns = answer_tokens = 0
    pieces = read_conversation_pieces(path)
    progress = tqdm(total=Path(path).stat().st_size, desc=f"tokenizing {Path(path).name}", unit="B", unit_scale=True)
    with BinIdxWriter(prefix, np.int32) as out, progress:
        tokenize = partial(_tokenize_piece, folder=folder, parse_special=parse_special, think=think)
        for part in map_in_order(tokenize, pieces, workers):
            for line in part.invalid:
                left_out[line.reason] += 1
                if left_out.total() <= _SHOWN_INVALID_LINES:
                    tqdm.write(f"left out: {line}")
            out.add_bytes(part.tokens, part.sizes)
            turns += part.turns
            answer_tokens += part.answer_tokens
            unused += part.unused
            progress.update(part.end - progress.n)
        if not out.n_documents:
            raise _no_conversation(path, left_out)
    found = {"left_out": left_out, "turns": turns, "answer_tokens": answer_tokens, "unused": unused}
    with atomic_write(record) as file:
        file.write(json.dumps({"made_from": made_from, "found": found}).encode())
    conversations = Conversations(MMapIndexedDataset(prefix), dict(left_out), turns, answer_tokens, dict(unused))
    if unused:
        tqdm.write(
            "not used: " + ", ".join(f"{kind} ({count:,} times)" for kind, count in unused.most_common(_SHOWN_UNUSED))
        )
    return conversations

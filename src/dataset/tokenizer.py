"""Tokenizers behind one interface: the RWKV World vocabulary, and Hugging Face tokenizer folders.

Folders are read with `tokenizers` and `jinja2` alone, because importing `transformers` takes seconds.
"""

import ast
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from src.dataset.chat_template import RWKV_TEMPLATE, ChatTemplate
from src.dataset.control_tokens import special_token_pattern, split_at_control_tokens
from src.dataset.tokenizer_files import decoded, default_template, read_files, read_json, token_text
from src.errors import UserError

WORLD_VOCAB_SIZE = 65536  # rows of the published models
WORLD_LARGEST_ID = 65529  # of the vocabulary file rwkv_vocab_v20230424.txt: a model with 65530 rows has all ids
MAX_VOCAB_SIZE = 10_000_000  # a list of so many entries is made


class Tokenizer:
    """Converts text to token ids and back. Created by `load_tokenizer`.

    name           "world", or the folder of the tokenizer
    vocab_size     upper bound of the ids; the `--vocab_size` of a model for this tokenizer
    largest_id     the largest id; a model needs more rows than that
    chat_template  template that turns conversations into text, or None
    eos_ids        ids that end generation: the tokenizer's eos_token, and 0, which ends documents, unless 0 is text
    text_of_0      text of id 0; "" in most vocabularies, "!" in that of GPT-2
    specials       texts of bos_token, eos_token and unk_token, those that exist, for chat templates
    files          contents of the files that `load_tokenizer` would need in a folder, by name
    """

    name: str
    vocab_size: int
    largest_id: int
    specials: dict[str, str]
    eos_ids: tuple[int, ...] = (0,)
    text_of_0: str = ""
    chat_template: ChatTemplate | None = None
    files: Mapping[str, bytes] = MappingProxyType({})

    @property
    def special_tokens(self) -> list[str]:
        """The texts of special tokens, such as `<|im_end|>`."""
        return []

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without added special tokens. UserError for text with lone surrogates."""
        raise NotImplementedError

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, computed in parallel where the tokenizer supports it."""
        return [self.encode(text) for text in texts]

    def encode_batch_as_text(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, in which special tokens such as `<|im_end|>` are text like any other."""
        return self.encode_batch(texts)

    def encode_as_text(self, text: str) -> list[int]:
        """Ids of `text`, in which special tokens are text like any other. UserError as `encode`."""
        return self.encode(text)

    def encode_rendered(self, text: str, literals: Collection[int]) -> list[int]:
        """Ids of a rendered conversation, in which the special tokens that begin at the characters `literals` are text.

        `ContentMarks` finds these. UserError as `encode`.
        """
        if not literals or self._special_pattern is None:  # nearly always
            return self.encode(text)
        parts = split_at_control_tokens(text, self._special_pattern, literals)
        return [i for _, part, control in parts for i in (self.encode if control else self.encode_as_text)(part)]

    def encode_marked(
        self, text: str, spans: list[tuple[int, int]], literals: Collection[int] = ()
    ) -> tuple[list[int], npt.NDArray[np.bool_]]:
        """Ids of `text`, and a mask of those that overlap the characters [begin, end) of any of `spans`.

        `literals` as in `encode_rendered`.
        """
        ids = self.encode_rendered(text, literals) if literals else self.encode_batch([text])[0]
        data = text.encode()
        # Positions from the byte lengths of tokens are exact and fast, if the tokens spell the text byte by byte.
        if self._entries is not None and self.decode_bytes(ids) == data:
            ends = np.cumsum(self._lengths[ids])
            begins = ends - self._lengths[ids]
            if len(data) != len(text):
                spans = [(len(text[:begin].encode()), len(text[:end].encode())) for begin, end in spans]
        else:  # a tokenizer that normalizes the text: its own offsets, which are slower
            begins, ends = self._offsets(text, literals)
        marked = np.zeros(len(ids), np.bool_)
        for begin, end in spans:
            marked |= (begins < end) & (begin < ends)
        return ids, marked

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens."""
        raise NotImplementedError

    def fixed_bytes(self, token: int) -> bytes | None:
        """The bytes that `token` always stands for; None for special tokens, unknown ids, and where the neighbours
        decide."""
        entries = self._entries
        if entries is None or token in self.special_ids or not 0 <= token < len(entries):
            return None
        return entries[token]

    @property
    def _entries(self) -> list[bytes] | None:
        """Bytes of each id, or None for a tokenizer whose tokens don't have fixed bytes."""
        raise NotImplementedError

    @cached_property
    def _lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(entry) for entry in self._entries or ()])

    @cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        return special_token_pattern(self.special_tokens)

    def _offsets(self, text: str, literals: Collection[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """First character of each token of `encode_rendered(text, literals)`, and the one after its last character."""
        raise NotImplementedError

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The UTF-8 bytes of `ids`, which may begin or end within a character. Unknown ids give U+FFFD."""
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


_FAILED = "tokenizer.json is not usable: it fails on a text"
_LONE_SURROGATES = "the text contains lone surrogates, which are not valid Unicode"
UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()  # what Python's own decoder puts in the place of invalid bytes


class WorldTokenizer(Tokenizer):
    """RWKV's trie tokenizer (greedy longest match over bytes), from the Rust package pyrwkv-tokenizer."""

    name = "world"
    vocab_size = WORLD_VOCAB_SIZE
    largest_id = WORLD_LARGEST_ID
    special_ids = frozenset((0,))

    def __init__(self) -> None:
        try:
            from pyrwkv_tokenizer import RWKVTokenizer
        except ImportError as error:
            raise UserError(
                "needs the package pyrwkv-tokenizer",
                flag="tokenizer",
                given="world",
                advice="pip install pyrwkv-tokenizer",
            ) from error
        self._rust = RWKVTokenizer()
        self.specials = {}
        self.chat_template = ChatTemplate(RWKV_TEMPLATE, self.specials)

    def encode(self, text: str) -> list[int]:
        try:
            return self._rust.encode(text)
        except UnicodeEncodeError as error:
            raise UserError(_LONE_SURROGATES) from error

    @property
    def vocabulary_file(self) -> Path:
        """The vocabulary: a line "id literal length" for each token."""
        return Path(self._rust.vocab_filepath)

    @cached_property
    def _entries(self) -> list[bytes]:
        """Bytes of each id."""
        # The package's own decoder can't return part of a character and panics on ids outside of its vocabulary.
        entries = [UNKNOWN] * self.vocab_size
        entries[0] = b""  # the end of a document has no text
        with self.vocabulary_file.open(encoding="utf-8") as lines:
            for line in lines:  # "230 '\xe5' 1": id, Python literal, length in bytes
                number, rest = line.split(" ", 1)
                entry = ast.literal_eval(rest[: rest.rindex(" ")])
                entries[int(number)] = entry.encode() if isinstance(entry, str) else entry
        return entries

    def decode_bytes(self, ids: list[int]) -> bytes:
        entries = self._entries
        return b"".join(entries[i] if 0 <= i < len(entries) else UNKNOWN for i in ids)


def _byte_level_alphabet() -> dict[str, int]:
    """Byte of each character of byte-level BPE: a visible Latin-1 character is its own byte, the rest are U+0100 on.

    The table `bytes_to_unicode` of GPT-2.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


class FolderTokenizer(Tokenizer):
    """A Hugging Face tokenizer folder: tokenizer.json, tokenizer_config.json and, in some, chat_template.jinja.

    files  contents of TOKENIZER_FILES, for a tokenizer that isn't in a folder, which `folder` then only names
    """

    def __init__(self, folder: str | os.PathLike[str], files: Mapping[str, bytes] | None = None) -> None:
        import tokenizers

        folder = Path(folder)
        self.name = str(folder)
        self.files = read_files(folder) if files is None else files
        if "tokenizer.json" not in self.files:
            raise UserError(
                "no tokenizer.json in it",
                flag="tokenizer",
                given=folder,
                expected="world or a Hugging Face tokenizer folder",
                advice="convert a folder of a slow tokenizer with AutoTokenizer.save_pretrained of transformers",
            )
        model = decoded(self.files["tokenizer.json"], folder / "tokenizer.json")
        with self._errors("tokenizer.json is not readable"):
            self._rust = tokenizers.Tokenizer.from_str(model)
            # Settings of training with `transformers` that some files carry; they would cut or pad long texts.
            self._rust.no_truncation()
            self._rust.no_padding()
            # Not the number of entries: some vocabularies skip ids.
            self.vocab_size = max(self._rust.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise UserError(
                f"tokenizer.json has an id {self.vocab_size - 1}",
                flag="tokenizer",
                given=folder,
                expected=f"ids below {MAX_VOCAB_SIZE}",
            )
        config = read_json(self.files.get("tokenizer_config.json", b"{}"), folder / "tokenizer_config.json")
        self.largest_id = self.vocab_size - 1
        names = ("bos_token", "eos_token", "unk_token")  # those that chat templates refer to
        self.specials = {name: text for name in names if (text := token_text(config.get(name))) is not None}
        # Special tokens are skipped, so only an ordinary entry gives a text here.
        with self._errors("tokenizer.json is not usable"):
            self.text_of_0 = self._rust.decode([0], skip_special_tokens=True)
        end = self._special_id("eos_token")
        if end is None:
            self.eos_ids = (0,)
        else:
            self.eos_ids = (end,) if self.text_of_0 or end == 0 else (0, end)
        # Newer versions of transformers write the template to its own file, which has precedence there too.
        template = self.files.get("chat_template.jinja")
        source = decoded(template, folder / "chat_template.jinja") if template is not None else default_template(config)
        if source is not None:
            try:
                self.chat_template = ChatTemplate(source, self.specials)
            except UserError as error:
                raise UserError(error.problem, flag="tokenizer", given=folder, expected=error.expected) from error

    @contextmanager
    def _errors(self, problem: str) -> Iterator[None]:
        """Within the block an error of the package is a UserError that begins with `problem`."""
        try:
            yield
        except BaseException as error:
            # What its Rust code doesn't expect, an id that its decoder lacks for example, is a class of no module that
            # could be imported, and no Exception.
            is_panic = type(error).__name__ == "PanicException"
            if not is_panic and type(error) is not Exception:  # the package raises no narrower class
                raise
            text = " ".join(str(error).split())[:200]
            raise UserError(f"{problem} ({text})", flag="tokenizer", given=Path(self.name)) from error

    def to_json(self) -> str:
        """tokenizer.json as the package understood it: it may give added tokens other ids than the file."""
        return self._rust.to_str()

    def _special_id(self, name: str) -> int | None:
        token = self.specials.get(name)
        if token is None:
            return None
        try:
            number = self._rust.token_to_id(token)
        except UnicodeEncodeError:  # a lone surrogate, which no vocabulary has
            number = None
        if number is None:
            raise UserError(f"its {name} {token!r} is not in its vocabulary", flag="tokenizer", given=self.name)
        return number

    def encode(self, text: str) -> list[int]:
        try:
            with self._errors(_FAILED):
                return self._rust.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # what the package raises for lone surrogates
            raise UserError(_LONE_SURROGATES) from error

    def encode_as_text(self, text: str) -> list[int]:
        return self._without_control_tokens(text, self.encode(text))

    def encode_batch_as_text(self, texts: list[str]) -> list[list[int]]:
        return [
            self._without_control_tokens(text, ids) for text, ids in zip(texts, self.encode_batch(texts), strict=True)
        ]

    def _without_control_tokens(self, text: str, ids: list[int]) -> list[int]:
        """`ids` of `text`, or, where special ones are among them, the ids that `text` has without special tokens."""
        # By the ids and not by a search in the text, because a tokenizer that normalizes finds other spellings too.
        if self.special_ids.isdisjoint(ids):
            return ids
        with self._errors(_FAILED):
            return self._text_only.encode(text, add_special_tokens=False).ids

    @cached_property
    def special_ids(self) -> frozenset[int]:  # type: ignore[override]
        added = self._rust.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    @cached_property
    def _text_only(self) -> Any:
        """The same tokenizer, which reads special tokens as text."""
        # A copy, because the option belongs to the object: switching it back and forth would not be safe in threads.
        copy = type(self._rust).from_str(self._rust.to_str())
        copy.encode_special_tokens = True
        return copy

    def _offsets(self, text: str, literals: Collection[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        parts: Iterable[tuple[int, str, bool]] = [(0, text, True)]
        if literals and self._special_pattern is not None:
            parts = split_at_control_tokens(text, self._special_pattern, literals)
        offsets = [
            np.array((self._rust if control else self._text_only).encode(part, add_special_tokens=False).offsets)
            .reshape(-1, 2)
            .astype(np.int64)
            + begin
            for begin, part, control in parts
        ]
        begins, ends = np.concatenate([np.empty((0, 2), np.int64), *offsets]).T
        return begins, ends

    @cached_property
    def special_tokens(self) -> list[str]:
        return [token.content for token in self._rust.get_added_tokens_decoder().values() if token.special]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # The "fast" variant omits offsets, which only `encode_marked` may need.
        with self._errors(_FAILED):
            return [encoding.ids for encoding in self._rust.encode_batch_fast(texts, add_special_tokens=False)]

    @cached_property
    def _entries(self) -> list[bytes] | None:
        from tokenizers import decoders

        if not isinstance(self._rust.decoder, decoders.ByteLevel):
            return None
        alphabet = _byte_level_alphabet()
        added = self._rust.get_added_tokens_decoder()
        entries = [UNKNOWN] * self.vocab_size
        for token, number in self._rust.get_vocab(with_added_tokens=True).items():
            # Added tokens are plain text, and some vocabularies have plain entries for unused ids.
            is_byte_level = number not in added and all(c in alphabet for c in token)
            entries[number] = bytes(alphabet[c] for c in token) if is_byte_level else token.encode()
        return entries

    def decode_bytes(self, ids: list[int]) -> bytes:
        entries = self._entries
        if entries is not None:
            return b"".join(entries[i] if 0 <= i < len(entries) else UNKNOWN for i in ids)
        # The package skips unknown ids, or raises on negative ones.
        runs = groupby(ids, key=lambda i: 0 <= i < self.vocab_size)
        with self._errors("tokenizer.json is not usable: it fails on tokens"):
            return b"".join(
                self._rust.decode(list(run), skip_special_tokens=False).encode() if known else UNKNOWN * len(list(run))
                for known, run in runs
            )


def load_tokenizer(name_or_folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of `--tokenizer`: "world", or a Hugging Face tokenizer folder.

    UserError when it doesn't exist or is not readable. A folder called `world` is given as `./world`.
    """
    if str(name_or_folder) == "world":
        return WorldTokenizer()
    return FolderTokenizer(name_or_folder)

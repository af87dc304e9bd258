"""The RWKV World tokenizer for transformers: greedy longest match over the bytes of the text."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

VOCABULARY = "rwkv_vocab_v20230424.txt"
# Id 0 has no text of its own: it ends a document. Its name is one that no text contains by accident.
END_OF_TEXT = "<|rwkv_tokenizer_end_of_text|>"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # of ids without an entry


class RWKVWorldTokenizer(PreTrainedTokenizer):
    """Tokens are strings with one character per byte (Latin-1), as a token may be part of a character."""

    vocab_files_names = {"vocab_file": VOCABULARY}  # noqa: RUF012 (the attribute that transformers reads)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self.vocab_file = vocab_file
        self._ids: dict[str, int] = {}
        for line in Path(vocab_file).read_text(encoding="utf-8").splitlines():
            # "230 '\xe5' 1": id, Python literal, length in bytes
            number, rest = line.split(" ", 1)
            entry = ast.literal_eval(rest[: rest.rindex(" ")])
            data = entry.encode() if isinstance(entry, str) else entry
            self._ids[data.decode("latin-1")] = int(number)
        self._tokens = {number: token for token, number in self._ids.items()}
        # The lengths of the tokens that begin with two bytes, longest first: what is worth looking up at a position.
        lengths: dict[str, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[:2], {1}).add(len(token))
        self._lengths = {begin: sorted(found, reverse=True) for begin, found in lengths.items()}
        for name in ("bos_token", "eos_token", "pad_token"):
            kwargs.setdefault(name, END_OF_TEXT)
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return max(self._tokens) + 1

    def get_vocab(self) -> dict[str, int]:
        return {END_OF_TEXT: 0, **self._ids, **getattr(self, "_added_tokens_encoder", {})}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        data = text.encode("utf-8").decode("latin-1")
        tokens, position = [], 0
        while position < len(data):
            for length in self._lengths.get(data[position : position + 2], (1,)):
                token = data[position : position + length]
                if token in self._ids:  # every single byte is
                    break
            tokens.append(token)
            position += len(token)
        return tokens

    def _convert_token_to_id(self, token: str) -> int | None:
        return 0 if token == END_OF_TEXT else self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return END_OF_TEXT if index == 0 else self._tokens.get(index, UNKNOWN)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of `tokens`; invalid UTF-8, such as half a character, becomes U+FFFD."""
        data = b"".join(
            token.encode("latin-1" if token in self._ids else "utf-8")  # others are added tokens, and UNKNOWN
            for token in tokens
        )
        return data.decode("utf-8", errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = Path(save_directory) / (f"{filename_prefix}-{VOCABULARY}" if filename_prefix else VOCABULARY)
        if path.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, path)
        return (str(path),)

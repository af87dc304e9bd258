"""States after texts that were processed before, so that a prompt costs only what follows its longest known prefix.

A state has the same size after any text (4 L C (N + 2) bytes in fp32: 2.4 MB for L12-D768), so all conversations and
shared prompts of a server can be kept. A text is known by a digest of its bytes and not by its tokens, since a client
sends an answer back as text, which may be tokenised in another way than it was generated.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from src.config import PLACEHOLDER
from src.dataset.tokenizer import UNKNOWN, Tokenizer
from src.model import State

# Before a token that isn't known by its bytes. UTF-8 has no such byte; a token that has it gets another one after it.
ESCAPE, LITERAL, BY_ID, MEDIUM = b"\xff", b"\x00", b"\x01", b"\x02"


class TextDigest:
    """Digests of a growing text: `add(token)` returns that of the text up to this token.

    Special tokens differ from ordinary ones that spell the same characters. `scope` separates texts that begin in
    different states.
    """

    def __init__(self, tokenizer: Tokenizer, scope: str = "") -> None:
        self._tokenizer = tokenizer
        self._hash = hashlib.blake2b(scope.encode(), digest_size=16)

    def add(self, token: int) -> bytes:
        """The digest of the text that ends with `token`."""
        self._hash.update(self._spelling(token))
        return self._hash.digest()

    def add_all(self, tokens: Sequence[int], media: Sequence[tuple[bytes, int]] = ()) -> list[bytes]:
        """The digests after each of `tokens`; `media`: (digest, number of tokens PLACEHOLDER) of each medium."""
        of_places = (medium for medium, count in media for _ in range(count))
        return [self._add_place(next(of_places)) if token == PLACEHOLDER else self.add(token) for token in tokens]

    def _add_place(self, medium: bytes) -> bytes:
        self._hash.update(ESCAPE + MEDIUM + medium)
        return self._hash.digest()

    def _spelling(self, token: int) -> bytes:
        entry = self._tokenizer.fixed_bytes(token)
        if entry is None or entry == UNKNOWN:
            return ESCAPE + BY_ID + token.to_bytes(4, "little")
        return entry.replace(ESCAPE, ESCAPE + LITERAL)


@dataclass(frozen=True)
class KnownText:
    """The state after a text (B = 1), and the final hidden vector [C] of its last token where that is known: the logits
    after the text come from it."""

    state: State
    hidden: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.state.layers for tensor in layer)


class PrefixCache:
    """The most recently used `KnownText`s by digest, of at most `limit` bytes together. For one thread."""

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._entries: OrderedDict[bytes, KnownText] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def store(self, digest: bytes, text: KnownText) -> None:
        """Keep `text`; the longest unused ones are dropped to make room. One larger than the limit isn't kept."""
        if text.nbytes > self.limit:
            return
        if (old := self._entries.pop(digest, None)) is not None:
            self.nbytes -= old.nbytes
            if text.hidden is None:  # the same text, generated this time: what is known of it stays known
                text = old
        self._entries[digest] = text
        self.nbytes += text.nbytes
        while self.nbytes > self.limit:
            _, dropped = self._entries.popitem(last=False)
            self.nbytes -= dropped.nbytes

    def longest(self, digests: Sequence[bytes]) -> tuple[int, KnownText | None]:
        """The number of tokens of the longest known prefix, of a prompt with these digests after each of its tokens,
        and what is known; 0 and None without one. The whole prompt counts only where its last hidden vector is known.
        """
        for length in range(len(digests), 0, -1):
            text = self._entries.get(digests[length - 1])
            if text is not None and (length < len(digests) or text.hidden is not None):
                self._entries.move_to_end(digests[length - 1])
                return length, text
        return 0, None

"""Keeps special tokens that stand in a message, such as `<|im_end|>` in a question about ChatML, from acting as tokens.

A chat template writes control tokens and the contents of messages into one string, where the two look alike. So the
contents are marked before rendering, and the marks tell afterwards which special tokens are text:

    marks = ContentMarks(tokenizer.special_tokens, [template.source, *contents])
    rendered = template.render([{**m, "content": marks.add(m["content"])} for m in messages])
    text, literals = marks.remove(rendered)
    ids = tokenizer.encode_rendered(text, literals)
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator
from typing import Any

# Private use characters, which no standard gives a meaning: a template copies them like letters.
_MARKS = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))


class ContentMarks:
    """A character that occurs in none of `texts`, put after the first character of each special token of a content.

    Inside the token, because templates strip contents and split them at their own markers: around it the mark would
    get lost, or protect white space from being stripped.
    """

    def __init__(self, special_tokens: Iterable[str], texts: Iterable[str]) -> None:
        # Chosen for each conversation, because one may contain any character, for example one about this module.
        used: set[str] = set().union(*texts)
        self.mark = next(character for character in map(chr, _MARKS) if character not in used)
        pattern = special_token_pattern(special_tokens)
        # A position for each token, overlapping ones too: what is left of a broken token could be another one.
        self._begins = pattern and re.compile(f"(?={pattern.pattern})(.)", re.DOTALL)

    def add(self, content: str) -> str:
        """`content` with a mark in each special token."""
        return self._begins.sub(rf"\1{self.mark}", content) if self._begins else content

    def add_to_strings(self, value: Any) -> Any:
        """`value`, of JSON types, with marks in its strings; keys of objects are unchanged."""
        if isinstance(value, str):
            return self.add(value)
        if isinstance(value, list):
            return [self.add_to_strings(entry) for entry in value]
        if isinstance(value, dict):
            return {key: self.add_to_strings(entry) for key, entry in value.items()}
        return value

    def remove(self, rendered: str) -> tuple[str, frozenset[int]]:
        """The text without marks, and the first characters of the special tokens in it that are text."""
        parts = rendered.split(self.mark)
        begins, length = [], 0
        for part in parts[:-1]:
            # The mark stands after the token's first character, and positions count without the marks before it.
            length += len(part)
            begins.append(length - 1)
        return "".join(parts), frozenset(begins)

    def spans_without_marks(self, rendered: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Characters [begin, end) of `rendered` as those of its text without marks."""
        marks = [match.start() for match in re.finditer(self.mark, rendered)]
        return [(begin - bisect_left(marks, begin), end - bisect_left(marks, end)) for begin, end in spans]


def special_token_pattern(special_tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Matches a special token, the longest one at its position; None where there are no special tokens."""
    # Longest first, because a regular expression takes the first alternative that matches.
    alternatives = [re.escape(token) for token in sorted(special_tokens, key=len, reverse=True) if token]
    return re.compile("(?:" + "|".join(alternatives) + ")") if alternatives else None


def split_at_control_tokens(
    text: str, pattern: re.Pattern[str], literals: Collection[int]
) -> Iterator[tuple[int, str, bool]]:
    """(first character, part, whether it is a control token): the parts of `text` in order.

    `pattern` is that of the special tokens, `literals` the first characters of those that are text.
    """
    begin = position = 0
    while match := pattern.search(text, position):
        if match.start() in literals:
            # By one character only: a control token may follow within what the pattern matched here.
            position = match.start() + 1
            continue
        if begin < match.start():
            yield begin, text[begin : match.start()], False
        yield match.start(), match.group(), True
        begin = position = match.end()
    if begin < len(text):
        yield begin, text[begin:], False

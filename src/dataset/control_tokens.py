"""Keeps special tokens that stand in a message, such as `<|im_end|>` in a question about ChatML, from acting as tokens.

A chat template writes control tokens and the contents of messages into one string, where the two look alike. So the
contents are marked before rendering, and the marks tell afterwards which special tokens are text:

    marks = ContentMarks(tokenizer.special_tokens, [template.source, *contents])
    rendered = template.render([marks.add_to_message(message) for message in messages])
    text, literals = marks.remove(rendered)
    ids = tokenizer.encode_rendered(text, literals)
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from src.dataset.chat_template import Message

# What an assistant generates as tokens within an answer, where a tokenizer has them: thoughts and calls. Templates
# look for these in the content of an answer.
ANSWER_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
# Private use characters, which no standard gives a meaning: a template copies them like letters.
_MARKS = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))


def parses_special_tokens(choice: str) -> bool:
    """Whether special tokens that stand in a text are tokens, by a value of --special_tokens."""
    return choice == "parse"


class ContentMarks:
    """A character that occurs in none of `texts`, put after the first character of each special token of a content.

    Inside the token, because templates strip contents and split them at their own markers: around it the mark would
    get lost, or protect white space from being stripped.
    """

    def __init__(self, special_tokens: Iterable[str], texts: Iterable[str]) -> None:
        # Chosen for each conversation, because one may contain any character, for example one about this module.
        used: set[str] = set().union(*texts)
        self.mark = next(character for character in map(chr, _MARKS) if character not in used)
        special_tokens = list(special_tokens)
        self._begins = _begins(special_tokens)
        self._begins_in_answers = _begins(token for token in special_tokens if token not in ANSWER_TAGS)

    def add(self, content: str, in_answer: bool = False) -> str:
        """`content` with a mark in each special token; `in_answer`: `ANSWER_TAGS` excepted."""
        begins = self._begins_in_answers if in_answer else self._begins
        return begins.sub(rf"\1{self.mark}", content) if begins else content

    def add_to_strings(self, value: Any, in_answer: bool = False) -> Any:
        """`value`, of JSON types, with marks in its strings; keys of objects are unchanged."""
        if isinstance(value, str):
            return self.add(value, in_answer)
        if isinstance(value, list):
            return [self.add_to_strings(entry, in_answer) for entry in value]
        if isinstance(value, dict):
            return {key: self.add_to_strings(entry, in_answer) for key, entry in value.items()}
        return value

    def add_to_message(self, message: Message) -> Message:
        """A turn with marks in all fields but its role, which templates compare."""
        in_answer = message["role"] == "assistant"
        return {key: v if key == "role" else self.add_to_strings(v, in_answer) for key, v in message.items()}

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


def _begins(special_tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Matches the first character of a special token."""
    pattern = special_token_pattern(special_tokens)
    # A position for each token, overlapping ones too: what is left of a broken token could be another one.
    return pattern and re.compile(f"(?={pattern.pattern})(.)", re.DOTALL)


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

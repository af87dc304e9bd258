"""Media in the JSON values of conversations: each becomes one character of the text, and a name in a list.

    LLaVA   {"image": "a.jpg" | [...], "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, ...]}
    ours    {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}, ...]}, ...]}
    TRL     parts {"type": "image"} without a path, whose paths are in the field "images" of the line

The same for sounds, with audio in place of image. The UserErrors of this module have a noun phrase as `problem`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from src.dataset.conversation_formats import CONTEXTS, PROMPTS, ROLES, TURN_LISTS
from src.dataset.media_files import IMAGE, SOUND
from src.errors import UserError

# Stands for a medium in a text: Unicode's own "object replacement character", which templates copy like a letter.
OBJECT = "\N{OBJECT REPLACEMENT CHARACTER}"
# by kind: fields of a line that name files, tags in a text, types of a part of a content
FIELDS = {IMAGE: ("image", "images"), SOUND: ("audio", "audios", "sound")}
TAGS = {IMAGE: ("<image>",), SOUND: ("<audio>", "<sound>")}
PART_TYPES = {
    IMAGE: ("image", "image_url", "input_image"),
    SOUND: ("audio", "sound", "audio_url", "input_audio"),
}
_ANSWERING = ROLES["assistant"]


def take_media(entry: Any, kind: str) -> tuple[Any, list[str]]:
    """`entry` with OBJECT in the place of each medium, and the media's names in their order. UserError, its `problem`
    the reason, where it isn't clear which medium belongs where, or where one is of another kind."""
    check_no_object(json.dumps(entry, ensure_ascii=False))
    if isinstance(entry, list):
        entry = {"messages": entry}
    if not isinstance(entry, dict):
        return entry, []
    taken = _Taken(kind, _named_in_fields(entry, kind))
    result = {key: value for key, value in entry.items() if key not in FIELDS[kind]}
    for key in TURN_LISTS:
        if isinstance(result.get(key), list):
            result[key] = [taken.turn(turn) for turn in result[key]]
            break
    else:
        for key in (*PROMPTS, *CONTEXTS):
            if isinstance(result.get(key), str):
                result[key] = taken.text(result[key])
    if taken.names and not taken.used:
        _put_first(result, OBJECT * len(taken.names))
        taken.used, taken.media = len(taken.names), list(taken.names)
    if taken.used != len(taken.names):
        raise UserError(f"a number of {TAGS[kind][0]} tags that is not that of its files")
    return result, taken.media


def check_no_object(text: str) -> None:
    """UserError where a text has the character that stands for media."""
    if OBJECT in text:
        raise UserError("the character U+FFFC, which stands for pictures and sounds")


def _named_in_fields(entry: dict[str, Any], kind: str) -> list[str]:
    names: list[str] = []
    for field in FIELDS[kind]:
        value = entry.get(field)
        if value is None or value == "":
            continue
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(name, str) and name for name in values):
            raise UserError(f"a field {field!r} that is not the name of a file")
        names += values
    return names


class _Taken:
    """The media that were found so far; those without a name of their own get the `names`, in their order."""

    def __init__(self, kind: str, names: list[str]) -> None:
        self.kind, self.names = kind, names
        self.media: list[str] = []
        self.used = 0  # of `names`

    def turn(self, turn: Any) -> Any:
        if not isinstance(turn, dict):
            return turn
        role = str(turn.get("role", turn.get("from", ""))).strip().lower()
        key = next((key for key in ("content", "value") if turn.get(key)), "content")
        content = turn.get(key)
        if isinstance(content, str) and role not in _ANSWERING:
            return {**turn, key: self.text(content)}
        if isinstance(content, list):
            parts = [self._part(part) for part in content]
            if role in _ANSWERING and OBJECT in map(_text_of, parts):
                raise UserError(f"an answer with a part of type {self.kind}")
            return {**turn, key: parts}
        return turn

    def text(self, text: str) -> str:
        """A text with OBJECT in the place of tags; without files beside the text a tag is text."""
        if not self.names:
            return text
        for tag in TAGS[self.kind]:
            text = text.replace(tag, OBJECT)
        count = text.count(OBJECT)
        self.media += self.names[self.used : self.used + count]
        self.used += count
        return text

    def _part(self, part: Any) -> Any:
        kind = medium_kind(part)
        if kind is None:
            return part
        if kind != self.kind:
            raise UserError(f"a part of type {kind}, which the encoder doesn't read")
        name = named_in_part(part)
        if name is None:
            self.media += self.names[self.used : self.used + 1]
            self.used += 1
        else:
            self.media.append(name)
        return {"type": "text", "text": OBJECT}


def medium_kind(part: Any) -> str | None:
    """The kind of medium that a part of a content is; None for text and other things."""
    type_of_part = part.get("type") if isinstance(part, dict) else None
    return next((kind for kind, types in PART_TYPES.items() if type_of_part in types), None)


def named_in_part(part: dict[str, Any]) -> str | None:
    """The path or URL in a part of a content: "path", or the field of the part's type, or "url" within that."""
    keys = ("path", *PART_TYPES[IMAGE], *PART_TYPES[SOUND], "url")
    values: Iterator[Any] = (part[key] for key in keys if part.get(key))
    value = next(values, None)
    if isinstance(value, dict):
        value = value.get("url") or value.get("path")
    if value is not None and not isinstance(value, str):
        raise UserError("a part of a content that names no file")
    return value or None


def _text_of(part: Any) -> Any:
    return part.get("text") if isinstance(part, dict) else part


def _put_first(entry: dict[str, Any], objects: str) -> None:
    """Put media that no tag places before the text of the first question."""
    turns = next((entry[key] for key in TURN_LISTS if isinstance(entry.get(key), list)), None)
    if turns is None:
        key = next((key for key in (*PROMPTS, *CONTEXTS) if isinstance(entry.get(key), str)), None)
        if key is None:
            raise UserError("media without a question")
        entry[key] = f"{objects}\n{entry[key]}"
        return
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            continue
        role = str(turn.get("role", turn.get("from", ""))).strip().lower()
        key = next((key for key in ("content", "value") if isinstance(turn.get(key), str)), None)
        if role in ROLES["user"] and key is not None:
            turns[i] = {**turn, key: f"{objects}\n{turn[key]}"}
            return
    raise UserError("media without a question")

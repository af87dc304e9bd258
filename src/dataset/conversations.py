"""Conversations from JSON lines, and which characters of a rendered conversation the assistant wrote."""

import re
from typing import Any, NamedTuple

from src.dataset.chat_template import ChatTemplate, Message
from src.dataset.documents import read_json
from src.errors import UserError

ROLES = ("system", "user", "assistant")


def read_conversation(line: bytes) -> list[Message]:
    """The turns of `{"conversations": [{"role": ..., "content": ...}, ...]}`; `messages` is read as well.

    Where roles are missing, user and assistant alternate. ValueError, its text the reason, for anything that isn't a
    conversation with an answer in it.
    """
    entry = read_json(line)
    turns = entry.get("conversations", entry.get("messages")) if isinstance(entry, dict) else None
    if not isinstance(turns, list):
        raise UserError('no list "conversations"')
    messages: list[Message] = []
    for turn in turns:
        messages.append(_message(turn, messages))
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError("no answer")
    return messages


def _message(turn: Any, before: list[Message]) -> Message:
    content = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(content, str):
        raise UserError("a turn without text")
    role = turn.get("role")
    if role is None:
        role = "assistant" if before and before[-1]["role"] == "user" else "user"
    if role not in ROLES:
        raise UserError("a role that is none of " + ", ".join(ROLES))
    if role == "system" and before:
        raise UserError("a system turn that is not the first")
    if not content.isascii():
        try:
            content.encode()
        except UnicodeEncodeError:
            raise UserError("half of a surrogate pair") from None
    return {"role": role, "content": content}


class Rendered(NamedTuple):
    """A conversation as text, and the characters [begin, end) of each answer, the token that ends it included."""

    text: str
    answers: list[tuple[int, int]]


def render_with_answers(template: ChatTemplate, special_tokens: list[str], messages: list[Message]) -> Rendered:
    """Renders a conversation and finds the answers in it.

    A template that marks generation says itself what they are. With any other, each answer is rendered once more with
    signs around it; they are accepted only if the rest of the text stays as it was, and a special token, which the
    model must learn to end with, follows. ValueError when the template can't be read like this.
    """
    signs = _signs(template, messages)
    plain = template.render(messages)
    if template.marks_answers:
        marked = _cut_out(template.render(messages, around_answers=signs), signs)
        if marked is None or marked.text != plain or not marked.answers:
            raise UserError("generation marks of the chat template that do not enclose the answers")
        return marked
    count = sum(message["role"] == "assistant" for message in messages)
    for trimmed in (False, True):  # some templates take the white space around an answer away
        signed = [_with_signs(message, signs, trimmed) for message in messages]
        found = _cut_out(template.render(signed), signs)
        if found is not None and found.text == plain and len(found.answers) == count:
            return _with_ends(found, special_tokens)
    raise UserError("answers that the chat template does not put in as they are")


def check_template(template: ChatTemplate, special_tokens: list[str]) -> None:
    """ValueError, with the advice, when the answers of a plain conversation can't be found with this template."""
    turns = [
        {"role": role, "content": f"{role} speaks"} for role in ("system", "user", "assistant", "user", "assistant")
    ]
    try:
        try:
            render_with_answers(template, special_tokens, turns)
        except ValueError:  # some templates know no system turn
            render_with_answers(template, special_tokens, turns[1:])
    except ValueError as error:
        raise UserError(
            f"its chat template can't be used for fine-tuning, because of {error}. Put {{% generation %}} ... "
            "{% endgeneration %} into it around what the assistant writes, the token that ends an answer included."
        ) from error


def _signs(template: ChatTemplate, messages: list[Message]) -> tuple[str, str]:
    """Two texts that occur nowhere in the conversation or the template."""
    number = 0
    while any(f"[[sign-{number}-" in text for text in (template.source, *(m["content"] for m in messages))):
        number += 1
    return f"[[sign-{number}-begin]]", f"[[sign-{number}-end]]"


def _with_signs(message: Message, signs: tuple[str, str], trimmed: bool) -> Message:
    content = message["content"]
    if message["role"] != "assistant":
        return message
    body = content.strip() if trimmed else content
    before, after = content.split(body, 1) if body else (content, "")
    return {**message, "content": before + signs[0] + body + signs[1] + after}


def _cut_out(text: str, signs: tuple[str, str]) -> Rendered | None:
    """The text without the signs and the places that they enclose; None unless they come in pairs."""
    pieces: list[str] = []
    places: list[int] = []
    length = 0
    for number, piece in enumerate(re.split("(" + "|".join(map(re.escape, signs)) + ")", text)):
        if number % 2 == 0:
            pieces.append(piece)
            length += len(piece)
        elif piece != signs[len(places) % 2]:
            return None
        else:
            places.append(length)
    if len(places) % 2:
        return None
    return Rendered("".join(pieces), list(zip(places[::2], places[1::2], strict=True)))


def _with_ends(found: Rendered, special_tokens: list[str]) -> Rendered:
    longest_first = sorted(special_tokens, key=len, reverse=True)
    end = re.compile(r"\s*(?:" + "|".join(map(re.escape, longest_first)) + ")") if special_tokens else None
    answers = []
    for begin, stop in found.answers:
        match = end.match(found.text, stop) if end else None
        if match is None:
            raise UserError("answers that no special token ends")
        answers.append((begin, match.end()))
    return Rendered(found.text, answers)

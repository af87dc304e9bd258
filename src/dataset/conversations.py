"""Conversations from JSON lines, and the spans of the assistant's answers in a rendered conversation.

The UserErrors of this module have a noun phrase as `problem`: the reason why a line is unusable.
"""

import re
from typing import Any, NamedTuple

from src.dataset.chat_template import ChatTemplate, Message
from src.dataset.corpus.documents import check_encodable, parse_json
from src.errors import UserError

ROLES = ("system", "user", "assistant")


def read_conversation(line: bytes) -> list[Message]:
    """The turns of `{"conversations": [{"role": ..., "content": ...}, ...]}`, or of the key `messages`.

    Turns without a role alternate between user and assistant. UserError, its `problem` the reason, unless the line is a
    conversation with at least one answer.
    """
    entry = parse_json(line)
    turns = entry.get("conversations", entry.get("messages")) if isinstance(entry, dict) else None
    if not isinstance(turns, list):
        raise UserError('no list "conversations"')
    messages: list[Message] = []
    for turn in turns:
        messages.append(_message(turn, messages))
    # Without an answer there is nothing to train on, only a prompt.
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError("no answer")
    return messages


def _message(turn: Any, previous: list[Message]) -> Message:
    content = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(content, str):
        raise UserError("a turn without text")
    role = turn.get("role")
    if role is None:
        # Some sets omit the role, because turns alternate.
        role = "assistant" if previous and previous[-1]["role"] == "user" else "user"
    if role not in ROLES:
        raise UserError("a role other than " + ", ".join(ROLES))
    if role == "system" and previous:
        raise UserError("a system turn after the first turn")
    check_encodable(content)
    return {"role": role, "content": content}


class RenderedConversation(NamedTuple):
    """A conversation as text, and the characters [begin, end) of each answer including its end token."""

    text: str
    answers: list[tuple[int, int]]


def render_with_answers(
    template: ChatTemplate, special_tokens: list[str], messages: list[Message]
) -> RenderedConversation:
    """Renders a conversation and finds its answers.

    If the template has `{% generation %}` blocks, these are the answers. Otherwise the conversation is rendered again
    with markers around each answer. The markers are accepted only if the rest of the text is unchanged and a special
    token, which the model must learn to generate, follows each answer. UserError, its `problem` the reason, otherwise.
    """
    markers = _unused_markers(template, messages)
    # The training text is always this one, whatever happens to the renderings with markers.
    plain = template.render(messages)
    if template.marks_answers:
        rendered = _remove_markers(template.render(messages, answer_markers=markers), markers)
        if rendered is None or rendered.text != plain or not rendered.answers:
            raise UserError("a chat template whose {% generation %} blocks do not enclose the answers")
        return rendered
    n_answers = sum(message["role"] == "assistant" for message in messages)
    # For templates that strip answers, the markers go inside the white space: around it they would protect it.
    for stripped in (False, True):
        marked = [_add_markers(message, markers, stripped) for message in messages]
        rendered = _remove_markers(template.render(marked), markers)
        # A difference means that the template inspects or changes the content: the spans would be unreliable.
        if rendered is not None and rendered.text == plain and len(rendered.answers) == n_answers:
            return _include_end_tokens(rendered, special_tokens)
    raise UserError("answers that the chat template does not copy unchanged")


def check_template(template: ChatTemplate, special_tokens: list[str]) -> None:
    """UserError, with advice, when the answers of a plain conversation can't be found with this template."""
    turns = [
        {"role": role, "content": f"{role} speaks"} for role in ("system", "user", "assistant", "user", "assistant")
    ]
    try:
        try:
            render_with_answers(template, special_tokens, turns)
        except UserError:  # some templates reject system turns
            render_with_answers(template, special_tokens, turns[1:])
    except UserError as error:
        raise UserError(
            f"the chat template is not usable for fine-tuning, because of {error.problem}",
            advice="enclose what the assistant writes, including the token that ends an answer, in "
            "{% generation %} ... {% endgeneration %}",
        ) from error


def _unused_markers(template: ChatTemplate, messages: list[Message]) -> tuple[str, str]:
    """Begin and end markers that occur neither in the conversation nor in the template."""
    # Numbered until unused, because a conversation may quote this source file.
    number = 0
    while any(f"[[marker-{number}-" in text for text in (template.source, *(m["content"] for m in messages))):
        number += 1
    return f"[[marker-{number}-begin]]", f"[[marker-{number}-end]]"


def _add_markers(message: Message, markers: tuple[str, str], stripped: bool) -> Message:
    """An assistant message with markers around its content, or around its stripped content; others unchanged."""
    content = message["content"]
    if message["role"] != "assistant":
        return message
    body = content.strip() if stripped else content
    before, after = content.split(body, 1) if body else (content, "")
    return {**message, "content": before + markers[0] + body + markers[1] + after}


def _remove_markers(text: str, markers: tuple[str, str]) -> RenderedConversation | None:
    """The text without the markers, and the spans between them; None unless begin and end alternate."""
    parts: list[str] = []
    positions: list[int] = []
    length = 0
    # A capturing group makes `split` return the markers too, at the odd indices.
    for index, part in enumerate(re.split("(" + "|".join(map(re.escape, markers)) + ")", text)):
        if index % 2 == 0:
            parts.append(part)
            length += len(part)
        elif part != markers[len(positions) % 2]:
            return None
        else:
            positions.append(length)
    if len(positions) % 2:
        return None
    return RenderedConversation("".join(parts), list(zip(positions[::2], positions[1::2], strict=True)))


def _include_end_tokens(rendered: RenderedConversation, special_tokens: list[str]) -> RenderedConversation:
    """Extends each answer to the special token that follows it, after optional white space."""
    # Longest first, because a regular expression takes the first alternative that matches, even a prefix of another.
    longest_first = sorted(special_tokens, key=len, reverse=True)
    end_token = re.compile(r"\s*(?:" + "|".join(map(re.escape, longest_first)) + ")") if special_tokens else None
    answers = []
    for begin, end in rendered.answers:
        # White space is included: some templates write a newline before the end token.
        match = end_token.match(rendered.text, end) if end_token else None
        if match is None:
            raise UserError("answers that are not followed by a special token")
        answers.append((begin, match.end()))
    return RenderedConversation(rendered.text, answers)

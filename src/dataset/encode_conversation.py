"""Encodes one conversation for fine-tuning: its token ids, and which of them have a loss."""

import json
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from src.dataset.control_tokens import ContentMarks
from src.dataset.conversation_formats import Conversation, conversation_of
from src.dataset.conversations import RenderedConversation, check_template, render_with_answers
from src.dataset.corpus.documents import parse_json
from src.dataset.media_parts import take_media
from src.dataset.media_reader import MediaReader
from src.dataset.media_tokens import encode_with_media
from src.dataset.tokenizer import Tokenizer, load_tokenizer
from src.errors import UserError

_LONGEST_NAME = 40  # of a field that is counted and printed


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


class EncodedConversation(NamedTuple):
    """Ids of a conversation, a mask of the tokens with a loss, the number of turns, `Conversations.unused` and
    `Conversations.media_of`."""

    ids: list[int]
    is_answer: npt.NDArray[np.bool_]
    turns: int
    unused: Counter[str]
    media: list[tuple[str, int]]


def encode_conversation(
    tokenizer: Tokenizer, line: bytes, parse_special: bool = False, reader: MediaReader | None = None
) -> EncodedConversation:
    """Encodes a JSON line, its media as `reader` reads them. UserError, its `problem` the reason, when the line is not
    a usable conversation.

    Special tokens in contents, such as `<|im_end|>`, are text like any other; with `parse_special` they are tokens.
    """
    assert tokenizer.chat_template is not None
    try:
        entry, names = parse_json(line), list[str]()
        if reader is not None:
            entry, names = take_media(entry, reader.kind)
        conversation = conversation_of(entry)
        if parse_special:
            rendered = render_with_answers(tokenizer.chat_template, tokenizer.special_tokens, conversation)
            literals: Collection[int] = ()
        else:
            rendered, literals = _render_as_text(tokenizer, conversation)
    except RecursionError:  # JSON may be parsed at a depth that can't be walked through
        raise UserError("fields that are nested too deeply") from None
    # last, as it decodes the files: most lines that are unusable are so for another reason
    media = [(name, reader.count(reader.read(name))) for name in names] if reader is not None else []
    if media:
        counts = [count for _, count in media]
        ids, is_answer = encode_with_media(tokenizer, rendered.text, counts, literals, rendered.answers)
    else:
        ids, is_answer = tokenizer.encode_marked(rendered.text, rendered.answers, literals)
    if not is_answer[1:].any():  # the first token is never a target
        raise UserError("no answer")
    unused = Counter(f"field {field[:_LONGEST_NAME]!r}" for field in conversation.unused_fields)
    if rendered.omitted_thoughts:
        unused["earlier thought (left out by the chat template)"] = rendered.omitted_thoughts
    return EncodedConversation(ids, is_answer, len(conversation.messages), unused, media)


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

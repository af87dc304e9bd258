"""The spans of the assistant's answers in a rendered conversation, found without knowledge of the chat template.

The UserErrors of this module have a noun phrase as `problem`: the reason why a conversation is unusable.
"""

import json
import re
from typing import Any, NamedTuple

from src.dataset.chat_template import ChatTemplate, Message
from src.dataset.conversation_content import THINK_END, check_nothing_is_lost, unused_number, with_calls_as_text
from src.dataset.conversation_formats import Conversation
from src.errors import UserError

Span = tuple[int, int]  # characters [begin, end)
MARK_ADVICE = (
    "enclose what the assistant writes, including the token that ends an answer, in "
    "{% generation %} ... {% endgeneration %}"
)
_THINK_BEGIN = re.compile(r"<think>\s*\Z")
_BLOCK = "block"  # label of the markers around {% generation %} blocks; those of turns have the number of the turn


class RenderedConversation(NamedTuple):
    """A conversation as text, and the characters [begin, end) of each answer including its end token.

    omitted_thoughts   number of earlier answers whose thoughts the template leaves out, as it does when it prompts
    """

    text: str
    answers: list[Span]
    omitted_thoughts: int = 0


def render_with_answers(
    template: ChatTemplate, special_tokens: list[str], conversation: Conversation
) -> RenderedConversation:
    """Renders a conversation and finds its answers, those with weight 0 excepted.

    If the template has `{% generation %}` blocks, these are the answers. Otherwise the conversation is rendered again
    with markers around the content of each turn, which are accepted if the rest of the text is unchanged. Where the
    template inspects or moves content, or writes function calls, each answer is replaced in turn, and what differs is
    the answer. A special token, which the model must learn to generate, has to follow each answer.

    UserError, its `problem` the reason, when answers can't be found or content of the conversation is not in the text.
    """
    messages, tools = conversation.messages, conversation.tools
    # The training text is always this one, whatever happens to the other renderings.
    messages, plain = _render_plain(template, messages, tools)
    number = unused_number(template, messages, tools)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    has_fields = tools is not None or any(len(message) > 2 for message in messages)
    answers, complete = _marked_answers(template, messages, tools, plain, number, has_fields)
    if answers is None:
        if template.marks_answers:
            raise UserError("a chat template whose {% generation %} blocks do not enclose the answers")
        end_token = _end_token(special_tokens)
        answers = [_replaced_answer(template, messages, tools, plain, number, i, end_token) for i in turns]
    elif not template.marks_answers:
        answers = _include_end_tokens(plain, answers, special_tokens)
    omitted = 0 if complete else check_nothing_is_lost(template, messages, tools, plain, number)
    if conversation.without_loss:
        # Blocks are not numbered: only with one per answer it is known which is which.
        if len(answers) != len(turns):
            raise UserError("weights of answers that the chat template divides")
        answers = [span for i, span in zip(turns, answers, strict=True) if i not in conversation.without_loss]
    return RenderedConversation(plain, answers, omitted)


def check_template(template: ChatTemplate, special_tokens: list[str]) -> str:
    """Tries plain conversations, and conversations with thoughts, with a template.

    UserError, with advice, when the answers of a plain conversation can't be found with this template. Returns the
    reason why conversations with thoughts are unusable, "" if they are usable.
    """
    turns = [
        {"role": role, "content": f"{role} speaks"} for role in ("system", "user", "assistant", "user", "assistant")
    ]
    try:
        try:
            render_with_answers(template, special_tokens, Conversation(turns))
        except UserError:  # some templates reject system turns
            turns = turns[1:]
            render_with_answers(template, special_tokens, Conversation(turns))
    except UserError as error:
        raise UserError(
            f"the chat template is not usable for fine-tuning, because of {error.problem}", advice=MARK_ADVICE
        ) from error
    thoughtful = [
        {**turn, "content": f"<think>\nfirst\n{THINK_END}\n\n{turn['content']}"}
        if turn["role"] == "assistant"
        else turn
        for turn in turns
    ]
    try:
        render_with_answers(template, special_tokens, Conversation(thoughtful))
    except UserError as error:
        return error.problem
    return ""


def _render_plain(
    template: ChatTemplate, messages: list[Message], tools: list[Any] | None
) -> tuple[list[Message], str]:
    """The text of a conversation, and its messages in the form that the template takes."""
    as_text = with_calls_as_text(messages)
    if as_text is None:
        return messages, template.render(messages, tools=tools)
    # Some templates take the arguments of calls as objects, some as JSON text, which they concatenate.
    try:
        plain = template.render(messages, tools=tools)
    except UserError:
        return as_text, template.render(as_text, tools=tools)
    arguments = [
        call.get("function", call).get("arguments") for message in messages for call in message.get("tool_calls", ())
    ]
    # Python's notation for an object in the text: the template prints it as it is, so it was made for JSON text.
    if any(isinstance(a, dict) and a and str(a) in plain and json.dumps(a) != str(a) for a in arguments):
        return as_text, template.render(as_text, tools=tools)
    return messages, plain


def _marked_answers(
    template: ChatTemplate,
    messages: list[Message],
    tools: list[Any] | None,
    plain: str,
    number: int,
    has_fields: bool,
) -> tuple[list[Span] | None, bool]:
    """The answers by markers, or None; and whether the markers show that the text holds all content."""
    blocks = template.marks_answers
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    thinks = any(THINK_END in messages[i]["content"] for i in turns) and THINK_END in template.source
    if not blocks and (thinks or any(len(messages[i]) > 2 for i in turns)):
        return None, False  # markers would not surround thoughts and calls that the template writes itself
    everything = [i for i, message in enumerate(messages) if i in turns or message["content"].strip()]
    attempts: list[tuple[list[int], bool]] = [(everything, False), (everything, True)]
    if blocks:
        # A template that looks for a thought at the beginning of an answer may place a block by it.
        attempts = [([], False)] if thinks else [*attempts, ([], False)]
    else:  # templates may inspect the content of other turns
        attempts += [(turns, False), (turns, True)]
    for marked_turns, stripped in attempts:
        marked = [
            _add_markers(message, number, i, stripped) if i in marked_turns else message
            for i, message in enumerate(messages)
        ]
        markers = _markers(number, _BLOCK) if blocks else ("", "")
        # Several attempts, because no single place suits all templates: see `_add_markers`.
        try:
            text, spans = _remove_markers(template.render(marked, answer_markers=markers, tools=tools), number)
        except UserError:  # a template that checks the content, or unbalanced markers
            continue
        # A difference means that the template inspects or changes the content: the spans would be unreliable.
        if text != plain or any(str(i) not in spans for i in marked_turns):
            continue
        answers = [span for span, label in spans.items_in_order if label == _BLOCK] if blocks else spans.once(turns)
        if answers:
            return answers, marked_turns == everything and not has_fields
    return None, False


class _Spans(dict[str, list[Span]]):
    """Spans by label."""

    @property
    def items_in_order(self) -> list[tuple[Span, str]]:
        return sorted((span, label) for label, spans in self.items() for span in spans)

    def once(self, turns: list[int]) -> list[Span] | None:
        """The spans of these turns; None unless each is there once and they follow each other."""
        spans = [self[str(i)] for i in turns]
        flat = [each[0] for each in spans if len(each) == 1]
        return flat if len(flat) == len(turns) and flat == sorted(flat) else None


def _markers(number: int, label: object) -> tuple[str, str]:
    return f"[[marker-{number}-{label}-begin]]", f"[[marker-{number}-{label}-end]]"


def _add_markers(message: Message, number: int, label: object, stripped: bool) -> Message:
    """A message with markers around its content. For templates that strip it, they go inside the white space."""
    begin, end = _markers(number, label)
    content = message["content"]
    body = content.strip() if stripped else content
    before, after = content.split(body, 1) if body else (content, "")
    return {**message, "content": before + begin + body + end + after}


def _remove_markers(text: str, number: int) -> tuple[str, _Spans]:
    """The text without the markers, and the spans between them by label. UserError for an unbalanced marker."""
    parts: list[str] = []
    begins: dict[str, int] = {}
    spans = _Spans()
    length = position = 0
    for match in re.finditer(rf"\[\[marker-{number}-(\w+)-(begin|end)\]\]", text):
        parts.append(text[position : match.start()])
        length += match.start() - position
        position = match.end()
        label, side = match.groups()
        if (side == "begin") == (label in begins):
            raise UserError("markers that do not alternate")
        if side == "begin":
            begins[label] = length
        else:
            spans.setdefault(label, []).append((begins.pop(label), length))
    if begins:
        raise UserError("markers that do not alternate")
    return "".join([*parts, text[position:]]), spans


def _replaced_answer(
    template: ChatTemplate,
    messages: list[Message],
    tools: list[Any] | None,
    plain: str,
    number: int,
    turn: int,
    end_token: re.Pattern[str],
) -> Span:
    """The span of one answer: what changes in the text when another answer is in its place."""
    begin_marker, end_marker = _markers(number, turn)
    content = begin_marker + end_marker
    replacements = [
        {"content": content},
        # Templates that write an empty thought before an answer that has none differ before the answer, too.
        {"content": f"<think>\n{begin_marker}\n{THINK_END}\n\n{end_marker}"},
        {"content": end_marker, "reasoning_content": begin_marker},
    ]
    for replacement in replacements:
        other = [*messages[:turn], {"role": "assistant", **replacement}, *messages[turn + 1 :]]
        try:
            text = template.render(other, tools=tools)
        except UserError:
            continue
        if text.count(begin_marker) != 1 or text.count(end_marker) != 1:
            continue
        # What surrounds the other answer surrounds this one: the template writes both at the same place.
        before, after = text[: text.index(begin_marker)], text[text.index(end_marker) + len(end_marker) :]
        if replacement is not replacements[0]:
            before = _THINK_BEGIN.sub("", before)
        end = len(plain) - len(after)
        if len(before) <= end and plain.startswith(before) and plain.endswith(after):
            return len(before), _end_of_answer(plain, end, end_token)
    raise UserError("answers that the chat template does not copy unchanged")


def _end_token(special_tokens: list[str]) -> re.Pattern[str]:
    # Longest first, because a regular expression takes the first alternative that matches, even a prefix of another.
    alternatives = "|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True)))
    # White space is included: some templates write a newline before the end token. (?!) never matches.
    return re.compile(rf"\s*(?:{alternatives or '(?!)'})")


def _end_of_answer(text: str, end: int, end_token: re.Pattern[str]) -> int:
    match = end_token.match(text, end)
    if match is None:
        raise UserError("answers that are not followed by a special token")
    return match.end()


def _include_end_tokens(text: str, answers: list[Span], special_tokens: list[str]) -> list[Span]:
    """Extends each answer to the special token that follows it, after optional white space."""
    end_token = _end_token(special_tokens)
    return [(begin, _end_of_answer(text, end, end_token)) for begin, end in answers]

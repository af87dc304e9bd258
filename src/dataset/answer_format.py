"""What a chat template writes around an answer: the prompt of a conversation, and the texts that end an answer.

    prompt = render_prompt(template, tokenizer, messages, tools)
    ids = tokenizer.encode_rendered(prompt.text, prompt.literals)
    stops = stop_strings(template, tokenizer)
    ... generate, ending at tokenizer.eos_ids; AnswerStream(stops, prompt.begun) divides and ends the text

`template.thinking(mode)` is the template of an answer that thinks, or doesn't.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from src.dataset.chat_template import ChatTemplate, Message
from src.dataset.control_tokens import ContentMarks
from src.dataset.tokenizer import Tokenizer
from src.errors import UserError

# Where a content begins or ends in a rendered conversation. A private use character: templates copy it like a letter.
MARK = "\ue000"
# What the header of an answer writes of the answer itself: a thought, begun or empty, or the begin of a call.
_BEGUN = re.compile(r"(?:<think(?:>\s*(?:</think(?:>\s*)?)?)?|```json)\Z")


class Prompt(NamedTuple):
    """A conversation as text, up to where the model writes.

    literals   first characters of the special tokens in it that stand in messages, and so are text
    begun      the end of the text that belongs to the answer, such as "<think"
    """

    text: str
    literals: Collection[int]
    begun: str


def render_prompt(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: list[Any] | None = None,
    parse_special: bool = False,
    add_generation_prompt: bool = True,
) -> Prompt:
    """The prompt for the next answer; without `add_generation_prompt` the conversation so far.

    Special tokens in messages and tools are text; parse_special: they are tokens.

    UserError when the template rejects the conversation.
    """
    marks = ContentMarks(
        tokenizer.special_tokens, [template.source, json.dumps([list(messages), tools], ensure_ascii=False)]
    )
    if not parse_special:
        messages, tools = [marks.add_to_message(message) for message in messages], marks.add_to_strings(tools)
    text, literals = marks.remove(template.render(list(messages), add_generation_prompt, tools=tools))
    begun = _BEGUN.search(text)
    return Prompt(text, literals, begun.group() if begun else "")


@dataclass(frozen=True)
class AnswerFormat:
    """What a chat template writes around an answer, as texts.

    header     between the question and the answer, as far as `add_generation_prompt` renders it: "\\n\\nAssistant:"
    separator  white space between the header and the answer, which the template writes with the answer: " "
    end        after the answer, without trailing newlines if there is more: "<|im_end|>"
    next_turn  after the answer and before the next question, without white space at its end: "\\n\\nUser:"
    """

    header: str = ""
    separator: str = ""
    end: str = ""
    next_turn: str = ""

    @property
    def begun(self) -> str:
        """The end of the header that belongs to the answer, as in `Prompt`."""
        match = _BEGUN.search(self.header)
        return match.group() if match else ""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        # White space may stand after a thought, where it ends nothing: there the next turn's header is needed.
        texts = (self.end, *([] if self.end.strip() else [self.next_turn]))
        return tuple(dict.fromkeys(text for text in texts if text))

    def ends(self, prompt: str) -> bool:
        """Whether `prompt` is a conversation of this format that ends where an answer begins."""
        # A header of white space would be found at the end of many prompts that are no conversations.
        return bool(self.header.strip()) and prompt.endswith(self.header + self.separator)


def answer_format(template: ChatTemplate) -> AnswerFormat:
    """The format of answers of `template`; empty texts where the template doesn't copy what it is given."""
    question, answer = {"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}
    # Rendered rather than searched for in the template's source: a template is a program.
    try:
        prompt = template.render([question], add_generation_prompt=True)
        parts = template.render([question, answer]).split(MARK)
    except UserError:  # a template that needs a system turn, say: it may still render the conversations of a task
        return AnswerFormat()
    if MARK not in prompt or len(parts) != 3:
        return AnswerFormat()
    header, (_, before, end) = prompt.rpartition(MARK)[2], parts
    separator = before.removeprefix(header)
    # Anything but white space is text of the template's own, such as an empty thought: the model has to write it.
    if not before.startswith(header) or separator.strip():
        separator = ""
    try:
        between = template.render([question, answer, question]).split(MARK)[2:3]
    except UserError:  # a template for one question
        between = []
    next_turn = between[0].rstrip() if between else ""
    return AnswerFormat(header, separator, end.rstrip("\n") or end, next_turn)


def stop_strings(template: ChatTemplate, tokenizer: Tokenizer, parse_special: bool = False) -> tuple[str, ...]:
    """The texts that end an answer, those excepted that begin with a token of `eos_ids`, which ends it by its id."""
    ends = [[i] for i in tokenizer.eos_ids]
    texts = answer_format(template).stop_strings
    # The same characters written as text don't end an answer: a model may explain ChatML.
    return tuple(text for text in texts if parse_special or tokenizer.encode(text)[:1] not in ends)

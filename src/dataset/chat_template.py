"""Conversations to text by a tokenizer's own chat template, written in Jinja as Hugging Face tokenizers carry it."""

import json
import re
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from src.errors import UserError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}

# How RWKV World models are spoken to. A blank line ends a turn, so there is none within one.
RWKV_TEMPLATE = (
    "{% for m in messages %}"
    r"{% set text = m.content.replace('\r\n', '\n').strip().split('\n') | select | join('\n') %}"
    "{% if m.role == 'assistant' %}{{ 'Assistant:' }}"
    r"{% generation %}{{ ' ' + text + '\n\n' }}{% endgeneration %}"
    r"{% else %}{{ m.role.capitalize() + ': ' + text + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` encloses what the assistant writes.

    For rendering it is a plain block; the variables `answer_begins` and `answer_ends`, where given, are put around it.
    """

    tags = {"generation"}  # noqa: RUF012, the name that Jinja reads

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begins, ends = (
            jinja2.nodes.Output([jinja2.nodes.Name(name, "load")]) for name in ("answer_begins", "answer_ends")
        )
        return jinja2.nodes.Scope([begins, *body, ends], lineno=line)


class ChatTemplate:
    """`source` with the variables of `specials` (bos_token, eos_token, ...), compiled once.

    ValueError when the source is no template. The sandbox keeps a template from touching more than its messages.
    """

    def __init__(self, source: str, specials: dict[str, str]) -> None:
        self.source = source
        self.marks_answers = re.search(r"{%-?\s*generation\b", source) is not None
        self._specials = specials
        world = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        world.filters["tojson"] = _to_json
        world.globals["raise_exception"] = _refuse
        world.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._compiled = world.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the tokenizer's chat template can't be read: {error}") from error

    def render(
        self, messages: list[Message], add_generation_prompt: bool = False, around_answers: tuple[str, str] = ("", "")
    ) -> str:
        """The conversation as text, ready for the answer when `add_generation_prompt` and the template knows of it.

        `around_answers` goes before and after every block that the template marks as generated.
        """
        begins, ends = around_answers
        variables = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None}
        marks = {"answer_begins": begins, "answer_ends": ends}
        try:
            return self._compiled.render({**self._specials, **variables, **marks})
        except (jinja2.TemplateError, TypeError) as error:  # TypeError: as of adding a text to nothing
            raise UserError(f"a chat template that refuses this conversation: {error}") from error


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja's own tojson escapes <, > and & for HTML, which would put other tokens in.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)

"""Chat templates: Jinja templates of Hugging Face tokenizers that turn a conversation into text."""

import json
import re
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from src.dataset.template_allowance import limited
from src.dataset.template_sandbox import MAX_SOURCE, LimitedEnvironment
from src.errors import UserError

MAX_ERROR = 300  # characters of a template's own error that are shown

# {"role": "system" | "user" | "assistant" | "tool", "content": text, and further fields, such as "tool_calls"}
Message = dict[str, Any]

# The prompt format of RWKV World and G1 models. A blank line ends a turn, so those within the text of a user or system
# are removed, as in RWKV-LM (RWKV-v7/RWKV7-G1x-templates.txt). Answers keep theirs: code and thoughts need them. The
# result of a function is a turn of the user.
RWKV_TEMPLATE = (
    "{% for m in messages %}"
    r"{% set text = m.content.replace('\r\n', '\n').strip() %}"
    "{% if m.role == 'assistant' %}{{ 'Assistant:' }}"
    r"{% generation %}{{ ' ' + text + '\n\n' }}{% endgeneration %}{% else %}"
    r"{% set text = text.split('\n') | select | join('\n') %}"
    r"{{ 'User: Function output:\n' if m.role == 'tool' else m.role.capitalize() + ': ' }}"
    r"{{ text + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class _Generation(jinja2.ext.Extension):
    """The tag `{% generation %} ... {% endgeneration %}` around the text of the assistant, as in `transformers`.

    Renders its content between the values of the variables `answer_begin` and `answer_end`.
    """

    tags = {"generation"}  # noqa: RUF012 (the attribute that Jinja reads)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (jinja2.nodes.Output([jinja2.nodes.Name(name, "load")]) for name in ("answer_begin", "answer_end"))
        # A scope of its own, as in `transformers`: assignments inside the block are not visible after it.
        return jinja2.nodes.Scope([begin, *body, end], lineno=line)


class ChatTemplate:
    """A compiled chat template; `special_tokens` are variables of the template (bos_token, eos_token, ...).

    UserError when `source` is not a valid template. Templates are downloaded code, so they run in Jinja's sandbox.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        self.source = source
        self.marks_answers = re.search(r"{%-?\s*generation\b", source) is not None
        self._special_tokens = special_tokens
        # The options and globals of `transformers`, for which these templates are written.
        environment = LimitedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda date_format: datetime.now().strftime(date_format)
        environment.count_filters()
        if len(source) > MAX_SOURCE:
            raise UserError(f"the chat template has {len(source)} characters", expected=f"at most {MAX_SOURCE}")
        try:
            with limited():  # constant expressions are computed here
                self._compiled = environment.from_string(source)
        except Exception as error:  # a template is a program: it fails as it likes, by recursion for example
            raise UserError(f"the chat template is not valid Jinja ({_shortened(error)})") from error

    def render(
        self,
        messages: list[Message],
        add_generation_prompt: bool = False,
        answer_markers: tuple[str, str] = ("", ""),
        tools: list[Any] | None = None,
    ) -> str:
        """The conversation as text.

        add_generation_prompt   ends with the header of an assistant turn, in templates that support it
        answer_markers          texts to insert before and after every `{% generation %}` block
        tools                   descriptions of functions that the assistant may call

        UserError, its `problem` a noun phrase, when the template rejects the conversation or fails.
        """
        begin, end = answer_markers
        variables = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": tools}
        markers = {"answer_begin": begin, "answer_end": end}
        try:
            with limited(messages, tools):
                return self._compiled.render({**self._special_tokens, **variables, **markers})
        except Exception as error:  # as above: 1/0, a sum of None and a string, recursion
            raise UserError(f"a conversation that the chat template rejects ({_shortened(error)})") from error


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja's own tojson escapes <, > and & for HTML, which would change the tokens.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _shortened(error: Exception) -> str:
    """What an error says, in one line; its name where it says nothing, as MemoryError does."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_ERROR else text[:MAX_ERROR] + " ..."


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)

"""Chat templates: Jinja templates of Hugging Face tokenizers that turn a conversation into text."""

import copy
import json
import re
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from src.errors import UserError

# {"role": "system" | "user" | "assistant" | "tool", "content": text, and further fields, such as "tool_calls"}
Message = dict[str, Any]

# The prompt format of RWKV World and G1 models (RWKV-LM, RWKV-v7/RWKV7-G1x-templates.txt).
#
#   blank lines   A blank line ends a turn, so those within the text of a user or system are removed. Answers keep
#                 theirs: code and thoughts need them.
#   thoughts      Those before the last question are left out, as the model saw them left out when it was prompted.
#   think         "on", "short", "long": the last question asks for a thought, and its answer begins with one;
#                 "off": its answer begins with an empty thought. What the prompt writes of a thought is not part of the
#                 answer. With `think`, an answer ends with "User:" after a blank line, as those of G1 models do, so
#                 that a blank line alone doesn't end it. Without it, `enable_thinking` decides how an answer begins.
#   tools         Listed in the system turn. Calls are a block of JSON, and an answer to a question begins with one. The
#                 result of a function is a turn of the user.
RWKV_TEMPLATE = r"""
{%- set think = think | default('') -%}
{%- set wish = {'on': ' (think)', 'short': ' (think a bit)', 'long': ' (think a lot)'}[think] -%}
{%- set last = namespace(question=-1, thinks=false) -%}
{%- for m in messages -%}
    {%- if m.role == 'user' -%}
        {%- set last.question = loop.index0 -%}
        {%- set last.thinks = add_generation_prompt -%}
    {%- elif m.role == 'assistant' and
            ('</think>' in (m.content or '') or m.reasoning_content or m.reasoning or m.thinking) -%}
        {%- set last.thinks = true -%}
    {%- endif -%}
{%- endfor -%}
{%- macro without_blank_lines(text) -%}
    {{- text.replace('\r\n', '\n').strip().split('\n') | select | join('\n') -}}
{%- endmacro -%}
{%- if tools -%}
    {{- 'System: ' -}}
    {%- if messages[0].role == 'system' -%}{{- without_blank_lines(messages[0].content) + '\n' -}}{%- endif -%}
    {{- 'Tools:\n' + (tools | tojson) + '\nReturn only a JSON function call.\n\n' -}}
{%- endif -%}
{%- for m in messages -%}
    {%- if m.role == 'assistant' -%}
        {%- set text = (m.content or '').replace('\r\n', '\n').strip() -%}
        {%- set thought = m.reasoning_content or m.reasoning or m.thinking -%}
        {%- if loop.index0 < last.question -%}
            {%- set text = (text.split('</think>') | last).strip() -%}
        {%- elif thought -%}
            {%- set text = '<think>\n' + thought.strip() + '\n</think>\n' + text -%}
        {%- endif -%}
        {%- if m.tool_calls -%}
            {%- set block = namespace(calls=[]) -%}
            {%- for call in m.tool_calls -%}
                {%- set call = call.function or call -%}
                {%- set fields = ['"name": ' + (call.name | tojson)] -%}
                {%- if call.arguments is defined -%}
                    {%- set fields = fields + ['"arguments": ' + (call.arguments | tojson)] -%}
                {%- endif -%}
                {%- set block.calls = block.calls + ['{' + (fields | join(', ')) + '}'] -%}
            {%- endfor -%}
            {%- set json = block.calls | join(', ') -%}
            {%- set json = '[' + json + ']' if m.tool_calls | length > 1 else json -%}
            {%- set text = text + ('\n' if text and not text.endswith('\n') else '') + '```json\n' + json + '\n```' -%}
        {%- endif -%}
        {{- 'Assistant:' -}}
        {%- set answer = ' ' + text -%}
        {%- if loop.index0 > last.question and wish and text.startswith('<think>') and '</think>' in text -%}
            {{- ' <think' -}}
            {%- set answer = text[6:] -%}
        {%- elif loop.index0 > last.question and think == 'off' and
                '</think>' not in text and not text.startswith('```json') -%}
            {{- ' <think>\n</think' -}}
            {%- set answer = '>\n' + text -%}
        {%- endif -%}
        {%- set is_followed = loop.nextitem is defined and loop.nextitem.role == 'assistant' -%}
        {%- set is_followed = is_followed or (loop.last and add_generation_prompt) -%}
        {%- generation -%}
            {{- answer + '\n\n' + ('User:' if think and not is_followed else '') -}}
        {%- endgeneration -%}
    {%- elif m.role != 'system' or not tools -%}
        {%- set header = 'User:' if m.role == 'tool' else m.role.capitalize() + ':' -%}
        {%- if not (think and loop.previtem is defined and loop.previtem.role == 'assistant') -%}
            {{- header -}}
        {%- endif -%}
        {{- ' Function output:\n' if m.role == 'tool' else ' ' -}}
        {{- without_blank_lines(m.content) -}}
        {{- wish if loop.index0 == last.question and last.thinks else '' -}}
        {{- '\n\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Assistant:' -}}
    {%- if enable_thinking is defined and enable_thinking -%}
        {{- ' <think' -}}
    {%- elif tools and messages[-1].role == 'user' -%}
        {{- ' ```json' -}}
    {%- elif enable_thinking is defined -%}
        {{- ' <think>\n</think' -}}
    {%- endif -%}
{%- endif -%}
"""


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
        self.source, self.think = source, ""
        self.marks_answers = re.search(r"{%-?\s*generation\b", source) is not None
        self._special_tokens = special_tokens
        # The options and globals of `transformers`, for which these templates are written.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda date_format: datetime.now().strftime(date_format)
        try:
            self._compiled = environment.from_string(source)
            self._variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template is not valid Jinja ({error})") from error

    def thinking(self, mode: str) -> "ChatTemplate":
        """This template with a mode of THINK_MODES for all that it renders; "": as this template does by itself.

        UserError when the template has no such mode.
        """
        # The variable by which `transformers` asks for thoughts and all templates for models that think know it.
        if mode and "enable_thinking" not in self._variables:
            raise UserError(
                "the chat template has no switch for thoughts (enable_thinking)",
                flag="think",
                given=mode,
                advice="leave it out",
            )
        if mode in ("short", "long") and "think" not in self._variables:
            raise UserError(
                "only the format of RWKV has lengths of thoughts", flag="think", given=mode, expected="on or off"
            )
        result = copy.copy(self)
        result.think = mode
        return result

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
        if self.think:  # undefined otherwise: templates test that
            variables |= {"enable_thinking": self.think != "off", "think": self.think}
        markers = {"answer_begin": begin, "answer_end": end}
        try:
            return self._compiled.render({**self._special_tokens, **variables, **markers})
        # TypeError and ValueError come from operations in the template, for example adding None to a string.
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(f"a conversation that the chat template rejects ({error})") from error


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja's own tojson escapes <, > and & for HTML, which would change the tokens.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)

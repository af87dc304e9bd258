"""Conversations from JSON values, in the formats that public sets use.

    {"conversations": [{"role", "content"}, ...]}, or messages; turns may also be {"from", "value"} (ShareGPT)
    {"instruction", "input", "output"} (Alpaca), {"prompt", "completion"}, {"prompt", "response"}, ...
    {"text": "User: ...\n\nAssistant: ..."} (RWKV)

Every field of a turn is passed on to the chat template, which decides whether the line is usable. The UserErrors of
this module have a noun phrase as `problem`: the reason why a line is unusable.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from src.dataset.chat_template import Message
from src.dataset.corpus.documents import check_encodable, parse_json
from src.errors import UserError

# What public sets call the four roles; compared in lower case.
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "bot", "model", "chatgpt", "function_call"),
    "tool": ("tool", "function", "observation"),
}
_ROLE_OF = {alias: role for role, aliases in ROLES.items() for alias in aliases}
TURN_LISTS = ("conversations", "messages", "conversation")
PROMPTS = ("prompt", "instruction", "query", "question")
SYSTEMS = ("system", "system_prompt")  # of a line, beside its turns
CONTEXTS = ("input", "context")  # written under the prompt
ANSWERS = ("completion", "response", "output", "answer")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # of the answer, in a turn or beside a prompt and an answer
_HEADER = re.compile(r"(?:^|\n\n+)(System|User|Human|Assistant|Bot): ?")
_LONGEST_NAME = 40  # of a role or field in a reason, which is counted and printed


class Conversation(NamedTuple):
    """A conversation with at least one answer.

    messages       turns for a chat template: role (system, user, assistant, tool), content, and the turn's other fields
    tools          descriptions of functions for the template, or None
    without_loss   indices of the answers with weight 0
    unused_fields  fields of the line, not of its turns, that are not part of the conversation, such as "id"
    """

    messages: list[Message]
    tools: list[Any] | None = None
    without_loss: frozenset[int] = frozenset()
    unused_fields: tuple[str, ...] = ()


def read_conversation(line: bytes) -> Conversation:
    """The conversation of a JSON line. UserError, its `problem` the reason, when there is none."""
    return conversation_of(parse_json(line))


def conversation_of(entry: Any) -> Conversation:
    """The conversation of a JSON value. UserError as of `read_conversation`."""
    if isinstance(entry, list):
        entry = {"messages": entry}
    if not isinstance(entry, dict):
        raise UserError("a JSON value that is not an object")
    turns, used = _turns(entry)
    messages: list[Message] = []
    for turn in turns:
        messages.append(_message(turn, messages))
    systems = _with_content(entry, SYSTEMS)
    for key in systems:
        _add_system(entry[key], key, messages)
    # After the system turn is complete, which may hold the tools.
    tools = _tools(entry, messages)
    without_loss = _take_weights(messages)
    # Without an answer there is nothing to train on, only a prompt.
    if not any(m["role"] == "assistant" and i not in without_loss for i, m in enumerate(messages)):
        raise UserError("no answer")
    unused = (key for key in entry if key not in (*used, *systems, "tools", "functions") and not _is_empty(entry[key]))
    return Conversation(messages, tools, without_loss, tuple(unused))


def _is_empty(value: Any) -> bool:
    """Whether a field has no content: absent fields of Parquet rows are None."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def _names(names: Iterable[object]) -> str:
    # As in repr, without its quotes: names may hold line breaks and surrogates, which can't be printed.
    return ", ".join(repr(str(name)[:_LONGEST_NAME])[1:-1] for name in names) or "none"


def _turns(entry: dict[str, Any]) -> tuple[list[Any], tuple[str, ...]]:
    """The turns of a line, and the fields that hold them."""
    lists = [key for key in TURN_LISTS if not _is_empty(entry.get(key))]
    if lists:
        values = [_parsed(entry[key]) for key in lists]
        # Both may be there in converted sets; if they differ, taking one would lose the other.
        if any(value != values[0] for value in values):
            raise UserError(f"several conversations (in {_names(lists)})")
        if not isinstance(values[0], list):
            raise UserError(f"no list of turns in {lists[0]!r}")
        return values[0], tuple(lists)
    answers = _with_content(entry, ANSWERS)
    prompts = _with_content(entry, PROMPTS)
    contexts = _with_content(entry, CONTEXTS)
    # A context without a prompt is the prompt: some sets have only `input` and `output`.
    if answers and (prompts or contexts):
        return _question_and_answer(entry, prompts, contexts, answers)
    if isinstance(entry.get("text"), str):
        return _text_turns(entry["text"]), ("text",)
    if any(isinstance(entry.get(key), list) for key in TURN_LISTS) or prompts:
        raise UserError("no answer")
    raise UserError(f"no conversation (the fields are {_names(entry)})")


def _with_content(entry: dict[str, Any], keys: Sequence[str]) -> list[str]:
    return [key for key in keys if not _is_empty(entry.get(key))]


def _question_and_answer(
    entry: dict[str, Any], prompts: list[str], contexts: list[str], answers: list[str]
) -> tuple[list[Any], tuple[str, ...]]:
    """The turns of a line with a prompt and an answer; each is a string or a list of turns."""
    for keys in (prompts, contexts, answers):
        # The fields of one kind are alternatives: two with content are a format that is not known here.
        if len(keys) > 1:
            raise UserError(f"more than one of the fields {_names(keys)}")
    turns: list[Any] = []
    history = _parsed(entry.get("history"))
    for pair in history if isinstance(history, list) else [history] if history else []:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise UserError("a history that is not a list of questions and answers")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = [entry[key] for key in (*prompts, *contexts)]
    if all(isinstance(part, str) for part in question):
        turns.append({"role": "user", "content": "\n".join(question)})
    elif len(question) == 1 and isinstance(question[0], list):
        turns += question[0]
    else:
        raise UserError(f"a prompt that is neither a text nor a list of turns (in {_names([*prompts, *contexts])})")
    answer = entry[answers[0]]
    thoughts = {} if isinstance(answer, list) else {key: entry[key] for key in _with_content(entry, THOUGHTS)}
    turns += answer if isinstance(answer, list) else [{"role": "assistant", "content": answer, **thoughts}]
    return turns, (*prompts, *contexts, *answers, *thoughts, "history")


def _text_turns(text: str) -> list[Any]:
    """The turns of "User: ...\\n\\nAssistant: ...", where only a blank line before a header ends a turn."""
    # \r\n of Windows editors would hide the blank lines.
    first, *parts = _HEADER.split(text.replace("\r\n", "\n").strip())
    if first or not parts:
        raise UserError('a text without turns "User: ..." and "Assistant: ..."')
    return [{"role": role, "content": content.strip()} for role, content in zip(parts[::2], parts[1::2], strict=True)]


def _message(turn: Any, previous: list[Message]) -> Message:
    """One turn for a chat template, with all its fields that have content."""
    if not isinstance(turn, dict):
        raise UserError("a turn that is not an object")
    fields = {key: value for key, value in turn.items() if not _is_empty(value)}
    role_key = next((key for key in ("role", "from") if key in fields), "role")
    content_key = next((key for key in ("content", "value") if key in fields), None)
    # Two names for one thing: the second stays among the fields, and the template decides.
    name, content = fields.pop(role_key, None), fields.pop(content_key, None) if content_key else None
    role = _role(name, previous)
    # In ShareGPT's form a call is a turn of its own, whose text is the call.
    if isinstance(name, str) and name.lower() == "function_call" and isinstance(content, str):
        fields["function_call"], content = content, None
    _parse_calls(fields)
    if content is None:
        # An answer may consist of calls or of a thought; any other turn needs a text, which may be empty.
        has_text = any(isinstance(turn.get(key), str) for key in ("content", "value"))
        if not has_text and not (role == "assistant" and fields.keys() & {"tool_calls", *THOUGHTS}):
            raise UserError(f"a turn without text (its fields are {_names(turn)})")
        content = ""
    message = {"role": role, "content": _text(content), **fields}
    if role == "system" and previous:
        raise UserError("a system turn after the first turn")
    # The strings of nested fields may hold surrogates too.
    check_encodable(json.dumps(message, ensure_ascii=False) if fields else message["content"])
    return message


def _role(name: Any, previous: list[Message]) -> str:
    if name is None:
        # Some sets omit the role, because turns alternate.
        return "assistant" if previous and previous[-1]["role"] == "user" else "user"
    role = _ROLE_OF.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise UserError(f"the role {str(name)[:_LONGEST_NAME]!r}")
    return role


def _text(content: Any) -> str:
    """The text of a content, which is a string or a list of parts {"type": "text", "text": ...}."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"a turn without text (its content is of type {type(content).__name__})")
    texts = []
    for part in content:
        if isinstance(part, dict):
            other = [key for key, value in part.items() if key not in ("type", "text") and not _is_empty(value)]
            if part.get("type", "text") != "text" or other or not isinstance(part.get("text"), str):
                raise UserError(f"a part of a content that is not text (its fields are {_names(part)})")
            part = part["text"]
        if not isinstance(part, str):
            raise UserError(f"a part of a content that is not text (it is of type {type(part).__name__})")
        texts.append(part)
    return "\n".join(texts)


def _parsed(value: Any) -> Any:
    """A JSON string as its object or list; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _parse_calls(fields: dict[str, Any]) -> None:
    """Turns function calls into `tool_calls` with objects as arguments, the form for which templates are written."""
    calls = _parsed(fields.pop("tool_calls", None))
    if "function_call" in fields:  # the older form of OpenAI's format, for a single call
        if calls:
            raise UserError("both tool_calls and function_call")
        call = _parsed(fields.pop("function_call"))
        calls = call if isinstance(call, list) else [{"type": "function", "function": call}]
    if calls is None:
        return
    calls = [_parsed(call) for call in calls] if isinstance(calls, list) else [calls]
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
            raise UserError("a tool call without the name of a function")
        function = {**function}
        if "arguments" in function:
            function["arguments"] = _parsed(function["arguments"])
        calls[i] = {**call, "function": function} if "function" in call else function
    fields["tool_calls"] = calls


def _add_system(system: Any, key: str, messages: list[Message]) -> None:
    """Puts the text of the field `key` of a line before its turns."""
    if not isinstance(system, str):
        raise UserError(f"a field {key!r} that is not a text")
    check_encodable(system)
    if not messages or messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    elif messages[0]["content"] != system:
        raise UserError(f"both a field {key!r} and another system text")


def _tools(entry: dict[str, Any], messages: list[Message]) -> list[Any] | None:
    """The tools of a line: its field `tools` or `functions`, or the field `tools` of a system turn (MiniMind)."""
    # Removed from the turn, because the templates read them from the variable `tools`.
    sources = [entry.get("tools"), *(m.pop("tools", None) for m in messages if m["role"] == "system")]
    if not _is_empty(functions := _parsed(entry.get("functions"))):
        if not isinstance(functions, list):
            raise UserError("functions that are not a list")
        sources.append([{"type": "function", "function": function} for function in functions])
    lists = [_parsed(source) for source in sources if not _is_empty(source)]
    lists = [tools for tools in lists if not _is_empty(tools)]
    if not lists:
        return None
    if any(tools != lists[0] for tools in lists):
        raise UserError("tools in two places")
    if not isinstance(lists[0], list):
        raise UserError("tools that are not a list")
    tools = [_parsed(tool) for tool in lists[0]]
    check_encodable(json.dumps(tools, ensure_ascii=False))
    return tools


def _take_weights(messages: list[Message]) -> frozenset[int]:
    """Removes the field `weight` of the turns; the indices of the answers with weight 0."""
    without_loss = set()
    for i, message in enumerate(messages):
        weight = message.pop("weight", None)
        if weight is None:
            continue
        if weight not in (0, 1) or (weight == 1 and message["role"] != "assistant"):
            raise UserError(f"the weight {str(weight)[:_LONGEST_NAME]} of a turn of the {message['role']}")
        if weight == 0 and message["role"] == "assistant":
            without_loss.add(i)
    return frozenset(without_loss)

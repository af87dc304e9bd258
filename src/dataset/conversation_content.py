"""Whether a rendered conversation holds all content: each text, number and flag is altered, and the text must change.

The UserErrors of this module have a noun phrase as `problem`: the reason why a conversation is unusable.
"""

import copy
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from src.dataset.chat_template import ChatTemplate, Message
from src.errors import UserError

THINK_END = "</think>"
# Fields that connect a call with its result: most templates connect them by their order.
_REFERENCES = ("id", "index", "tool_call_id", "call_id")
_LONGEST_NAME = 40  # of a field in a reason, which is counted and printed
Value = dict[str, Any]  # {"messages": [...], "tools": [...]}


class _Leaf(NamedTuple):
    """A text, number or flag of a conversation.

    path         keys and indices that lead to it from a `Value`
    is_thought   whether it is a thought of the assistant
    """

    path: tuple[str | int, ...]
    is_thought: bool = False

    @property
    def turn(self) -> int | None:
        """Index of its turn; None for tools."""
        return int(self.path[1]) if self.path[0] == "messages" else None


def unused_number(template: ChatTemplate, messages: list[Message], tools: list[Any] | None) -> int:
    """A number such that neither the conversation nor the template contains the markers with it."""
    # Numbered until unused, because a conversation may quote this source file.
    texts = [template.source, *(str(m["content"]) for m in messages)]
    if tools or any(len(message) > 2 for message in messages):
        texts.append(json.dumps([messages, tools], ensure_ascii=False))
    number = 0
    while any(f"[[{kind}-{number}-" in text for kind in ("marker", "probe") for text in texts):
        number += 1
    return number


def with_calls_as_text(messages: list[Message]) -> list[Message] | None:
    """The messages with the arguments of calls as JSON text; None where there are no such arguments."""
    # A copy, because the objects are tried first.
    result = copy.deepcopy(messages) if any("tool_calls" in message for message in messages) else []
    changed = False
    for message in result:
        for call in message.get("tool_calls", ()):
            function = call.get("function", call)
            if isinstance(function.get("arguments"), dict):
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
                changed = True
    return result if changed else None


def check_nothing_is_lost(
    template: ChatTemplate, messages: list[Message], tools: list[Any] | None, plain: str, number: int
) -> int:
    """UserError unless the text depends on everything in the conversation, but for thoughts before the last question.

    Templates for models that think leave the earlier thoughts out, because they do so when they prompt. Returns the
    number of answers for which this one does it.
    """
    value: Value = {"messages": messages, "tools": tools}
    leaves = list(_leaves(messages, tools))
    found = _rendered(template, value, leaves, number)
    omitted = set()
    for leaf in leaves:
        # Only for what is missing, because it takes a rendering each: a template may have formatted or tested it.
        if leaf in found:
            continue
        altered = _altered(value, leaf, f"[[probe-{number}-0]]")
        if _try_render(template, altered) != plain:
            continue
        if leaf.is_thought and _is_omitted_as_earlier(template, value, altered, leaf):
            omitted.add(leaf.turn)
            continue
        raise UserError(_reason(messages, leaf))
    return len(omitted)


def _rendered(template: ChatTemplate, value: Value, leaves: list[_Leaf], number: int) -> set[_Leaf]:
    """The leaves that are certainly in the text: all are altered in one rendering, which finds most of them."""
    # Numbers become texts too: a number that is changed to another can't be searched for in the text.
    for index, leaf in enumerate(leaves):
        value = _altered(value, leaf, f"[[probe-{number}-{index}]]", as_text=True)
    text = _try_render(template, value) or ""
    return {leaf for index, leaf in enumerate(leaves) if f"[[probe-{number}-{index}]]" in text}


def _try_render(template: ChatTemplate, value: Value) -> str | None:
    """The text, or None where the template rejects the conversation: then it depends on what was altered."""
    try:
        return template.render(value["messages"], tools=value["tools"])
    except UserError:
        return None


def _is_omitted_as_earlier(template: ChatTemplate, value: Value, altered: Value, leaf: _Leaf) -> bool:
    """Whether a thought is left out only because a question follows: it would be in the text of the last answer."""
    assert leaf.turn is not None
    if all(message["role"] != "user" for message in value["messages"][leaf.turn :]):
        return False
    # With the answer at the end: a template that doesn't render the thought there never renders it.
    shorter = [{**each, "messages": each["messages"][: leaf.turn + 1]} for each in (value, altered)]
    return _try_render(template, shorter[0]) != _try_render(template, shorter[1])


def _reason(messages: list[Message], leaf: _Leaf) -> str:
    if leaf.turn is None:
        return "tools, for which the chat template has no place"
    role, field = messages[leaf.turn]["role"], leaf.path[2]
    if field != "content":
        return f"{str(field)[:_LONGEST_NAME]!r} in a turn of the {role}, for which the chat template has no place"
    return f"a {'thought' if leaf.is_thought else 'turn'} of the {role} that the chat template leaves out"


def _leaves(messages: list[Message], tools: list[Any] | None) -> Iterator[_Leaf]:
    names = [call.get("function", call)["name"] for message in messages for call in message.get("tool_calls", ())]
    for i, message in enumerate(messages):
        for key, item in message.items():
            path = ("messages", i, key)
            if key == "role" or (key == "name" and message["role"] == "tool" and item in names):
                continue  # the name of the called function, which its call holds
            if key != "content":
                yield from _nested_leaves(item, path, is_thought=key in ("reasoning_content", "reasoning", "thinking"))
                continue
            # The last tag, as the templates split: what stands before it is not in the answer.
            thought, end, answer = item.rpartition(THINK_END)
            if message["role"] == "assistant" and end:
                if thought.replace("<think>", "").strip():
                    yield _Leaf(path, is_thought=True)
                item = answer
            if item.strip():
                yield _Leaf(path)
    yield from _nested_leaves(tools, ("tools",))


def _nested_leaves(item: Any, path: tuple[str | int, ...], is_thought: bool = False) -> Iterator[_Leaf]:
    if isinstance(item, dict | list):
        for key, child in item.items() if isinstance(item, dict) else enumerate(item):
            yield from _nested_leaves(child, (*path, key), is_thought)
    elif path[-1] in _REFERENCES or (path[-1], item) == ("type", "function") or item is None or item == "":
        return
    else:
        yield _Leaf(path, is_thought)


def _altered(value: Value, leaf: _Leaf, probe: str, as_text: bool = False) -> Value:
    """A copy with another leaf: a text with `probe` at its end, another number or flag, or, `as_text`, the probe."""

    def replace(container: Any, path: tuple[str | int, ...]) -> Any:
        if not path:
            return change(container)
        result = copy.copy(container)
        result[path[0]] = replace(container[path[0]], path[1:])
        return result

    def change(item: Any) -> Any:
        if isinstance(item, str):
            if leaf.is_thought and leaf.path[2:] == ("content",):
                thought, end, answer = item.rpartition(THINK_END)
                # Before the white space at the end, which templates strip.
                return thought.rstrip() + probe + thought[len(thought.rstrip()) :] + end + answer
            return item.rstrip() + probe + item[len(item.rstrip()) :]
        if as_text:
            return probe
        return not item if isinstance(item, bool) else item + 1

    return replace(value, leaf.path)

"""Function calls in the text of an answer, as chat templates write them."""

import contextlib
import json
import re
from typing import Any

# RWKV's format, and ChatML's (Qwen, MiniMind). The text between is JSON.
_BEGIN = re.compile(r"```json\s*|<tool_call>\s*")
_END = {"`": re.compile(r"\s*```"), "<": re.compile(r"\s*</tool_call>")}


def parse_tool_calls(text: str) -> list[dict[str, Any]]:
    """The calls [{"name": ..., "arguments": ...}, ...] in an answer, in order; [] where it holds none.

    A call is a JSON object with a text as its `name`, or one in the field `function` of an object. A block holds a call
    or a list of calls; what is not a call, such as other JSON, is left out. Arguments in JSON text are parsed.
    """
    calls: list[dict[str, Any]] = []
    position = 0
    while begin := _BEGIN.search(text, position):
        position = begin.end()
        # Decoded rather than searched for its end: a string of the call may contain the end of a block.
        try:
            value, end = json.JSONDecoder().raw_decode(text, position)
        except (ValueError, RecursionError):
            continue
        # The end may be missing where the answer was cut, or a stop string ended it.
        closing = _END[begin.group()[0]].match(text, end)
        if closing is None and text[end:].strip():
            continue
        position = closing.end() if closing else end
        found = [_call(entry) for entry in (value if isinstance(value, list) else [value])]
        if None not in found:
            calls += [call for call in found if call is not None]
    return calls


def _call(value: Any) -> dict[str, Any] | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not (isinstance(value, dict) and isinstance(value.get("name"), str)):
        return None
    # `parameters` in some models' answers
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str) and arguments.lstrip()[:1] in ("{", "["):
        # Otherwise the text is what the call has.
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return {"name": value["name"], "arguments": arguments}

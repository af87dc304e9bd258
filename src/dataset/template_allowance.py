"""The allowance of a template: units of work that it may spend in a rendering, counted without a clock."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jinja2
import jinja2.runtime

ALLOWANCE = 10_000_000  # units of a rendering: at most about 40 MB of text, or 0.5 s of loops
UNITS_PER_INPUT = 50  # in addition, for each character of the conversation: templates copy it a few times
# Units of what takes as long as copying so many characters.
LOOK, STEP, CALL = 5, 20, 100  # at a value in a container; an iteration; a call, also of a filter
MAX_INT_BITS = 20_000
STRINGS = (str, bytes)
SEQUENCES = (list, tuple, set, frozenset, range)
CONTAINERS = (dict, *SEQUENCES, jinja2.runtime.Namespace)


class TemplateLimitError(jinja2.TemplateError):
    """A template that does more work than a chat template needs."""


class _Allowance(threading.local):
    left = ALLOWANCE


allowance = _Allowance()


@contextmanager
def limited(*inputs: Any) -> Iterator[None]:
    """Within the block, in this thread, a template may do a fixed amount of work, and more for large `inputs`."""
    allowance.left = 1 << 60  # the inputs are as large as they are
    allowance.left = ALLOWANCE + UNITS_PER_INPUT * size_of(inputs)
    yield


def spend(units: int) -> None:
    allowance.left -= units
    if allowance.left < 0:
        raise TemplateLimitError(
            "it takes too much time or memory: an endless loop, or a text that grows with each step"
        )


def size_of(value: Any) -> int:
    """Characters and values in `value`, counted as often as it refers to them. Raises beyond what is left to spend."""
    total, looked, left, pending = 0, 0, allowance.left, [value]
    while pending:
        item = pending.pop()
        looked += LOOK
        kind = type(item)
        if kind is str:
            total += len(item)
        elif isinstance(item, CONTAINERS):
            if isinstance(item, jinja2.runtime.Namespace):
                item = getattr(item, "_Namespace__attrs")  # noqa: B009 (its name would be mangled)
            total += len(item)
            if isinstance(item, dict):
                pending.extend(item)
                pending.extend(item.values())
            elif kind is not range:
                pending.extend(item)
        elif isinstance(item, STRINGS):
            total += len(item)
        if total + looked > left:
            spend(total + looked)
    spend(looked)
    return total + looked


def check_depth(value: Any) -> None:
    """Raises for a container whose text would be too long: a list of 50 lists, each twice the one before, has 2^50."""
    if type(value) is not str and isinstance(value, CONTAINERS):
        size_of(value)


def width_of(value: Any) -> int:
    """Characters or entries of `value` itself."""
    return len(value) if isinstance(value, (*STRINGS, *CONTAINERS[:-1])) else 1


def result_of(value: Any, units: int = CALL) -> Any:
    """What an operation returned: its size and `units` are spent, and an iterator's items are, one by one."""
    kind = type(value)
    if kind is str:  # nearly always
        units += len(value)
    elif kind is int:
        if value.bit_length() > MAX_INT_BITS:
            raise TemplateLimitError("a number is too large")
    elif hasattr(kind, "__next__"):
        return steps_of(value)
    else:
        units += width_of(value)
    spend(units)
    return value


def steps_of(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        spend(STEP + (len(value) if isinstance(value, (*STRINGS, *SEQUENCES)) else 0))
        yield value

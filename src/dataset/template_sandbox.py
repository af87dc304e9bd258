"""A Jinja environment in which a template's work is counted: it ends early rather than fill the memory or never end.

Jinja's sandbox keeps a template from the file system and from Python's internals, not from `{% for %}` over 10^10
values or `'a' * 10**10`. Here loops, calls, filters and operators spend from an allowance that is given for each
rendering: a unit per character or value that they create, before it is created. Nothing depends on signals, threads
or other processes, so it works wherever templates are rendered, in the workers of a loader too.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox

from src.dataset import template_allowance
from src.dataset.template_allowance import (
    CONTAINERS,
    MAX_INT_BITS,
    STEP,
    STRINGS,
    TemplateLimitError,
    check_depth,
    result_of,
    size_of,
    spend,
    steps_of,
    width_of,
)

MAX_ARGUMENT = 10_000  # of a filter or method that repeats something so often: widths, indentations, precisions
MAX_SOURCE = 1_000_000  # characters of a template: published ones have up to 20,000
# Filters that multiply lengths, which no chat template uses.
REMOVED_FILTERS = ("urlize", "wordwrap", "xmlattr", "pprint")
# Filters that look at their value itself, not at all that is in it.
SHALLOW = frozenset("length count first last list default d items reverse batch slice attr select reject map".split())
# ---- operations that create much at once -----------------------------------------------------------------------------


def _check_numbers(arguments: Iterable[Any]) -> None:
    if any(isinstance(argument, int) and abs(argument) > MAX_ARGUMENT for argument in arguments):
        raise TemplateLimitError(f"an argument is larger than {MAX_ARGUMENT}")


def _format(template: Any, *arguments: Any) -> None:
    """For `str.format` and `%`: each field may be as wide as the largest argument, or as a number in the template."""
    if not isinstance(template, STRINGS):
        return
    text = template if isinstance(template, str) else template.decode("latin-1")
    widths = [int(number[-9:]) for number in re.findall(r"[0-9]+", text)]
    if max(widths, default=0) > MAX_ARGUMENT:
        raise TemplateLimitError(f"a width is larger than {MAX_ARGUMENT}")
    if "*" in text or re.search(r"{[^}]*{", text):  # a width that is an argument
        _check_numbers(_flat(arguments))
    fields = text.count("{") + text.count("%")
    spend(len(text) + fields * (max(widths, default=0) + size_of(arguments)))


def _flat(arguments: tuple[Any, ...]) -> Iterator[Any]:
    for argument in arguments:
        values = argument.values() if isinstance(argument, dict) else argument
        yield from values if isinstance(argument, (tuple, list, dict)) else (argument,)


def _replace(text: Any, old: Any = "", new: Any = "", *_: Any) -> None:
    if isinstance(text, STRINGS) and isinstance(old, type(text)) and isinstance(new, STRINGS):
        spend((text.count(old) if old else len(text) + 1) * len(new))  # type: ignore[arg-type]  # of one type


def _join(values: Any, separator: Any = "", *_: Any) -> None:
    if isinstance(values, CONTAINERS):
        spend(size_of(values) + width_of(values) * width_of(separator))


def _repeat(value: Any, *arguments: Any) -> None:
    """For widths, indentations, precisions and sizes: each line or value may get so many characters."""
    _check_numbers(arguments)
    lines = value.count("\n") + value.count("\t") + 1 if isinstance(value, str) else 1
    spend(lines * max((a if isinstance(a, int) else width_of(a) for a in arguments), default=0))


def _to_json(value: Any, *arguments: Any) -> None:
    _check_numbers(arguments)
    spend(
        size_of(value) * (1 + max((width_of(a) if isinstance(a, str) else int(a or 0) for a in arguments), default=0))
    )


def _sum(values: Any, *arguments: Any) -> None:
    if any(isinstance(argument, CONTAINERS) for argument in arguments):  # each addition copies what was added
        spend(size_of(values) * width_of(values))


_BEFORE_METHODS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"), _repeat),
    **dict.fromkeys(("format", "format_map", "translate"), _format),
    "replace": _replace,
    "join": lambda separator, values=(), *_: _join(values, separator),
}
_BEFORE_FILTERS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("center", "indent", "round", "batch", "slice", "truncate"), _repeat),
    "format": _format,
    "replace": _replace,
    "join": _join,
    "tojson": _to_json,
    "sum": _sum,
}


def _counted(function: Callable[..., Any], name: str, before: Callable[..., None] | None) -> Callable[..., Any]:
    """A filter or test that spends for its result, and before it for what it may create."""
    passed = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or environment comes first

    @functools.wraps(function)  # with the attribute that makes Jinja pass it
    def counted(*args: Any, **kwargs: Any) -> Any:
        value, *others = args[passed:] or (None,)
        if name not in SHALLOW:
            for argument in (value, *others, *kwargs.values()):
                check_depth(argument)
        if isinstance(value, range):
            spend(len(value))
        if before is not None:
            before(value, *others, *kwargs.values())
        return result_of(function(*args, **kwargs))

    return counted


class LimitedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which all that a template does spends from the allowance of the block `limited`."""

    intercepted_binops = frozenset(("+", "*", "%", "**"))

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_bounded, **options)
        for name in REMOVED_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]

    def count_filters(self) -> None:
        """To be called once, when all filters and tests are there."""
        function: Any
        for name, function in self.filters.items():
            self.filters[name] = _counted(function, name, _BEFORE_FILTERS.get(name))
        for name, function in self.tests.items():
            self.tests[name] = _counted(function, name, None)
        self.filters.update({"_steps": steps_of, "_concatenated": _concatenated, "_bounded": _bounded})

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        template = super()._parse(source, name, filename)
        # A list first: the nodes that are put in between are not visited.
        for node in list(template.find_all((jinja2.nodes.For, jinja2.nodes.Compare))):
            if isinstance(node, jinja2.nodes.For):
                node.iter = _through("_steps", node.iter)
            elif isinstance(node, jinja2.nodes.Compare):
                node.expr = _through("_bounded", node.expr)
        _replace_concatenations(template)
        return template

    @staticmethod
    def concat(parts: Iterable[str]) -> str:  # type: ignore[override]  # joins what a template, macro or block wrote
        written, left = [], template_allowance.allowance.left
        for part in parts:
            left = min(left, template_allowance.allowance.left) - 1 - len(part)
            if left < 0:
                spend(template_allowance.allowance.left + 1)
            written.append(part)
        text = "".join(written)
        spend(len(text))
        return text

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is str and type(right) is str:  # most of what templates do
            text = left + right
            spend(len(text))
            return text
        if operator == "%":
            _format(left, right)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > MAX_INT_BITS:
                raise TemplateLimitError("a number is too large")
        elif operator == "*":
            for repeated, count in ((left, right), (right, left)):
                if isinstance(repeated, (*STRINGS, list, tuple)) and isinstance(count, int):
                    spend(len(repeated) * max(0, count))
        elif isinstance(left, (*STRINGS, list, tuple)) and isinstance(right, type(left)):
            spend(len(left) + len(right))
        return result_of(super().call_binop(context, operator, left, right), STEP)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()):
            check_depth(argument)
        # Jinja wraps `format`, so that it can't reach private attributes.
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        before = _BEFORE_METHODS.get(getattr(__obj, "__name__", "")) if isinstance(owner, (*STRINGS, int)) else None
        if before is not None:
            before(owner, *args, *kwargs.values())
        if isinstance(__obj, jinja2.runtime.LoopContext) and args:  # a recursive loop
            args = (steps_of(args[0]), *args[1:])
        return result_of(super().call(__context, __obj, *args, **kwargs))


def _bounded(value: Any) -> Any:
    """`value`, which is written, or compared with another one: either goes through all that is in it."""
    check_depth(value)
    return value


def _concatenated(parts: list[Any]) -> str:
    """`a ~ b`."""
    texts = []
    for part in parts:
        check_depth(part)
        texts.append(part if type(part) is str else str(part))
    spend(STEP + sum(map(len, texts)))
    return "".join(texts)


def _through(name: str, expression: jinja2.nodes.Node) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(expression, name, [], [], None, None, lineno=expression.lineno)


def _replace_concatenations(node: jinja2.nodes.Node) -> None:
    """Every `~` below `node` by the filter that counts."""
    for field, value in node.iter_fields():
        children = value if isinstance(value, list) else [value]
        for index, child in enumerate(children):
            if not isinstance(child, jinja2.nodes.Node):
                continue
            _replace_concatenations(child)
            if isinstance(child, jinja2.nodes.Concat):
                counted = _through("_concatenated", jinja2.nodes.List(child.nodes, lineno=child.lineno))
                if isinstance(value, list):
                    value[index] = counted
                else:
                    setattr(node, field, counted)

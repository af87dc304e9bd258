"""Mutations of bytes, JSON values, templates and command lines, drawn from a seeded generator."""

import json
import random
from typing import Any

NUMBERS = (0, 1, 127, 128, 255, 256, 65535, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
HOSTILE_TEXTS = (
    "",
    "\0",
    "\x1b[2J",
    "../../etc/passwd",
    "/dev/zero",
    "NaN",
    "nan",
    "-inf",
    "1e400",
    "9" * 400,
    "-1",
    "0x10",
    "\ud800",
    "<script>alert(1)</script>",
    "a" * 10_000,
    "%s%n",
    "$(id)",
    "日本語",
    "1_000",
    " ",
    "true",
    "None",
    "--help",
    "-",
    "=",
)
HOSTILE_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    1 << 70,
    10**300,
    float("nan"),
    float("inf"),
    "",
    [],
    {},
    [[]],
    {"": {}},
    *HOSTILE_TEXTS,
)
TEMPLATE_PIECES = (
    "{{ 1/0 }}",
    "{{ range(10**9) | list }}",
    "{{ 'a' * 10**9 }}",
    "{% for a in range(10**6) %}{% for b in range(10**6) %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.format_map }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ undefined.x }}",
    "{% set x = messages %}",
    "{% if %}",
    "{% endfor %}",
    "{% generation %}",
    "{% endgeneration %}",
    "{{",
    "}}",
    "{%",
    "%}",
    "{{ messages[10**30] }}",
    "{{ (1,2)[::0] }}",
    "{{ 9**9**9 }}",
    "{{ strftime_now('%' * 10**6) }}",
    "{{ messages | sum }}",
    "{{ lipsum(n=10**6) }}",
    "{{ cycler() }}",
    "{{ ('(' * 5000) | string }}",
    "{{ raise_exception(messages) }}",
    "{# ",
    "{{ 'x'.zfill(10**9) }}",
    "{{ ['a'] * 10**8 }}",
    "{{ 'a'.replace('a', 'b' * 10**7).replace('b', 'c' * 10**4) }}",
)


def mutate_bytes(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """One to eight changes; `other` is an input of the same kind to splice with."""
    content = bytearray(data)
    for _ in range(1 << chance.randrange(4)):
        at = chance.randrange(len(content) + 1)
        length = min(len(content) - at, 1 << chance.randrange(10))
        match chance.randrange(9):
            case 0 if at < len(content):
                content[at] ^= 1 << chance.randrange(8)
            case 1 if at < len(content):
                content[at] = chance.randrange(256)
            case 2:
                size = chance.choice((1, 2, 4, 8))
                number = chance.choice(NUMBERS) & ((1 << 8 * size) - 1)
                content[at : at + size] = number.to_bytes(size, chance.choice(("little", "big")))
            case 3:
                del content[at : at + length]
            case 4:
                content[at:at] = content[at : at + length] * chance.choice((1, 2, 20))
            case 5:
                del content[at:]
            case 6:
                begin = chance.randrange(len(other) + 1)
                content[at : at + length] = other[begin : begin + length]
            case 7:
                content[at : at + length] = bytes(length)
            case 8:
                content[at:at] = chance.choice(HOSTILE_TEXTS).encode("utf-8", "surrogatepass")
    return bytes(content)


def mutate_json(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """A value somewhere in a JSON text replaced, deleted, repeated, nested; a third of the time its bytes instead."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, other, chance)
    if chance.random() < 0.33:
        return mutate_bytes(data, other, chance)
    for _ in range(1 << chance.randrange(3)):
        value = _changed(value, chance)
    text = json.dumps(value, ensure_ascii=chance.random() < 0.5)
    if chance.random() < 0.02:
        depth = chance.choice((500, 5000, 100_000))
        text = "[" * depth + text + "]" * depth
    return text.encode("utf-8", "surrogatepass")


def _changed(value: Any, chance: random.Random) -> Any:
    if not isinstance(value, (dict, list)) or not value or chance.random() < 0.15:
        return chance.choice(HOSTILE_VALUES)
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = chance.choice(list(copy)) if isinstance(copy, dict) else chance.randrange(len(copy))
    match chance.randrange(6):
        case 0:
            del copy[key]
        case 1 if isinstance(copy, dict):
            copy[chance.choice(HOSTILE_TEXTS)] = copy[key]
        case 2 if isinstance(copy, list):
            copy[key:key] = copy * chance.choice((1, 50))
        case 3:
            copy[key] = [copy[key]]
        case _:
            copy[key] = _changed(copy[key], chance)
    return copy


def mutate_template(data: bytes, other: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.9:  # the others may take all the time that a template is given
        return mutate_bytes(data, other, chance)
    text = data.decode("utf-8", "replace")
    at = chance.choice([0, len(text), chance.randrange(len(text) + 1)])
    return (text[:at] + chance.choice(TEMPLATE_PIECES) + text[at:]).encode()


def mutate_words(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Of a command line, its words separated by NUL."""
    words = data.split(b"\0")
    for _ in range(1 << chance.randrange(3)):
        at = chance.randrange(len(words))
        match chance.randrange(5):
            case 0:
                words[at] = chance.choice(HOSTILE_TEXTS).encode("utf-8", "surrogatepass").replace(b"\0", b"?")
            case 1:
                words[at : at + 1] = []
            case 2:
                words.insert(at, chance.choice(other.split(b"\0")))
            case 3:
                words[at] = mutate_bytes(words[at], other, chance).replace(b"\0", b"?")[:200]
            case 4:
                words.append(words[at])
        words = words or [b""]
    return b"\0".join(words)

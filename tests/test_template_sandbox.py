"""Chat templates that would never end or fill the memory: each fails with a sentence, and usual ones are unchanged."""

import pickle
import resource
import threading
from pathlib import Path

import jinja2.sandbox
import pytest

from src.dataset import template_allowance
from src.dataset.chat_template import ChatTemplate
from src.errors import UserError

MEMORY = 300 << 20
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What\nis it?"},
    {"role": "assistant", "content": " It is. ", "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1]}}}]},
]
HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop over a huge range": "{% for a in range(10**10) %}{% endfor %}",
    "a recursive loop": "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a tree of calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "division by zero": "{{ 1/0 }}",
    "multiplied text": "{{ 'a' * 10**10 }}",
    "multiplied text, the other way": "{% set n = 10**10 %}{{ n * messages[0].content }}",
    "multiplied list": "{{ ([0] * 10**10)|length }}",
    "powers": "{{ 10**(10**10) }}",
    "powers of a variable": "{% set n = 10**9 %}{{ n**n }}",
    "doubled text": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubled by ~": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubled by a block": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}"
    "{% endset %}{% set ns.x = y %}{% endfor %}",
    "doubled by replace": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
    "doubled by a filter": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x|replace('a', 'aa') %}{% endfor %}",
    "doubled by format": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}",
    "doubled by %": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "nested lists written": "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x }}",
    "nested lists as JSON": "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x|tojson }}",
    "nested dicts": "{% set ns = namespace(x={}) %}{% for i in range(60) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}"
    "{% endfor %}{{ ns.x ~ '' }}",
    "nested namespaces": "{% set ns = namespace(x=0) %}{% for i in range(60) %}"
    "{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "nested lists compared": "{% set ns = namespace(x=['a'], y=['a']) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "nested lists in an error": "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ raise_exception(ns.x) }}",
    "wide": "{{ 'a'|center(10**10) }}",
    "wide method": "{{ 'a'.ljust(10**10) }}",
    "wide format": "{{ '{:>9999999999}'.format(1) }}",
    "wide format of an argument": "{{ '{:>{}}'.format(1, 10**10) }}",
    "wide %": "{{ '%9999999999d' % 1 }}",
    "wide % of an argument": "{{ '%*d' % (10**10, 1) }}",
    "wide filter": "{{ '%9999999999d'|format(1) }}",
    "bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "batches": "{{ [1]|batch(10**10, 'x')|list }}",
    "slices": "{{ [1]|slice(10**10)|list }}",
    "precision": "{{ 1.5|round(10**10, 'floor') }}",
    "indented": "{{ 'a\nb'|indent(10**10) }}",
    "indented JSON": "{{ messages|tojson(indent=10**10) }}",
    "mapped": "{{ ['a']|map('center', 10**10)|join }}",
    "many passes": "{% for a in range(99999) %}{% set x = range(99999)|map('string')|list %}{% endfor %}",
    "joined": "{% set x = 'a' * 1000000 %}{{ range(99999)|join(x) }}",
    "nonsense text": "{{ lipsum(n=10**6) }}",
    "a long error": "{{ raise_exception('a' * 1000000) }}",
    "private attributes": "{{ ''.__class__.__mro__ }}",
    "private attributes by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long": "a" * 2_000_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_template_fails_with_a_sentence(kind, monkeypatch):
    """With little memory, and in a thread, where no signal could stop it."""
    monkeypatch.setattr(template_allowance, "ALLOWANCE", 200_000)  # a fiftieth, for the time that this takes
    outcome = []

    def render():
        try:
            outcome.append(ChatTemplate(HOSTILE[kind], {}).render(MESSAGES))
        except BaseException as error:
            outcome.append(error)

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    try:
        thread = threading.Thread(target=render)
        thread.start()
        thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    (error,) = outcome
    assert isinstance(error, UserError), error
    assert len(str(error)) < 500
    assert "MemoryError" not in str(error)
    assert "\n" not in str(error)


USUAL = {
    "loops": "{% for m in messages %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{{ m.role }}{% if loop.first %}"
    "{% continue %}{% endif %}{% set x = m.content|trim %}{{ x ~ '\n' ~ loop.index }}{% else %}none{% endfor %}",
    "conditions": "{% for m in messages if m.role != 'system' and 'it' in m.content %}{{ m['content'][0] }}{% endfor %}"
    "{% if messages[0] == {'role': 'system', 'content': 'Be brief.'} %}yes{% endif %}{{ 1 < 2 <= 2 }}",
    "filters": "{{ messages|map(attribute='role')|join(', ') }}"
    "{{ messages|selectattr('role', 'equalto', 'user')|list }}{{ messages|tojson }}"
    "{{ messages|tojson(indent=2) }}{{ messages|length }}{{ [3, 1]|sort }}{{ [1, 2]|sum }}"
    "{{ missing|default('d') }}{{ 'a b'|replace(' ', '-')|upper }}{{ 3.14159|round(2) }}{{ {'b': 1}|items|list }}",
    "namespaces": "{% set ns = namespace(n=0, all=[]) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.all = ns.all + [m.role] %}{% endfor %}{{ ns.n }}{{ ns.all }}",
    "macros": "{% macro show(m, n=2) %}{{ m.role * n }}{{ caller() if caller else '' }}{% endmacro %}"
    "{{ show(messages[0]) }}{% call show(messages[1], 1) %}inside{% endcall %}",
    "recursion": "{% for k, v in messages[2].items() recursive %}{{ k }}{% if v is mapping %}{{ loop(v.items()) }}"
    "{% endif %}{% endfor %}",
    "texts": "{{ '%s-%03d' % ('a', 7) }}{{ '{:>5}|{}'.format('a', 10**9) }}{{ messages[1].content.split('\n')[-1] }}"
    "{{ 'a' 'b' }}{{ '=' * 20 }}{{ 2**10 }}{{ 7 % 3 }}{{ none ~ 1.5 ~ [1] }}{{ 'x'.join(['a', 'b']) }}{{ 7 // 2 }}",
    "blocks": "{% set a %}{% filter upper %}{{ messages[0].content }}{% endfilter %}{% endset %}{{ a }}"
    "{% raw %}{{{% endraw %}",
    "undefined": "{{ nothing }}{{ nothing is defined }}{{ messages[0].tool_calls is defined }}{{ messages[9] }}",
}


@pytest.mark.parametrize("kind", USUAL)
def test_usual_templates_render_as_in_jinja(kind):
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    plain.filters["tojson"] = jinja2_tojson
    expected = plain.from_string(USUAL[kind]).render(messages=MESSAGES)
    assert expected
    assert ChatTemplate(USUAL[kind], {}).render(MESSAGES) == expected


def jinja2_tojson(value, indent=None):
    import json

    return json.dumps(value, ensure_ascii=False, indent=indent)


def test_long_conversations_are_rendered():
    """The allowance grows with them: 1 MB in 1,000 turns, in a template that goes over all of them in each turn."""
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}: {{ m.content.strip().replace('a', 'bb')|trim }}"
        "{% if messages[loop.index0 - 1].role == m.role %}{{ m|tojson }}{% endif %}{% endfor %}",
        {},
    )
    messages = [{"role": role, "content": "ab " * 330} for _ in range(500) for role in ("user", "assistant")]
    assert len(template.render(messages)) > 1_000_000
    assert template.render(messages) == template.render(messages)  # each rendering has an allowance of its own


def test_its_errors_travel_between_processes():
    with pytest.raises(UserError) as caught:
        ChatTemplate("{{ 1/0 }}", {}).render(MESSAGES)
    assert "division by zero" in pickle.loads(pickle.dumps(caught.value)).problem

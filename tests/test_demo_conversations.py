"""The demo conversations: what docstrings say, each on one side of the hold-out, built once."""

import json
import sys
from pathlib import Path

import pytest

from data import demo_conversations
from src.dataset.conversations import read_conversation

SOURCES = {
    "shape/__init__.py": '"""Shapes of all kinds, flat ones."""\n',
    "shape/flat.py": (
        "class Circle:\n"
        '    """A round shape, the roundest."""\n'
        "    def area(self, unit='m', *, exact=False):\n"
        '        """How much paper it takes.\n\n        Second paragraph.\n\n        >>> Circle().area()\n        """\n'
        "    def _hidden(self):\n"
        '        """Nobody asks about this one."""\n'
        "def twin():\n"
        '    """Shapes of all kinds, flat ones."""\n'
        "def short():\n"
        '    """Short."""\n'
    ),
    "_private.py": '"""A module that is not public."""\n',
}


def test_subjects_are_what_is_public_and_says_something_new() -> None:
    found = list(demo_conversations.subjects(SOURCES))
    assert [(subject.kind, subject.name) for subject in found] == [
        ("module", "shape"),
        ("class", "shape.flat.Circle"),
        ("method", "shape.flat.Circle.area"),
    ]
    assert found[2].signature == "area(self, unit='m', *, exact=False)"
    assert found[2].says == "How much paper it takes.\n\nSecond paragraph."


def test_conversations_can_be_read_and_answers_are_true() -> None:
    for number in range(48):
        for subject in demo_conversations.subjects(SOURCES):
            for turns in demo_conversations.conversations(subject, number):
                assert read_conversation(json.dumps({"conversations": turns}).encode()) == turns
                questions = [turn for turn in turns if turn["role"] == "user"]
                assert f"`{subject.name}`" in questions[0]["content"]
                answers = {turn["content"] for turn in turns if turn["role"] == "assistant"}
                told = {subject.says, f"`{subject.signature}`", f"It is in the module `{subject.module}`."}
                assert answers <= told


def test_this_pythons_own_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path)])
    demo_conversations.main()
    files = [tmp_path / "demo-sft.jsonl", tmp_path / "demo-sft-heldout.jsonl"]
    content = [file.read_bytes() for file in files]
    asked, answers = [], []
    for lines in content:
        talks = [json.loads(line)["conversations"] for line in lines.splitlines()]
        asked.append({next(t["content"] for t in talk if t["role"] == "user").split("`")[1] for talk in talks})
        answers.append(
            {t["content"] for talk in talks for t in talk if t["role"] == "assistant" and len(t["content"]) > 99}
        )
    assert len(content[0].splitlines()) > 3000
    assert asked[0].isdisjoint(asked[1])
    assert answers[0].isdisjoint(answers[1])
    assert "textwrap.dedent" in asked[0] | asked[1]
    capsys.readouterr()
    demo_conversations.main()
    assert "are there" in capsys.readouterr().out
    assert [file.read_bytes() for file in files] == content

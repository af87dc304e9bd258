"""The demo conversations: answers are docstrings, each subject is in one of two files, and existing files are kept."""

import json
import sys
from pathlib import Path

import pytest

from data import demo_conversations
from src.dataset.conversation_formats import read_conversation

SOURCES = {
    "shape/__init__.py": '"""Shapes of all kinds, flat ones."""\n',
    "shape/flat.py": (
        "class Circle:\n"
        '    """A perfectly round shape."""\n'
        "    def area(self, unit='m', *, exact=False):\n"
        '        """The area it covers.\n\n        Second paragraph.\n\n        >>> Circle().area()\n        """\n'
        "    def _hidden(self):\n"
        '        """A private method."""\n'
        "def twin():\n"
        '    """Shapes of all kinds, flat ones."""\n'
        "def short():\n"
        '    """Short."""\n'
    ),
    "_private.py": '"""A module that is not public."""\n',
}


def test_subjects_are_public_with_a_docstring_of_their_own() -> None:
    subjects = list(demo_conversations.subjects(SOURCES))
    assert [(subject.kind, subject.name) for subject in subjects] == [
        ("module", "shape"),
        ("class", "shape.flat.Circle"),
        ("method", "shape.flat.Circle.area"),
    ]
    assert subjects[2].signature == "area(self, unit='m', *, exact=False)"
    assert subjects[2].docstring == "The area it covers.\n\nSecond paragraph."


def test_conversations_are_valid_and_answers_are_from_the_library() -> None:
    for number in range(48):
        for subject in demo_conversations.subjects(SOURCES):
            for turns in demo_conversations.conversations_about(subject, number):
                assert read_conversation(json.dumps({"conversations": turns}).encode()).messages == turns
                questions = [turn for turn in turns if turn["role"] == "user"]
                assert f"`{subject.name}`" in questions[0]["content"]
                answers = {turn["content"] for turn in turns if turn["role"] == "assistant"}
                valid = {subject.docstring, f"`{subject.signature}`", f"It is in the module `{subject.module}`."}
                assert answers <= valid


def test_files_from_the_standard_library_of_this_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path)])
    demo_conversations.main()
    files = [tmp_path / "demo-sft.jsonl", tmp_path / "demo-sft-heldout.jsonl"]
    content = [file.read_bytes() for file in files]
    subjects, answers = [], []
    for lines in content:
        conversations = [json.loads(line)["conversations"] for line in lines.splitlines()]
        subjects.append(
            {next(t["content"] for t in turns if t["role"] == "user").split("`")[1] for turns in conversations}
        )
        answers.append(
            {
                t["content"]
                for turns in conversations
                for t in turns
                if t["role"] == "assistant" and len(t["content"]) > 99
            }
        )
    assert len(content[0].splitlines()) > 3000
    assert subjects[0].isdisjoint(subjects[1])
    assert answers[0].isdisjoint(answers[1])
    assert "textwrap.dedent" in subjects[0] | subjects[1]
    capsys.readouterr()
    demo_conversations.main()
    assert "exist already" in capsys.readouterr().out
    assert [file.read_bytes() for file in files] == content

"""Builds demo conversations without a download, from the docstrings of this Python's standard library.

Writes demo-sft.jsonl and, with about a tenth of what is asked about, demo-sft-heldout.jsonl: some thousand conversations
as "What does `textwrap.dedent` do?", answered by its docstring. What is there is kept: run again, it does nothing.
"""

import argparse
import ast
import inspect
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src.dataset.standard_library import is_held_out, library_sources
from src.files import atomic_write

SHORTEST, LONGEST = 15, 600  # characters of an answer
LEFT_OUT = ("idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings", "ensurepip", "config-")
SYSTEM = "You know the Python standard library."


class Subject(NamedTuple):
    """Something with a docstring: `kind` is module, class, function or method, `signature` as `dedent(text)` or ""."""

    kind: str
    module: str
    name: str  # dotted, with the module
    signature: str
    says: str


def first_paragraphs(docstring: str) -> str:
    """As many whole paragraphs as go into an answer; "" if not even the first does."""
    answer = ""
    for paragraph in inspect.cleandoc(docstring).split("\n\n"):
        longer = f"{answer}\n\n{paragraph}".strip()
        if len(longer) > LONGEST or ">>>" in paragraph:
            break
        answer = longer
    return answer if len(answer) >= SHORTEST else ""


def module_name(path: str) -> str:
    """`xml.dom` for xml/dom/__init__.py."""
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def subjects(sources: dict[str, str]) -> Iterator[Subject]:
    """Every public module, class, function and method that has a docstring; the same docstring only once."""
    known: set[str] = set()
    for path, source in sources.items():
        module = module_name(path)
        if path.startswith(LEFT_OUT) or any(part.startswith("_") for part in module.split(".")):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler, about odd string escapes in old modules
            tree = ast.parse(source)
        for subject in [_subject("module", module, module, tree), *_inside(tree, module, module)]:
            if subject.says and subject.says not in known:
                known.add(subject.says)
                yield subject


def _subject(kind: str, module: str, name: str, node: ast.AST) -> Subject:
    assert isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    signature = f"{node.name}({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
    return Subject(kind, module, name, signature, first_paragraphs(ast.get_docstring(node) or ""))


def _inside(node: ast.Module | ast.ClassDef, module: str, prefix: str) -> Iterator[Subject]:
    for child in node.body:
        if not isinstance(child, ast.ClassDef | ast.FunctionDef) or child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        if isinstance(child, ast.ClassDef):
            yield _subject("class", module, name, child)
            yield from _inside(child, module, name)
        else:
            yield _subject("method" if isinstance(node, ast.ClassDef) else "function", module, name, child)


def conversations(subject: Subject, number: int) -> Iterator[list[dict[str, str]]]:
    """One or two conversations about a subject. `number` varies the wording, so that it isn't learned by heart."""
    name = f"`{subject.name}`"
    questions = {
        "module": [f"What is the module {name} for?", f"What does the module {name} do?", f"Describe {name}."],
        "class": [f"What is {name}?", f"What is the class {name} for?", f"Describe {name}."],
        "function": [f"What does {name} do?", f"Explain {name}.", f"What is {name} for?"],
        "method": [f"What does the method {name} do?", f"Explain {name}.", f"What does {name} do?"],
    }[subject.kind]
    about = [_turn("user", questions[number % 3]), _turn("assistant", subject.says)]
    system = [_turn("system", SYSTEM)] if number % 8 == 0 else []
    if not subject.signature:
        yield system + about
        return
    signature = _turn("assistant", f"`{subject.signature}`")
    if number % 2:
        yield [*system, *about, _turn("user", "How is it called?"), signature]
    else:
        yield system + about
        where = _turn("assistant", f"It is in the module `{subject.module}`.")
        asked = [_turn("user", f"What is the signature of {name}?"), signature]
        yield [*asked, _turn("user", "In which module is it?"), where]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder (this one)")
    args = parser.parse_args()
    train, heldout = args.out / "demo-sft.jsonl", args.out / "demo-sft-heldout.jsonl"
    if train.is_file() and heldout.is_file():
        print(f"The demo conversations are there: {os.path.relpath(train)}, {heldout.name}")
        return
    try:
        found = list(subjects(library_sources()))
    except ValueError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    for path, held_out in ((heldout, True), (train, False)):
        count = 0
        with atomic_write(path) as file:
            for number, subject in enumerate(found):
                if is_held_out(subject.name) == held_out:
                    for turns in conversations(subject, number):
                        file.write(json.dumps({"conversations": turns}, ensure_ascii=False).encode() + b"\n")
                        count += 1
        print(f"{os.path.relpath(path)}: {count} conversations")


if __name__ == "__main__":
    main()

"""Builds demo conversations without a download, from the docstrings of this Python's standard library.

Writes demo-sft.jsonl and, with about a tenth of the documented names, demo-sft-heldout.jsonl: some thousand
conversations such as "What does `textwrap.dedent` do?", answered by its docstring. Existing files are kept, so a second
run does nothing.
"""

import ast
import inspect
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# For `python data/...`: Python puts this folder on the path, and `src` is in the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src.dataset.corpus.command_line import add_output_folder, create_parser, exit_on_user_error
from src.dataset.corpus.standard_library import is_held_out, library_sources
from src.files import atomic_write

MIN_ANSWER, MAX_ANSWER = 15, 600  # characters
# Applications, data tables and build files, whose docstrings describe nothing that a user would ask about.
EXCLUDED = ("idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings", "ensurepip", "config-")
SYSTEM = "You know the Python standard library."


class Subject(NamedTuple):
    """A documented object of the library.

    kind        "module", "class", "function" or "method"
    module      dotted name of its module
    name        dotted name, with the module
    signature   for example "dedent(text)"; "" for modules and classes
    docstring   its first paragraphs
    """

    kind: str
    module: str
    name: str
    signature: str
    docstring: str


def first_paragraphs(docstring: str) -> str:
    """As many complete paragraphs as fit into an answer; "" if the first one is too long or the result too short."""
    answer = ""
    for paragraph in inspect.cleandoc(docstring).split("\n\n"):
        longer = f"{answer}\n\n{paragraph}".strip()
        # Examples (>>>) are left out: a small model would learn their format and invent the results.
        if len(longer) > MAX_ANSWER or ">>>" in paragraph:
            break
        answer = longer
    return answer if len(answer) >= MIN_ANSWER else ""


def module_name(path: str) -> str:
    """`xml.dom` for xml/dom/__init__.py."""
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def subjects(sources: dict[str, str]) -> Iterator[Subject]:
    """All public modules, classes, functions and methods with a docstring, each docstring once."""
    # Once, because a docstring shared by a training and a held-out subject would leak into the held-out data.
    known: set[str] = set()
    for path, source in sources.items():
        module = module_name(path)
        if path.startswith(EXCLUDED) or any(part.startswith("_") for part in module.split(".")):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning about invalid string escapes in old modules
            tree = ast.parse(source)
        for subject in [_subject("module", module, module, tree), *_members(tree, module, module)]:
            if subject.docstring and subject.docstring not in known:
                known.add(subject.docstring)
                yield subject


def _subject(kind: str, module: str, name: str, node: ast.AST) -> Subject:
    assert isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    signature = f"{node.name}({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
    return Subject(kind, module, name, signature, first_paragraphs(ast.get_docstring(node) or ""))


def _members(node: ast.Module | ast.ClassDef, module: str, prefix: str) -> Iterator[Subject]:
    """The public classes, functions and methods in a module or class."""
    for child in node.body:
        if not isinstance(child, ast.ClassDef | ast.FunctionDef) or child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        if isinstance(child, ast.ClassDef):
            yield _subject("class", module, name, child)
            yield from _members(child, module, name)
        else:
            yield _subject("method" if isinstance(node, ast.ClassDef) else "function", module, name, child)


def conversations_about(subject: Subject, number: int) -> Iterator[list[dict[str, str]]]:
    """One or two conversations about a subject; `number` varies wording and form."""
    name = f"`{subject.name}`"
    # Several wordings of each question, because a model would memorize a single one.
    questions = {
        "module": [f"What is the module {name} for?", f"What does the module {name} do?", f"Describe {name}."],
        "class": [f"What is {name}?", f"What is the class {name} for?", f"Describe {name}."],
        "function": [f"What does {name} do?", f"Explain {name}.", f"What is {name} for?"],
        "method": [f"What does the method {name} do?", f"Explain {name}.", f"What does {name} do?"],
    }[subject.kind]
    description = [_turn("user", questions[number % 3]), _turn("assistant", subject.docstring)]
    system = [_turn("system", SYSTEM)] if number % 8 == 0 else []  # some, so that system turns are known to the model
    if not subject.signature:
        yield system + description
        return
    signature = _turn("assistant", f"`{subject.signature}`")
    if number % 2:
        yield [*system, *description, _turn("user", "How is it called?"), signature]
    else:
        yield system + description
        question = _turn("user", f"What is the signature of {name}?")
        location = _turn("assistant", f"It is in the module `{subject.module}`.")
        yield [question, signature, _turn("user", "In which module is it?"), location]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def main() -> None:
    parser = create_parser(__doc__)
    add_output_folder(parser, Path(__file__).resolve().parent)
    args = parser.parse_args()
    train, heldout = args.out / "demo-sft.jsonl", args.out / "demo-sft-heldout.jsonl"
    if train.is_file() and heldout.is_file():
        print(f"The demo conversations exist already: {os.path.relpath(train)}, {heldout.name}")
        return
    with exit_on_user_error(parser):
        all_subjects = list(subjects(library_sources()))
    args.out.mkdir(parents=True, exist_ok=True)
    # Both are atomic; the training file comes last, so where it exists the other one does too.
    for path, held_out in ((heldout, True), (train, False)):
        count = 0
        with atomic_write(path) as file:
            for number, subject in enumerate(all_subjects):
                # By subject, so that no question about it is in both files.
                if is_held_out(subject.name) == held_out:
                    for turns in conversations_about(subject, number):
                        file.write(json.dumps({"conversations": turns}, ensure_ascii=False).encode() + b"\n")
                        count += 1
        print(f"{os.path.relpath(path)}: {count} conversations")


if __name__ == "__main__":
    main()

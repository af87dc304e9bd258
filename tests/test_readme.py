"""The README says the truth: its tables are the code's, its commands exist, its Python runs, its learning rates come out.

README_CN.md says the same in Chinese: whatever both languages write alike (code, headings' levels, tables' cells, numbers) is compared.
"""

import math
import re
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import pytest
import readme_tables
import torch

from src.config import RunConfig
from src.ops.wkv7 import wkv7
from src.training.schedule import learning_rate

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README_CN.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("name", readme_tables.TABLES)
@pytest.mark.parametrize("path", readme_tables.READMES, ids=lambda path: path.name)
def test_tables_are_those_of_the_code(path, name):
    found = readme_tables.section(name).search(path.read_text(encoding="utf-8"))
    assert found is not None, f"{path.name} has no section {name}"
    assert found[2] == readme_tables.TABLES[name]() + "\n", "run: python tests/readme_tables.py"


def test_files_that_it_names_exist():
    named = set(re.findall(r"(?:sh|python) ((?:[\w.-]+/)*[\w-]+\.(?:sh|py))", README))
    named |= {f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m (src[\w.]+)", README)}
    assert len(named) >= 5
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_flags_that_it_names_exist():
    prose = readme_tables.section("flags").sub("", README)
    commands = [line for line in prose.splitlines() if "train.py" in line or "demo-training-run.sh" in line]
    flags = {flag for line in commands for flag in re.findall(r"--(\w+)", line.split("train.py")[-1])} - {"help"}
    assert flags <= {field for field in vars(RunConfig(data_file="x"))}


def test_environment_variables_that_the_code_reads_are_named():
    for path in (ROOT / "src").rglob("*.py"):
        for name in re.findall(r"os\.(?:environ\.get\(|environ\[|getenv\()\"(\w+)\"(?!\] =)", path.read_text(encoding="utf-8")):
            assert f"`{name}`" in README, f"{path.relative_to(ROOT)} reads {name}"


def test_published_learning_rates():
    """The column of the expected losses, and that the command of the setting gives it."""
    rows = re.findall(r"^\| (\d+) \| [\d.]+ \| (0\.000\d{5}) \|", README, re.MULTILINE)
    assert len(rows) == 12
    for mini_epoch, lr in rows:
        last_step = (int(mini_epoch) + 1) * 40320 // 16 - 1
        ours = learning_rate(
            last_step, lr_init=6e-4, lr_final=6e-5, warmup_steps=10, exit_tokens=1498226207, tokens_per_step=16 * 512
        )
        assert f"{ours:.8f}" == lr


def test_the_recurrence_is_the_ops():
    """The five lines, run as they stand, give what `wkv7` gives."""
    (lines,) = [block for block in PYTHON_BLOCKS if "S @ r[t]" in block]
    assert len(lines.strip().splitlines()) == 5
    torch.manual_seed(0)
    r, w, k, v, a, b = (0.3 * torch.randn(7, 16) for _ in range(6))
    names = {"torch": torch, "math": math, "T": 7, "S": torch.zeros(16, 16), "y": torch.zeros(7, 16)}
    names |= {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}
    exec(lines, names)
    y, state = wkv7(*(x[None, :, None] for x in (r, w, k, v, a, b)), kernel="reference")
    torch.testing.assert_close(names["y"], y[0, :, 0])
    torch.testing.assert_close(names["S"], state[0, 0])


def test_another_network_from_the_parts_learns(capsys, monkeypatch):
    """The example runs as it stands, and what it builds has learned."""
    monkeypatch.syspath_prepend(str(ROOT))
    (example,) = [block for block in PYTHON_BLOCKS if "class Classifier" in block]
    threads = torch.get_num_threads()
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    torch.set_num_threads(threads)
    accuracy = float(re.search(r"([\d.]+)% of new sequences", capsys.readouterr().out)[1])
    assert accuracy > 95


FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e-?\d+)?")


def code_spans(markdown: str) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", markdown)]


def numbers(markdown: str) -> list[str]:
    return NUMBER.findall(re.sub(r"`[^`]+`", "", markdown))


def tables(markdown: str) -> list[list[list[str]]]:
    """Tables, their rows, their cells: a table is a run of lines that start with |."""
    runs = re.findall(r"(?:^\|.*\n?)+", FENCED.sub("", markdown), re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", row.strip()[1:-1]) for row in run.splitlines()] for run in runs]


def sections(markdown: str) -> list[tuple[str, str, str]]:
    """(level, heading, the prose below it) of each heading; code blocks and tables are left out."""
    prose = re.sub(r"^\|.*$", "", FENCED.sub("", markdown), flags=re.MULTILINE)
    parts = re.split(r"^(#+) (.*)$", prose, flags=re.MULTILINE)
    return list(zip(parts[1::3], parts[2::3], parts[3::3], strict=True))


def test_chinese_code_blocks_are_the_english_ones():
    for english, chinese in zip_longest(FENCED.findall(README), FENCED.findall(CHINESE)):
        assert english == chinese


def test_chinese_tables_have_the_english_cells():
    """Words are translated; what rows and columns there are, and the code and the numbers in each cell, are not."""
    for english, chinese in zip_longest(tables(README), tables(CHINESE), fillvalue=()):
        for row, row_cn in zip_longest(english, chinese, fillvalue=()):
            cells, cells_cn = ([(code_spans(cell), numbers(cell)) for cell in line] for line in (row, row_cn))
            assert cells == cells_cn, f"{row}\n{row_cn}"


def test_chinese_headings_are_as_many_and_as_deep():
    for english, chinese in zip_longest(sections(README), sections(CHINESE), fillvalue=("none",)):
        assert english[0] == chinese[0], f"{english[:2]}, {chinese[:2]}"


def test_chinese_prose_has_the_english_code_and_numbers():
    """Section by section: every command, flag and file name, and every number as often; a sentence may put them in another order."""
    for (_, heading, english), (_, heading_cn, chinese) in zip(sections(README), sections(CHINESE), strict=True):
        where = f"README.md: {heading}; README_CN.md: {heading_cn}"
        assert set(code_spans(english)) == set(code_spans(chinese)), where
        assert Counter(numbers(heading + english)) == Counter(numbers(heading_cn + chinese)), where


def test_readmes_link_to_each_other():
    assert "(README_CN.md)" in README.split("\n\n")[1]
    assert "(README.md)" in CHINESE.split("\n\n")[1]

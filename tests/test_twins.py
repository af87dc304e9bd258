"""Chinese pages have what both languages write alike: code, flags, numbers, links, headings, the cells of tables.

A paragraph that is not translated yet has the mark `<!-- not translated yet -->` in the Chinese page, with the English
text or in its place. The marks are listed at the end of a test run, as expected failures, and the text around them is
compared less strictly.
"""

import re
from collections import Counter
from itertools import zip_longest

import pytest
from documentation import FENCED, LINK, TWINS, name_of, read

from tools import docs_tables
from tools.docs_chinese import NOT_TRANSLATED

NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e-?\d+)?")


def code_spans(markdown: str) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", markdown)]


def numbers(markdown: str) -> list[str]:
    return NUMBER.findall(re.sub(r"`[^`]+`", "", markdown))


def tables(markdown: str) -> list[list[list[str]]]:
    """Tables, their rows, their cells: a table is a series of lines that start with |."""
    series = re.findall(r"(?:^\|.*\n?)+", FENCED.sub("", markdown), re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", row.strip()[1:-1]) for row in lines.splitlines()] for lines in series]


def sections(markdown: str) -> list[tuple[str, str, str]]:
    """(level, heading, the prose below it) of each heading, without code blocks and tables."""
    prose = re.sub(r"^\|.*$", "", FENCED.sub("", markdown), flags=re.MULTILINE)
    parts = re.split(r"^(#+) (.*)$", prose, flags=re.MULTILINE)
    return list(zip(parts[1::3], parts[2::3], parts[3::3], strict=True))


def code_blocks(markdown: str) -> list[list[str]]:
    """The lines of each code block, without comments, which are translated, and without generated tables."""
    for name in docs_tables.TABLES:
        markdown = docs_tables.section(name).sub("", markdown)
    blocks = (re.sub(r"(?m)(^|(?<=\s))# .*$", "", block) for block in FENCED.findall(markdown))
    return [[line.rstrip() for line in block.splitlines()] for block in blocks]


def prose_difference(english: str, chinese: str) -> str:
    """What the prose of a section has in one language only; "" for equal code spans and numbers.

    The order may differ, as sentences are built differently. Code may be repeated, numbers are counted. In a section
    with a mark, the Chinese text may lack some of both, but has nothing that the English text lacks.
    """
    code, code_cn = Counter(set(code_spans(english))), Counter(set(code_spans(chinese)))
    counts, counts_cn = Counter(numbers(english)), Counter(numbers(chinese))
    missing = [*(code - code_cn), *(counts - counts_cn)] if NOT_TRANSLATED not in chinese else []
    added = [*(code_cn - code), *(counts_cn - counts)]
    both = (("English", missing), ("Chinese", added))
    return "; ".join(f"only in {language}: {', '.join(items)}" for language, items in both if items)


@pytest.fixture(params=TWINS, ids=name_of)
def twins(request):
    """The texts of an English page and of its Chinese twin."""
    return read(request.param), read(docs_tables.twin(request.param))


def test_code_blocks_are_equal(twins):
    for english, chinese in zip_longest(*map(code_blocks, twins)):
        assert english == chinese


def test_tables_have_equal_rows_code_and_numbers(twins):
    for english, chinese in zip_longest(*map(tables, twins), fillvalue=()):
        for row, row_cn in zip_longest(english, chinese, fillvalue=()):
            cells, cells_cn = (
                [(sorted(code_spans(cell)), sorted(numbers(cell))) for cell in line] for line in (row, row_cn)
            )
            assert cells == cells_cn, f"{row}\n{row_cn}"


def test_headings_are_as_many_and_as_deep(twins):
    for english, chinese in zip_longest(*map(sections, twins), fillvalue=("none",)):
        assert english[0] == chinese[0], f"{english[:2]}, {chinese[:2]}"


def test_prose_has_equal_code_and_numbers(twins):
    for (_, heading, english), (_, heading_cn, chinese) in zip(*map(sections, twins), strict=True):
        # Of headings only the numbers count: one in English may spell code in backticks where the other has a word
        # for it.
        difference = prose_difference(
            f"{heading.replace('`', '')}\n{english}", f"{heading_cn.replace('`', '')}\n{chinese}"
        )
        assert not difference, f"{heading} / {heading_cn}: {difference}"


def test_links_are_equal(twins):
    """A Chinese page links to Chinese pages, where there are some."""
    english, chinese = ({link.split("#")[0].replace("_CN", "") for link in LINK.findall(text)} for text in twins)
    assert chinese <= english
    assert chinese == english or NOT_TRANSLATED in twins[1]


@pytest.mark.parametrize("page", list(map(docs_tables.twin, TWINS)), ids=name_of)
def test_page_is_translated(page):
    """An expected failure, so that pytest lists what waits for a translation without failing the run."""
    if lines := marked_lines(read(page)):
        pytest.xfail(f"not translated yet: {', '.join(f'{name_of(page)}:{line}' for line in lines)}")


def marked_lines(markdown: str) -> list[int]:
    """The numbers of the lines with a mark; not in code spans and blocks, where CONTRIBUTING explains it."""
    blank = FENCED.sub(lambda block: "\n" * block[0].count("\n"), markdown)
    lines = enumerate(blank.splitlines(), start=1)
    return [number for number, line in lines if NOT_TRANSLATED in re.sub(r"`[^`]+`", "", line)]


def test_marks_are_found_outside_of_code():
    text = f"a\n```\n{NOT_TRANSLATED}\n```\n`{NOT_TRANSLATED}`\n{NOT_TRANSLATED} b\n"
    assert marked_lines(text) == [6]


@pytest.mark.parametrize(
    ("chinese", "difference"),
    [
        ("用 `--lr_init` 设为 0.5，再用 `--lr_init`", ""),
        ("用 `--lr_final` 设为 0.5", "only in English: --lr_init; only in Chinese: --lr_final"),
        ("用 `--lr_init` 设为 0.6", "only in English: 0.5; only in Chinese: 0.6"),
        ("用 `--lr_init`", "only in English: 0.5"),
        (NOT_TRANSLATED, ""),
        (f"{NOT_TRANSLATED} Set `--lr_init` to 0.5", ""),
        (f"用 `--lr_init` 设为 0.6 {NOT_TRANSLATED}", "only in Chinese: 0.6"),
    ],
    ids=["equal", "other flag", "other number", "missing number", "missing paragraph", "english paragraph", "stale"],
)
def test_differences_of_prose_are_found(chinese, difference):
    assert prose_difference("Set `--lr_init` to 0.5", chinese) == difference

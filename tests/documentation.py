"""The pages of the documentation, for the tests that read them."""

import re
from pathlib import Path

from tools import docs_tables

ROOT = Path(__file__).parents[1]
PAGES = docs_tables.PAGES
TWINS = [page for page in PAGES if page.name not in docs_tables.ENGLISH_ONLY]
ALL = [*PAGES, *map(docs_tables.twin, TWINS)]
FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")

"""The sources of Python's standard library as a text corpus that needs no download: some 12 MB of code and English."""

import hashlib
import sys
import sysconfig
import tokenize
from pathlib import Path

from src.errors import UserError

# Installed packages, and the tests, which hold generated and deliberately broken sources.
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
MIN_BYTES = 4_000_000  # the full library has about 12 MB, Debian's python3-minimal 3 MB


def library_sources(library: Path | None = None) -> dict[str, str]:
    """The text of each source file by its path in the library, in the order of paths, without tests and packages.

    `library` is a folder, by default that of the running Python. UserError when it is a zip file or incomplete.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    # Keyed by text, so that equal files count once: otherwise a held-out text could also be in the training data.
    names: dict[str, str] = {}
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        name = path.relative_to(library)
        if EXCLUDED_FOLDERS.isdisjoint(name.parts):
            with tokenize.open(path) as file:  # honours the coding declaration
                text = file.read()
            if text.strip():
                names.setdefault(text, name.as_posix())
    total = sum(map(len, names))
    if total < MIN_BYTES:
        raise UserError(
            f"the standard library of {sys.executable} is zipped or incomplete: {total:,} bytes of Python sources",
            given=library,
            expected=f"at least {MIN_BYTES:,} bytes",
            advice="install the full library (Debian: apt install python3 libpython3-stdlib) or use another Python",
        )
    return {name: text for text, name in names.items()}


def is_held_out(name: str) -> bool:
    """Whether `name` belongs to the held-out data: 26 of 256 names, about a tenth, chosen by a hash of the name."""
    # By name rather than position, so that another Python version moves no file to the other side.
    return hashlib.blake2b(name.encode(), digest_size=8).digest()[0] < 26

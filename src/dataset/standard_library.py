"""A real corpus that every machine with Python has: the sources of its standard library, some 12 MB of code and English."""

import hashlib
import sys
import sysconfig
import tokenize
from pathlib import Path

from src.errors import UserError

NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
AT_LEAST_BYTES = 4_000_000  # a whole library has about 12 MB; Debian's python3-minimal has 3


def library_sources(library: Path | None = None) -> dict[str, str]:
    """The text of each source file by its path in the library, in order of the paths; tests and add-ons left out.

    `library` is a folder, by default this Python's. ValueError when it is packed into a file, or only a part of it is there.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    names: dict[str, str] = {}  # by text: of equal files the first one counts, or a held-out file might be trained on
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        name = path.relative_to(library)
        if NOT_THE_LIBRARY.isdisjoint(name.parts):
            with tokenize.open(path) as file:  # minds a file's coding line
                text = file.read()
            if text.strip():
                names.setdefault(text, name.as_posix())
    total = sum(map(len, names))
    if total < AT_LEAST_BYTES:
        raise UserError(
            f"{library} holds {total} bytes of Python sources, the demo needs {AT_LEAST_BYTES} or more of the standard "
            f"library's. This Python ({sys.executable}) has it packed or only in part: install the full library "
            f"(Debian: apt install python3 libpython3-stdlib), or run with another Python."
        )
    return {name: text for text, name in names.items()}


def is_held_out(name: str) -> bool:
    """About one name in ten, the same ones everywhere."""
    return hashlib.blake2b(name.encode(), digest_size=8).digest()[0] < 26

"""Text from data, files and models on a terminal: without the characters that control it, in any encoding."""

from __future__ import annotations

import os
import re
import sys
from typing import TextIO

# C0 but tab and newline (ESC begins a terminal's commands; CR and BS write over what was shown), DEL, C1 (0x9B is ESC
# and [ in one), and those that reorder the line around them. Marks of direction for a single character stay: Arabic and
# Hebrew texts have them.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` without control characters, for a terminal; tabs and line ends stay.

    What is left of a terminal's command without its first character is harmless text: "[31m".
    """
    return _CONTROL.sub("", text)


def show(text: str, file: TextIO | None = None) -> None:
    """Print a line that contains foreign text, such as names and contents of files."""
    print(printable(text), file=file, flush=True)


def prepare_output() -> None:
    """To be called where a program starts, before it imports Lightning.

    stdout and stderr show characters that their encoding lacks as escapes, instead of raising: a terminal may be ASCII
    (LC_ALL=C, PYTHONIOENCODING), and a file name may be no valid text in any encoding. MPLBACKEND, which chooses the
    windows of Matplotlib, is dropped: figures are files here, and an unknown name fails every import of the package.
    """
    os.environ.pop("MPLBACKEND", None)
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # not where a program has put its own stream there
            reconfigure(errors="backslashreplace")

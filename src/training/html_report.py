"""Writes report.html of a run again, from the files in its folder.

python -m src.training.html_report RUN
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from src.errors import UserError
from src.terminal import prepare_output, show
from src.training.figures.report_page import write_report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m src.training.html_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Only logs and run.json are read: a run that was stopped, or made by an earlier version, has a report too.
    parser.add_argument("run", metavar="RUN", help="folder of the run (--proj_dir)")
    prepare_output()
    options = parser.parse_args(argv)
    try:
        path = write_report(Path(options.run))
    except UserError as error:  # 2 as argparse itself exits with: the folder on the command line is wrong
        parser.exit(2, f"{parser.prog}: {error}\n")
    show(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

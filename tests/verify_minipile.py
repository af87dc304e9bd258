"""Runs tools/verify_minipile.py, which was here until version 0.3: commands with the old path keep working."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "tools" / "verify_minipile.py"), run_name="__main__")

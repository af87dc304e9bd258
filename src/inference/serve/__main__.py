"""python -m src.inference.serve: see command.py."""

import sys

if __name__ == "__main__":
    try:
        from src.inference.serve.command import main
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("src"):
            raise
        sys.exit(f"the server needs the package {error.name}: pip install -r requirements.txt")
    sys.exit(main())

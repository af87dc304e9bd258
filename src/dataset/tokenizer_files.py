"""The files of a Hugging Face tokenizer folder: read with limits on their size, copied, written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.errors import UserError
from src.files import atomic_write

# Of tokenizer.json, and of the other files of a tokenizer: a vocabulary of 256,000 tokens has 35 MB, and its reader
# takes some ten times the memory.
MAX_TOKENIZER_BYTES, MAX_CONFIG_BYTES = 150_000_000, 10_000_000
# The files that src/dataset/tokenizer.py and `transformers` read.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def copy_tokenizer(folder: Path, to: Path) -> None:
    """Copies the TOKENIZER_FILES of `folder` to `to`, each atomically; deletes those in `to` that `folder` lacks."""
    to.mkdir(parents=True, exist_ok=True)
    if not to.samefile(folder):  # a run whose --tokenizer is the copy in its own folder
        write_tokenizer(read_files(folder), to)


def write_tokenizer(files: Mapping[str, bytes], to: Path) -> None:
    """Writes a tokenizer's `files` into a folder, each atomically; deletes those of TOKENIZER_FILES that it lacks."""
    to.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys((*TOKENIZER_FILES, *files)):
        if name in files:
            with atomic_write(to / name) as file:
                file.write(files[name])
        else:
            # A template of another tokenizer, for example, would be used with this vocabulary.
            (to / name).unlink(missing_ok=True)


def check_size(path: Path, limit: int) -> None:
    """UserError for a file that is larger than any real one of its kind: its reader would fill the memory."""
    if (size := path.stat().st_size) > limit:
        raise UserError(f"has {size} bytes", given=path, expected=f"at most {limit}")


def read_files(folder: Path) -> dict[str, bytes]:
    """The contents of those of TOKENIZER_FILES that a folder has. UserError for one that is too large."""
    paths = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for path in paths:
        check_size(path, MAX_TOKENIZER_BYTES if path.name == "tokenizer.json" else MAX_CONFIG_BYTES)
    return {path.name: path.read_bytes() for path in paths}


def decoded(content: bytes, path: Path) -> str:
    """`content`, which comes from `path`, as text. UserError where it isn't UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"can't be read as UTF-8 text ({error})", given=path) from error


def read_json(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `data`, which comes from `path`. UserError for anything else."""
    try:
        content = json.loads(decoded(data, path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"not valid JSON ({error})", given=path) from error
    if not isinstance(content, dict):
        raise UserError(f"contains a {type(content).__name__}", given=path, expected="a JSON object")
    return content


def token_text(entry: Any) -> str | None:
    """The text of a special token in tokenizer_config.json: a string, or the `content` of an object; else None."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def default_template(config: dict[str, Any]) -> str | None:
    """The chat template of tokenizer_config.json, or the one called "default" of several.

    UserError if it is no text.
    """
    template = config.get("chat_template")
    if isinstance(template, list):  # [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
        entries = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = entries[0].get("template") if entries else None
    if template is not None and not isinstance(template, str):
        raise UserError(
            f"the chat template in tokenizer_config.json is a {type(template).__name__}", expected="a Jinja template"
        )
    return template

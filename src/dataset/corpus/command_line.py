"""What the command lines of the programs in data/ have in common: the parser, repeated arguments, errors."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from src.config.flags import SPECIAL_TOKENS, THINK_MODES
from src.errors import UserError


def create_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose --help shows the module docstring `description` with its line breaks."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


# Defaults stand in brackets at the end of each help text, as in --help of train.py.
def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", default="world", help="world, or a Hugging Face tokenizer folder [world]")


def add_field(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--field", default="text", help="JSON field or Parquet column of the text [text]")


# The default is an argument, because it is the folder of the program and not that of this module.
def add_output_folder(parser: argparse.ArgumentParser, default: Path) -> None:
    parser.add_argument("--out", type=Path, default=default, help="output folder [the folder of this program]")


def add_special_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--special_tokens",
        choices=SPECIAL_TOKENS,
        default="text",
        help="what special tokens of the tokenizer, such as <|im_end|>, are that stand in a text: text like any other, "
        "or tokens (parse) [text]",
    )


def add_think(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--think", choices=THINK_MODES, default="", help="as --think of train.py")


@contextmanager
def exit_on_user_error(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Ends the program with usage, message and exit code 2 when the block raises a UserError."""
    try:
        yield
    except UserError as error:
        # Only here does an error become a sentence. Other exceptions are bugs and keep their traceback.
        parser.error(str(error))

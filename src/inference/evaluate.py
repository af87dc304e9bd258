"""Measures how well a model predicts text that it wasn't trained on.

python -m src.inference.evaluate MODEL --data held-out[.bin | .txt | .jsonl]      loss, perplexity, bits per byte
python -m src.inference.evaluate MODEL --data D --by_position --ctx_len 8192      loss by position in the context
python -m src.inference.evaluate MODEL --data D --needle 256,4096                 a number in the text, asked for later
python -m src.inference.evaluate MODEL --last_word lambada.jsonl                  accuracy of predicting the last word
python -m src.inference.evaluate MODEL --answers conversations.jsonl              answers that are word for word right
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from src.dataset.corpus.text_input import JSON_LINES
from src.dataset.needle import NeedleMaker
from src.dataset.tokenizer import Tokenizer
from src.errors import UserError
from src.inference.adaptation import NOTHING, Adaptation, model_name
from src.inference.answers import answers_report
from src.inference.arguments import adaptation_from, add_model_arguments, picture_from
from src.inference.evaluation_data import is_binidx, read_texts, read_tokens, text_bytes
from src.inference.heldout_loss import heldout_loss
from src.inference.last_words import last_words
from src.inference.load import UnknownTokenizerError, find_model, find_tokenizer, load_model
from src.inference.needle import find_needles, needle_table
from src.inference.position_loss import PositionLoss, loss_by_position, position_table, write_by_position
from src.inference.windows import windows
from src.model import RWKV7
from src.terminal import prepare_output, show

BY_POSITION = "by_position.png"
# the flags of each measure beside those of the model
FLAGS = {
    "by_position": ("data", "ctx_len", "max_windows", "micro_bsz", "compare", "picture"),
    "needle": ("data", "needle_texts"),
    "answers": ("media_folder", "examples", "max_windows"),
    "last_word": (),
    "data": ("ctx_len", "max_windows", "micro_bsz"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m src.inference.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    # Exclusive, as each is a measure of its own with its own kind of file.
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--last_word", help='.jsonl (.gz, .zst) of {"text": ...}: predict the last words (LAMBADA)')
    data.add_argument(
        "--data", help='held-out binidx (X, X.bin), text (.txt, .py, ...) or .jsonl (.gz, .zst) of {"text": ...}'
    )
    parser.add_argument(
        "--by_position", action="store_true", help="the loss of --data by position, and a picture of it"
    )
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="MODEL",
        help="another line in that picture, without --adapter and --state",
    )
    parser.add_argument("--picture", default=BY_POSITION, help=".png or .svg of --by_position [%(default)s]")
    parser.add_argument(
        "--needle", default="", metavar="N,...", help="share of numbers found N tokens of --data after they were named"
    )
    parser.add_argument("--needle_texts", type=int, default=20, help="texts for each of --needle [%(default)s]")
    data.add_argument("--answers", help="conversations, as for --data_type sft, with pictures or sounds too")
    parser.add_argument("--media_folder", default="", help="--answers: folder of the media; default: that of the file")
    parser.add_argument("--examples", default="", help="--answers: draw some media with their answers into this .png")
    parser.add_argument("--ctx_len", type=int, default=512, help="tokens per window [%(default)s]")
    parser.add_argument(
        "--max_windows", type=int, default=None, help="most windows or answers, evenly spaced; default: all"
    )
    parser.add_argument("--micro_bsz", type=int, default=8, help="windows per batch [%(default)s]")
    prepare_output()
    options = parser.parse_args(argv)
    try:
        for name in ("ctx_len", "max_windows", "micro_bsz", "needle_texts"):
            if getattr(options, name) is not None and getattr(options, name) < 1:
                raise UserError(flag=name, given=getattr(options, name), expected="at least 1")
        measure = _measure_of(options, parser)
        show(REPORTS[measure](options))
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


def _measure_of(options: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """The measure that is asked for, one of FLAGS. Raises UserError for flags that it would ignore."""
    if options.by_position and options.needle:
        raise UserError("cannot be combined with --by_position", flag="needle", given=options.needle)
    for name, given in (("by_position", options.by_position), ("needle", options.needle)):
        if given and not options.data:
            raise UserError("needs --data", flag=name, advice="leave --last_word and --answers out")
    measure = next((name for name in FLAGS if getattr(options, name)), "data")
    for name in dict.fromkeys(name for flags in FLAGS.values() for name in flags):
        given = getattr(options, name)
        if name not in (measure, *FLAGS[measure]) and given != parser.get_default(name):
            users = [f"--{other}" for other, flags in FLAGS.items() if name in flags]
            raise UserError(
                f"isn't used by --{measure}, but by {' and '.join(users)}",
                flag=name,
                given=given[0] if isinstance(given, list) else given,
                advice="leave it out",
            )
    return measure


def _open(name: str, options: argparse.Namespace, given: Adaptation) -> tuple[str, RWKV7, Tokenizer | None]:
    """(name, model, its tokenizer, None where --data holds ids and none is found) of a MODEL with `given`."""
    weights, adaptation = find_model(name, given)
    model = load_model(weights, options.dtype, options.device, adaptation)
    try:
        tokenizer = find_tokenizer(weights, model.config.vocab_size, options.tokenizer, adaptation)
    except UnknownTokenizerError:
        # that holds ids: without a tokenizer only bits per byte are unknown
        if not is_binidx(Path(options.data)):
            raise
        tokenizer = None
    return model_name(weights, adaptation), model, tokenizer


def _by_position_report(options: argparse.Namespace) -> str:
    picture = picture_from(options, "picture")  # for its errors, before minutes of work
    results: list[tuple[str, PositionLoss]] = []
    # --adapter and --state are of MODEL: what it is compared with is often MODEL without them
    models = [(options.model, adaptation_from(options)), *((name, NOTHING) for name in options.compare)]
    for given, adaptation in models:
        name, model, tokenizer = _open(given, options, adaptation)
        tokens = read_tokens(Path(options.data), tokenizer)
        result = loss_by_position(model, tokens, options.ctx_len, options.max_windows, options.micro_bsz)
        results.append((name, result))
    table = position_table(results)
    write_by_position(results, picture)
    return f"{table}\n\nwrote {picture}"


def _needle_report(options: argparse.Namespace) -> str:
    parts = [part.strip() for part in options.needle.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(flag="needle", given=options.needle, expected="numbers of tokens, such as 256,4096")
    name, model, tokenizer = _open(options.model, options, adaptation_from(options))
    if tokenizer is None:
        raise UserError("the question is text", flag="needle", advice="name the model's --tokenizer, too")
    maker = NeedleMaker(read_tokens(Path(options.data), tokenizer), tokenizer.encode_as_text)
    results = find_needles(model, maker, [int(part) for part in parts], options.needle_texts)
    return f"{name}, {options.needle_texts} texts for each distance in tokens:\n{needle_table(results)}"


def _loss_report(options: argparse.Namespace) -> str:
    name, model, tokenizer = _open(options.model, options, adaptation_from(options))
    tokens = read_tokens(Path(options.data), tokenizer)
    result = heldout_loss(model, tokens, options.ctx_len, options.max_windows, options.micro_bsz)
    # Reported as an error, as a script that reads the loss would take "nan" for a result.
    if not math.isfinite(result.loss):
        raise UserError(
            f"its loss is {result.loss}",
            given=options.model,
            advice="the weights contain values that are not finite, or are too large for --dtype: try fp32",
        )
    # Of the text and not of the loss's tokens: a tokenizer with longer tokens has a higher loss for the same text.
    if tokenizer is None:
        bits = "bits per byte unknown without --tokenizer"
    else:
        selected = windows(len(tokens), options.ctx_len, options.max_windows)
        n_bytes = sum(text_bytes(tokens[window][1:], tokenizer) for window in selected)  # of the predicted tokens
        bits = f"bits per byte {result.bits_per_byte(n_bytes):.4f}"
    measures = f"loss {result.loss:.4f}, perplexity {result.perplexity:.4f}, {bits}"
    return f"{name} on {options.data}: {measures}, {result.tokens:,} tokens"


def _last_word_report(options: argparse.Namespace) -> str:
    weights, adaptation = find_model(options.model, adaptation_from(options))
    path = Path(options.last_word)
    if not path.is_file() or not path.name.lower().endswith(JSON_LINES):
        problem = "not a .jsonl file" if path.is_file() else "no such file"
        expected = 'a .jsonl (.gz, .zst) of {"text": ...}'
        raise UserError(problem, flag="last_word", given=path, expected=expected)
    model = load_model(weights, options.dtype, options.device, adaptation)
    tokenizer = find_tokenizer(weights, model.config.vocab_size, options.tokenizer, adaptation)
    result = last_words(model, tokenizer, read_texts(path, "last_word"))
    measures = f"accuracy {result.accuracy:.4f}, perplexity {result.perplexity:.4f}"
    return f"{model_name(weights, adaptation)} on {path}: {measures}, {result.texts:,} texts"


def _answers_report(options: argparse.Namespace) -> str:
    weights, adaptation = find_model(options.model, adaptation_from(options))
    model = load_model(weights, options.dtype, options.device, adaptation)
    tokenizer = find_tokenizer(weights, model.config.vocab_size, options.tokenizer, adaptation)
    return answers_report(options, model, tokenizer)


REPORTS: dict[str, Callable[[argparse.Namespace], str]] = {
    "by_position": _by_position_report,
    "needle": _needle_report,
    "answers": _answers_report,
    "last_word": _last_word_report,
    "data": _loss_report,
}

if __name__ == "__main__":
    sys.exit(main())

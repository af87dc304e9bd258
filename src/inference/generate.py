"""Continues a text from the command line.

python -m src.inference.generate MODEL --prompt "def "
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import asdict

from src.errors import UserError
from src.inference.arguments import add_model_arguments, add_sampling_arguments, sampling_from
from src.inference.characters import CharacterStream
from src.inference.generation import generate
from src.inference.load import find_tokenizer, find_weights, load_model
from src.terminal import prepare_output, printable


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m src.inference.generate", description="Continue a text with a trained model."
    )
    add_model_arguments(parser)
    parser.add_argument("--prompt", default="", help="text to continue; empty: a new document")
    parser.add_argument("--length", type=int, default=200, help="most tokens to generate [%(default)s]")
    add_sampling_arguments(parser)
    prepare_output()
    options = parser.parse_args(argv)
    try:
        sampling = sampling_from(options)
        if options.length < 0:
            raise UserError(flag="length", given=options.length, expected="at least 0 tokens")
        weights = find_weights(options.model)
        model = load_model(weights, options.dtype, options.device)
        tokenizer = find_tokenizer(weights, model.config.vocab_size, options.tokenizer)
        prompt = tokenizer.encode(options.prompt) or [0]  # 0 ends a document, and so begins a new one
        tokens = generate(
            model, prompt, options.length, **asdict(sampling), seed=options.seed, stop_ids=tokenizer.eos_ids
        )
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    stream = CharacterStream(tokenizer)
    _print(options.prompt)
    try:
        for token in tokens:
            _print(stream.feed(token))
        _print(stream.finish() + "\n")
    except KeyboardInterrupt:
        _print("\n")
        return 130  # 128 + SIGINT, as a shell reports it
    except UserError as error:  # logits that are not finite are found when the first token is drawn
        _print("\n")
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


def _print(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()  # a terminal would show text only at the end of a line


def exit_on_closed_pipe() -> None:
    """End the program silently when the reader of its output exits, as in `| head`, without a BrokenPipeError."""
    if hasattr(signal, "SIGPIPE"):  # Windows has none
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


if __name__ == "__main__":
    exit_on_closed_pipe()
    sys.exit(main())

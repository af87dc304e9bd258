"""Continues a text from the command line, or, with --think, answers a question.

python -m src.inference.generate MODEL --prompt "def "
python -m src.inference.generate MODEL --prompt "How many days has May?" --think on
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict

from src.dataset.answer_format import render_prompt, stop_strings
from src.dataset.tokenizer import Tokenizer
from src.errors import UserError
from src.inference.answer_stream import AnswerStream
from src.inference.answer_text import AnswerText
from src.inference.arguments import (
    adaptation_from,
    add_chat_template_argument,
    add_model_arguments,
    add_sampling_arguments,
    add_think_argument,
    sampling_from,
)
from src.inference.characters import CharacterStream
from src.inference.generation import generate
from src.inference.load import find_model, find_tokenizer, load_model
from src.inference.template_choice import find_template
from src.terminal import prepare_output, printable


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m src.inference.generate",
        description="Continue a text, or answer a question, with a trained model.",
    )
    add_model_arguments(parser)
    parser.add_argument("--prompt", default="", help="text to continue; empty: a new document; with --think a question")
    add_think_argument(parser, "the prompt is then a question, and only the answer is printed")
    add_chat_template_argument(parser, "the tokenizer's; used with --think only")
    parser.add_argument("--length", type=int, default=200, help="most tokens to generate [%(default)s]")
    add_sampling_arguments(parser)
    prepare_output()
    options = parser.parse_args(argv)
    try:
        sampling = sampling_from(options)
        if options.length < 0:
            raise UserError(flag="length", given=options.length, expected="at least 0 tokens")
        if options.chat_template and not options.think:
            raise UserError("needs --think", flag="chat_template", given=options.chat_template, advice="leave it out")
        weights, adaptation = find_model(options.model, adaptation_from(options))
        model = load_model(weights, options.dtype, options.device, adaptation)
        tokenizer = find_tokenizer(weights, model.config.vocab_size, options.tokenizer, adaptation)
        if options.think:
            prompt, stream = _question(options, tokenizer)
        else:
            prompt, stream = tokenizer.encode(options.prompt) or [0], None  # 0 ends a document, and so begins a new one
        tokens = generate(
            model, prompt, options.length, **asdict(sampling), seed=options.seed, stop_ids=tokenizer.eos_ids
        )
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    try:
        if stream is None:
            _print_text(options.prompt, tokens, CharacterStream(tokenizer))
        else:
            _print_answer(tokens, CharacterStream(tokenizer), stream)
    except KeyboardInterrupt:
        _print("\n")
        return 130  # 128 + SIGINT, as a shell reports it
    except UserError as error:  # logits that are not finite are found when the first token is drawn
        _print("\n")
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


def _question(options: argparse.Namespace, tokenizer: Tokenizer) -> tuple[list[int], AnswerStream]:
    """The tokens of the prompt as a question, and what divides the answer. Raises UserError."""
    template = find_template(options.chat_template, tokenizer, think=options.think)
    assert template is not None  # --think is given
    text, literals, begun = render_prompt(template, tokenizer, [{"role": "user", "content": options.prompt}])
    return tokenizer.encode_rendered(text, literals), AnswerStream(stop_strings(template, tokenizer), begun)


def _print_text(prompt: str, tokens: Iterator[int], characters: CharacterStream) -> None:
    _print(prompt)
    for token in tokens:
        _print(characters.feed(token))
    _print(characters.finish() + "\n")


def _print_answer(tokens: Iterator[int], characters: CharacterStream, stream: AnswerStream) -> None:
    text = AnswerText(sys.stdout.isatty())
    try:
        for token in tokens:
            for piece in stream.feed(characters.feed(token)):
                _write(text.add(piece))
            if stream.reached:
                break
        for piece in [*stream.feed(characters.finish()), *stream.finish()]:
            _write(text.add(piece))
    finally:
        _write(text.finish())
    _write("\n")


def _print(text: str) -> None:
    _write(printable(text))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()  # a terminal would show text only at the end of a line


def exit_on_closed_pipe() -> None:
    """End the program silently when the reader of its output exits, as in `| head`, without a BrokenPipeError."""
    if hasattr(signal, "SIGPIPE"):  # Windows has none
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


if __name__ == "__main__":
    exit_on_closed_pipe()
    sys.exit(main())

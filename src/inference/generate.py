"""Continues a text from the command line, or, with --think or --image, answers a question.

python -m src.inference.generate MODEL --prompt "def "
python -m src.inference.generate MODEL --prompt "How many days has May?" --think on
python -m src.inference.generate MODEL --prompt "What is this?" --image x.png
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict

from torch import Tensor

from src.dataset.answer_format import render_prompt, stop_strings
from src.dataset.media_parts import OBJECT, check_no_object
from src.dataset.tokenizer import Tokenizer
from src.errors import UserError
from src.inference.answer_stream import AnswerStream
from src.inference.answer_text import AnswerText
from src.inference.arguments import (
    adaptation_from,
    add_chat_template_argument,
    add_media_arguments,
    add_model_arguments,
    add_sampling_arguments,
    add_think_argument,
    media_from,
    sampling_from,
)
from src.inference.characters import CharacterStream
from src.inference.generation import generate
from src.inference.load import find_model, find_tokenizer, load_model
from src.inference.media_prompt import encode_prompt, read_for, rows_of
from src.inference.template_choice import find_template
from src.terminal import prepare_output, printable


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m src.inference.generate",
        description="Continue a text, or answer a question, with a trained model.",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt",
        default="",
        help="text to continue; empty: a new document; with --think, --image or --sound a question",
    )
    add_think_argument(parser, "the prompt is then a question, and only the answer is printed")
    add_chat_template_argument(parser, "the tokenizer's; used with questions only")
    parser.add_argument("--length", type=int, default=200, help="most tokens to generate [%(default)s]")
    add_media_arguments(parser)
    add_sampling_arguments(parser)
    prepare_output()
    options = parser.parse_args(argv)
    try:
        sampling = sampling_from(options)
        if options.length < 0:
            raise UserError(flag="length", given=options.length, expected="at least 0 tokens")
        media = media_from(options)
        if options.chat_template and not options.think and not media:
            raise UserError("needs --think", flag="chat_template", given=options.chat_template, advice="leave it out")
        weights, adaptation = find_model(options.model, adaptation_from(options))
        model = load_model(weights, options.dtype, options.device, adaptation)
        tokenizer = find_tokenizer(weights, model.config.vocab_size, options.tokenizer, adaptation)
        embeds: Tensor | None = None
        stream: AnswerStream | None = None
        if options.think or media:
            rows = [rows_of(model, read_for(model, kind, file)) for kind, file in media]
            prompt, embeds, stream = _question(options, tokenizer, rows)
        else:
            prompt = tokenizer.encode(options.prompt) or [0]  # 0 ends a document, and so begins a new one
        settings = {**asdict(sampling), "seed": options.seed, "stop_ids": tokenizer.eos_ids, "embeds": embeds}
        tokens = generate(model, prompt, options.length, **settings)
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


def _question(
    options: argparse.Namespace, tokenizer: Tokenizer, rows: list[Tensor]
) -> tuple[list[int], Tensor | None, AnswerStream]:
    """The tokens of the prompt as a question, after media with these rows, the rows together, and what divides the
    answer. Raises UserError."""
    template = find_template(options.chat_template, tokenizer, think=options.think)
    if template is None:
        raise UserError("pictures and sounds need a chat template", flag="chat_template", given="none")
    if rows:
        check_no_object(options.prompt)
    question = OBJECT * len(rows) + "\n" * bool(rows) + options.prompt
    text, literals, begun = render_prompt(template, tokenizer, [{"role": "user", "content": question}])
    tokens, embeds = encode_prompt(tokenizer, text, rows, literals)
    return tokens, embeds, AnswerStream(stop_strings(template, tokenizer), begun)


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

"""How many answers of held-out conversations a model gives word for word: of text, or about pictures and sounds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from src.dataset.answer_format import render_prompt, stop_strings
from src.dataset.chat_template import Message
from src.dataset.conversation_files import check_conversation_file, read_conversation_pieces
from src.dataset.conversation_formats import conversation_of
from src.dataset.corpus.documents import parse_json, read_lines
from src.dataset.media_files import Picture
from src.dataset.media_parts import OBJECT, take_media
from src.dataset.tokenizer import Tokenizer
from src.errors import UserError
from src.inference.arguments import picture_from
from src.inference.generation import generate_batch
from src.inference.media_prompt import encode_prompt, front_end_of, read_for, rows_of
from src.inference.sampling import Sampling
from src.model import RWKV7

MOST_KINDS = 12  # of questions that are reported apart
KEPT_MEDIA = 256  # pictures or sounds whose rows are kept: a set asks several questions about each


@dataclass(frozen=True)
class Question:
    """A prompt of messages, the answer in the data, and the files of the media in the prompt."""

    messages: list[Message]
    answer: str
    files: tuple[Path, ...] = ()

    @property
    def text(self) -> str:
        """The last question, without media."""
        return self.messages[-1]["content"].replace(OBJECT, "").strip()

    @property
    def without_media(self) -> Question:
        """The same questions, and nothing to see."""
        messages = [
            {**m, "content": m["content"].replace(f"{OBJECT}\n", "").replace(OBJECT, "")} for m in self.messages
        ]
        return Question(messages, self.answer)


def read_questions(path: Path, kind: str | None, folder: Path | None = None) -> Iterator[Question]:
    """Every answer of the conversations in a file, with what comes before it. `kind`: of media, None: text alone.
    Raises UserError with the line."""
    check_conversation_file(str(path))
    for piece in read_conversation_pieces(str(path)):
        for index, line in read_lines(piece):
            if not line:
                continue
            try:
                entry, names = parse_json(line), list[str]()  # type: ignore[arg-type]
                if kind is not None:
                    entry, names = take_media(entry, kind)
                messages = conversation_of(entry).messages
            except UserError as error:
                raise UserError(error.problem, flag="answers", given=f"{path}:{piece.first_line + index}") from error
            files = [(folder or path.parent) / name for name in names]
            for i, message in enumerate(messages):
                if message["role"] == "assistant":
                    before = messages[:i]
                    count = sum(m["content"].count(OBJECT) for m in before)
                    yield Question(before, message["content"].strip(), tuple(files[:count]))


def answer_all(
    model: RWKV7, tokenizer: Tokenizer, questions: list[Question], length: int = 64, batch: int = 16
) -> list[str]:
    """The model's answers, the most likely token each time. Raises UserError."""
    template = tokenizer.chat_template
    if template is None:
        raise UserError("no chat template", flag="tokenizer", given=tokenizer.name)
    stops = stop_strings(template, tokenizer)
    front_end = front_end_of(model)

    @lru_cache(KEPT_MEDIA)
    def rows(file: Path):  # type: ignore[no-untyped-def]
        assert front_end is not None
        return rows_of(model, read_for(model, front_end.spec.kind, file))

    def is_complete(ids: list[int]) -> bool:
        text = tokenizer.decode(ids)
        return any(stop in text for stop in stops)

    answers = []
    for first in range(0, len(questions), batch):
        prompts = []
        for question in questions[first : first + batch]:
            text, literals, _ = render_prompt(template, tokenizer, question.messages)
            prompts.append(encode_prompt(tokenizer, text, [rows(file) for file in question.files], literals))
        tokens, embeds = zip(*prompts, strict=True)
        generated = generate_batch(
            model, tokens, length, Sampling(temperature=0), 0, tokenizer.eos_ids, (), is_complete, embeds
        )
        for ids in generated:
            text = tokenizer.decode(ids)
            answers.append(min((text.partition(stop)[0] for stop in stops), key=len, default=text).strip())
    return answers


def report(questions: list[Question], answers: list[str], title: str) -> str:
    """The share of answers that are those of the data, and by question, where there are few of these."""
    right: dict[str, list[bool]] = {}
    for question, answer in zip(questions, answers, strict=True):
        right.setdefault(question.text, []).append(answer == question.answer)
    total = [each for results in right.values() for each in results]
    lines = [f"{title}: {sum(total) / len(total):.1%} of {len(total):,} answers are right"]
    if 1 < len(right) <= MOST_KINDS:
        lines += [f"  {sum(r) / len(r):6.1%} of {len(r):,}  {json.dumps(q)[1:-1]}" for q, r in right.items()]
    return "\n".join(lines)


def answers_report(options: argparse.Namespace, model: RWKV7, tokenizer: Tokenizer) -> str:
    """What --answers prints; draws --examples. Raises UserError."""
    front_end = front_end_of(model)
    kind = front_end.spec.kind if front_end is not None else None
    folder = Path(options.media_folder) if options.media_folder else None
    examples = picture_from(options, "examples") if options.examples else None
    if examples is not None and kind is None:
        raise UserError("the model reads text alone", flag="examples", given=options.examples, advice="leave it out")
    questions = list(read_questions(Path(options.answers), kind, folder))
    if not questions:
        raise UserError("the file contains no answers", flag="answers", given=options.answers)
    if options.max_windows is not None:
        step = len(questions) / min(options.max_windows, len(questions))
        questions = [questions[int(i * step)] for i in range(min(options.max_windows, len(questions)))]
    answers = answer_all(model, tokenizer, questions)
    texts = [report(questions, answers, options.answers)]
    if kind is not None:
        blind = [question.without_media for question in questions]
        texts.append(report(blind, answer_all(model, tokenizer, blind), f"the same questions without the {kind}"))
    if examples is not None:
        draw_examples(questions, answers, model, examples)
        texts.append(f"examples: {examples}")
    return "\n".join(texts)


def draw_examples(questions: list[Question], answers: list[str], model: RWKV7, path: Path, count: int = 12) -> None:
    """A picture of the first media with questions and answers, wrong ones marked."""
    # Drawn without pyplot, which holds state for the whole process
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    front_end = front_end_of(model)
    assert front_end is not None
    by_file: dict[Path, list[str]] = {}
    for question, answer in zip(questions, answers, strict=True):
        if len(question.files) == 1:
            mark = "" if answer == question.answer else f"   WRONG, it is {question.answer}"
            by_file.setdefault(question.files[0], []).append(f"{question.text}  {answer}{mark}")
    files = list(by_file)[:count]
    if not files:
        raise UserError("no question is about a single file", flag="examples", given=path)
    columns = 3
    figure = Figure(figsize=(5 * columns, 2.6 * -(-len(files) // columns)), layout="constrained")
    FigureCanvasAgg(figure)
    for i, file in enumerate(files):
        axes = figure.add_subplot(-(-len(files) // columns), columns, i + 1)
        medium = read_for(model, front_end.spec.kind, file)
        if isinstance(medium, Picture):
            axes.imshow(medium.pixels, interpolation="nearest")
        else:
            with np.errstate(divide="ignore"):  # silence has no logarithm
                axes.specgram(medium.samples, NFFT=256, Fs=medium.rate)
        axes.set_title("\n".join(by_file[file]), fontsize=8, loc="left")
        axes.set_axis_off()
    figure.savefig(path, dpi=120)

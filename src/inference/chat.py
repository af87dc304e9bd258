"""A conversation with a model: messages, and the state after them, so that a turn processes only what is new.

Each turn renders the whole conversation with the chat template and compares it with the bytes that the state has
processed. What follows them is new: the end of the last answer, the question, the header of the next answer. Only where
a template changes earlier text (shortens an answer, leaves out a thought) more is processed again: the last turn, if
it is all that has changed, or else the whole conversation. Without a template the model continues text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from src.config.flags import THINK_MODES
from src.dataset.answer_format import MARK, render_prompt, stop_strings
from src.dataset.chat_template import ChatTemplate, Message
from src.dataset.conversation_content import THINK_END
from src.dataset.media_parts import OBJECT, check_no_object
from src.dataset.tokenizer import Tokenizer
from src.errors import UserError
from src.inference.answer_stream import CONTENT, AnswerPiece, AnswerStream
from src.inference.characters import CharacterStream
from src.inference.decoder import Decoder
from src.inference.generation import generate
from src.inference.media_prompt import encode_prompt, front_end_of, read_for, rows_of
from src.inference.sampling import SEED_LIMIT, Sampling
from src.inference.saved_chat import SavedChat, read_chat, write_chat
from src.model import State

# Tokens that consist of these don't increase the count of the frequency penalty, as in the `rwkv` package.
UNCOUNTED_CHARACTERS = " \t0123456789"


@dataclass
class Transcript:
    """The messages, the text (as bytes) that the state has processed, generated tokens that it has not, and the rows of
    the messages' media in their order."""

    messages: list[Message] = field(default_factory=list)
    processed: bytes = b""
    pending: list[int] = field(default_factory=list)
    media: list[Tensor] = field(default_factory=list)

    def copy(self) -> Transcript:
        return Transcript(list(self.messages), self.processed, list(self.pending), list(self.media))


class Conversation:
    """`ask(text)` streams an answer, `retry()` another one to the same question; `reset()`, `save(path)`, `load(path)`.

    An iterator that is closed early leaves the part of the answer that it yielded in the conversation. seed None: a
    random one. Special tokens in a message, such as `<|im_end|>`, are text like any other; parse_special: they are
    tokens, as in the template.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        sampling: Sampling,
        seed: int | None = None,
        max_new_tokens: int = 1024,
        parse_special: bool = False,
    ) -> None:
        self.decoder, self.tokenizer, self.template = decoder, tokenizer, template
        self.sampling, self.seed, self.max_new_tokens = sampling, seed, max_new_tokens
        self.answer_count = 0  # added to the seed, so that /retry gives another answer
        self.parse_special = parse_special
        self._stop_strings = () if template is None else stop_strings(template, tokenizer, parse_special)
        self._uncounted_ids = uncounted_ids(tokenizer)
        self.transcript = Transcript()
        self.attached: list[Tensor] = []  # rows of media that go with the next question
        # The last question, with the transcript and the state before it.
        self._undo: tuple[str, Transcript, State] | None = None
        # Text before a question, as bytes, and the state after it, for templates that change the answer before it.
        self._base: tuple[bytes, State] | None = None

    # ---- turns -----------------------------------------------------------------------------------------------

    def attach(self, kind: str, path: Path) -> None:
        """Put a picture or sound before the next question. Encoded once: afterwards the state holds it. Raises
        UserError where it can't be used."""
        if self.template is None:
            raise UserError("pictures and sounds need a chat template", given=path, advice="--chat_template")
        try:
            self.attached.append(rows_of(self.decoder.model, read_for(self.decoder.model, kind, path)))
        except UserError as error:  # of what is read, which doesn't know its name
            raise UserError(error.problem, given=path, advice=error.advice) from error

    def ask(self, text: str) -> Iterator[AnswerPiece]:
        """The answer to `text`, thought and content, in pieces of whole characters.

        Without a template it is the text that follows `text`, all of it content.
        """
        if front_end_of(self.decoder.model) is not None:
            check_no_object(text)
        before = self.transcript.copy()
        if self.attached:
            text = OBJECT * len(self.attached) + f"\n{text}"
            before.media += self.attached  # with the question: it may be asked again
            self.transcript.media += self.attached
            self.attached = []
        self._undo = (text, before, self.decoder.state)  # of constant size: a few MB
        return self._answer(text)

    def retry(self) -> Iterator[AnswerPiece]:
        """Another answer to the last question. Raises UserError when there is none."""
        if self._undo is None:
            raise UserError("nothing has been asked yet", given="/retry")
        self.undo()
        return self._answer(self._undo[0])

    def undo(self) -> None:
        """Return to before the last question, which may be asked again."""
        if self._undo is not None:
            _, transcript, state = self._undo
            self.transcript, self.decoder.state = transcript.copy(), state

    def reset(self) -> None:
        """Start a new conversation with the same settings."""
        self.decoder.reset()
        self.transcript, self._undo, self.attached = Transcript(), None, []

    def use(self, decoder: Decoder) -> None:
        """Start a new conversation with another decoder, of a model with the same tokenizer."""
        self.decoder = decoder
        self.transcript, self._undo, self._base, self.attached = Transcript(), None, None, []

    def _answer(self, text: str) -> Iterator[AnswerPiece]:
        try:
            embeds: Tensor | None = None
            if self.template is None:
                prompt, stream = self._prompt(text), None
            else:
                prompt, embeds, begun = self._prompt_of_turn(self.template, text)
                stream = AnswerStream(self._stop_strings, begun)
            tokens = generate(
                self.decoder,
                prompt,
                self.max_new_tokens + 1,  # never reached: the loop below ends first, with the last token unprocessed
                **dataclasses.asdict(self.sampling),
                seed=None if self.seed is None else self.seed + self.answer_count,
                stop_ids=self.tokenizer.eos_ids,
                uncounted_ids=self._uncounted_ids,
                embeds=embeds,
            )
        except BaseException:  # Ctrl-C during a long prompt, too
            self.undo()
            raise
        self.answer_count += 1
        # An answer ends at a stop id, or at the text that the template puts after an answer if the model writes it.
        characters = CharacterStream(self.tokenizer)
        generated: list[int] = []
        at_stop_id = False
        try:
            for token in tokens:
                if generated:  # `generate` has processed the previous token and not this one
                    self.transcript.processed += self.tokenizer.decode_bytes(generated[-1:])
                generated.append(token)
                yield from _pieces(stream, characters.feed(token))
                if (stream and stream.reached) or len(generated) == self.max_new_tokens:
                    break
            else:
                at_stop_id = True
            yield from _pieces(stream, characters.finish())
            yield from stream.finish() if stream else ()
        finally:  # also when the caller closes the iterator
            self._add_answer(stream.text if stream else "", generated, at_stop_id)

    def _add_answer(self, answer: str, generated: list[int], at_stop_id: bool) -> None:
        """Complete the transcript; `at_stop_id`: the model ended the answer, and all of `generated` was processed."""
        if self.template is not None:
            if at_stop_id and generated:
                self.transcript.processed += self.tokenizer.decode_bytes(generated[-1:])
            self.transcript.messages.append({"role": "assistant", "content": answer})
        else:
            # The stop token itself isn't processed; 0, the end of a document, starts a new one.
            self.transcript.pending = [0] if at_stop_id else generated[-1:]

    def _prompt(self, text: str) -> list[int]:
        # Without any text 0 is the prompt: the end of a document, after which a new one starts.
        encode = self.tokenizer.encode if self.parse_special else self.tokenizer.encode_as_text
        return self.transcript.pending + encode(text) or [0]

    def _prompt_of_turn(self, template: ChatTemplate, question: str) -> tuple[list[int], Tensor | None, str]:
        """The tokens of the conversation that the state hasn't processed, with the rows of their media, and what they
        hold of the answer.

        Adds the question to the transcript.
        """
        messages = [*self.transcript.messages, {"role": "user", "content": question}]
        text, literals, begun = render_prompt(template, self.tokenizer, messages, parse_special=self.parse_special)
        rendered = text.encode()
        end = len(self.transcript.processed)
        # An answer cut within a character ends with U+FFFD in its message, which may begin with the byte processed.
        within_character = end < len(rendered) and rendered[end] & 0xC0 == 0x80
        if not rendered.startswith(self.transcript.processed) or within_character:
            self._return_to_base(rendered)
            if any(THINK_END in message["content"] for message in messages[-2:-1]):
                self._process_base(template, messages, text, literals)
        begin = len(self.transcript.processed.decode())
        self.transcript.messages, self.transcript.processed = messages, rendered
        return *self._encode_part(text, literals, begin, len(text)), begun

    def _return_to_base(self, rendered: bytes) -> None:
        """Return to the state after a beginning of `rendered`."""
        if self._base is not None and rendered.startswith(self._base[0]):
            self.transcript.processed, self.decoder.state = self._base
        else:
            self.decoder.reset()
            self.transcript.processed = b""

    def _process_base(
        self, template: ChatTemplate, messages: list[Message], text: str, literals: Collection[int]
    ) -> None:
        """Process `text` up to the question: the next turn may leave out the thought of the answer to it, too."""
        other = [*messages[:-1], {"role": "user", "content": MARK}]
        history = render_prompt(template, self.tokenizer, other, parse_special=self.parse_special).text
        history = history.rpartition(MARK)[0].rstrip()  # a space belongs to the first token of the question
        done = self.transcript.processed.decode()
        if len(done) < len(history) and text.startswith(history):
            tokens, embeds = self._encode_part(text, literals, len(done), len(history))
            self.decoder.prefill([tokens], [embeds])
            self.transcript.processed = history.encode()
            self._base = self.transcript.processed, self.decoder.state

    def _encode_part(
        self, text: str, literals: Collection[int], begin: int, end: int
    ) -> tuple[list[int], Tensor | None]:
        """Tokens of a part of the conversation, and the rows of its media."""
        part, first = text[begin:end], text[:begin].count(OBJECT)
        rows = self.transcript.media[first : first + part.count(OBJECT)]
        return encode_prompt(self.tokenizer, part, rows, {i - begin for i in literals if begin <= i < end})

    # ---- files -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the conversation and the state after it. Raises UserError when the file can't be written."""
        transcript = self.transcript
        chat = SavedChat(
            transcript.messages, transcript.processed, transcript.pending, self.decoder.state, transcript.media
        )
        write_chat(path, chat, self.decoder.model)

    def load(self, path: str | Path) -> None:
        """Continue a saved conversation. Raises UserError when the file isn't one, or belongs to another model."""
        chat = read_chat(path, self.decoder.model)
        self.decoder.state = chat.state
        weight = self.decoder.model.emb.weight
        media = [rows.to(weight.device, weight.dtype) for rows in chat.media]
        self.transcript = Transcript(chat.messages, chat.processed, chat.pending, media)
        self.attached = []
        self._undo = None  # the file doesn't contain the state before its last question

    # ---- settings --------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """The names that `change` takes, with their values."""
        think = {} if self.template is None else {"think": self.template.think or None}
        return {**dataclasses.asdict(self.sampling), **think, "seed": self.seed, "length": self.max_new_tokens}

    def change(self, name: str, value: str) -> None:
        """Set one of `settings()` from text. Raises UserError for another name and for a value out of range."""
        if name == "seed":
            # Counted from here again, so that setting a seed twice gives the same answers twice.
            self.seed = None if value == "none" else _integer(name, value, at_least=0)
            self.answer_count = 0
        elif name == "think" and self.template is not None:
            self._change_think(self.template, value)
        elif name == "length":
            self.max_new_tokens = _integer(name, value, at_least=1)
        elif name == "top_k":
            self._change_sampling(name, value, _integer(name, value, at_least=0))
        elif name in self.settings():
            self._change_sampling(name, value, _number(name, value))
        else:
            raise UserError("no such setting", given=f"/set {name}", expected=f"one of {', '.join(self.settings())}")

    def _change_think(self, template: ChatTemplate, mode: str) -> None:
        if mode not in ("none", *THINK_MODES):
            raise UserError(given=f"/set think {mode}", expected=f"none, {', '.join(THINK_MODES)}")
        try:
            self.template = template.thinking("" if mode == "none" else mode)
        except UserError as error:  # of the flag; here it is a command
            raise UserError(error.problem, given=f"/set think {mode}", expected=error.expected) from error
        self._stop_strings = stop_strings(self.template, self.tokenizer, self.parse_special)

    def _change_sampling(self, name: str, text: str, value: float) -> None:
        try:
            self.sampling = replace(self.sampling, **{name: value})  # type: ignore[arg-type]
        except UserError as error:  # of the flag; here it is a command
            raise UserError(given=f"/set {name} {text}", expected=error.expected) from error


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(given=f"/set {name} {text}", expected=f"a number, for example /set {name} 0.5") from error


def _integer(name: str, text: str, at_least: int) -> int:
    if not text.isdecimal() or not at_least <= int(text) < SEED_LIMIT:
        raise UserError(given=f"/set {name} {text}", expected=f"an integer of at least {at_least}")
    return int(text)


def _pieces(stream: AnswerStream | None, text: str) -> list[AnswerPiece]:
    """The pieces of an answer; without a template (`stream` None) all text is content."""
    if stream is not None:
        return stream.feed(text)
    return [AnswerPiece(CONTENT, text)] if text else []


def uncounted_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids of tokens that consist of UNCOUNTED_CHARACTERS, as far as they are substrings of it."""
    # By encoding and not by searching the vocabulary, which not every tokenizer can list. It takes a millisecond.
    n = len(UNCOUNTED_CHARACTERS)
    encoded = (tokenizer.encode(UNCOUNTED_CHARACTERS[i:j]) for i in range(n) for j in range(i + 1, n + 1))
    return frozenset(ids[0] for ids in encoded if len(ids) == 1)

"""A conversation with a model: what has been said, and the state after it, so that no turn reads the past again.

What the model has read is kept as bytes. A turn renders the whole conversation by the chat template and feeds what comes after those bytes:
the end of the last answer, the new question, the header of the new answer. Only where a template rewrites the past (strips an
answer, drops a thought) is it read anew. Without a template the model continues text.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from src.dataset.chat_template import RWKV_TEMPLATE, ChatTemplate, Message
from src.dataset.tokenizer import Tokenizer
from src.errors import UserError
from src.files import atomic_write
from src.inference.characters import CharacterStream, UntilText
from src.inference.decoder import Decoder
from src.inference.generate import generate
from src.inference.sampling import Sampling
from src.model import LayerState, State

NOT_COUNTED = " \t0123456789"  # tokens of these don't add to the frequency penalty, as in the `rwkv` package
FORMAT = "rwkv7-conversation-1"


@dataclass
class Past:
    """What has been said and read. `fed` are the bytes that the state has read; `unfed` a last token that it has yet to read."""

    messages: list[Message] = field(default_factory=list)
    fed: bytes = b""
    unfed: list[int] = field(default_factory=list)


class Conversation:
    """`ask(text)` streams the answer; `retry()` another one to the same question; `reset()`, `save(path)`, `load(path)`.

    An answer whose iterator is dropped halfway counts as far as it went. seed None: other answers each time.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        sampling: Sampling,
        seed: int | None = None,
        max_new_tokens: int = 1024,
    ) -> None:
        self.decoder, self.tokenizer, self.template = decoder, tokenizer, template
        self.sampling, self.seed, self.max_new_tokens = sampling, seed, max_new_tokens
        self.answers = 0  # given so far: each draws with a seed of its own
        self._end = _end_of_answer(template)
        self._uncounted = _uncounted_ids(tokenizer)
        self.past = Past()
        self._before: tuple[str, Past, State] | None = None  # the last question, and where it was asked

    # ---- turns --------------------------------------------------------------------------------------------------------------

    def ask(self, text: str) -> Iterator[str]:
        """The answer to `text` (or the text after it), in pieces of whole characters."""
        self._before = (text, _copy(self.past), self.decoder.state)
        return self._answer(text)

    def retry(self) -> Iterator[str]:
        """Another answer to the last question. ValueError when nothing has been asked."""
        if self._before is None:
            raise UserError("/retry: nothing has been asked yet")
        self.undo()
        return self._answer(self._before[0])

    def undo(self) -> None:
        """Back to before the last question."""
        if self._before is not None:
            _, past, state = self._before
            self.past, self.decoder.state = _copy(past), state

    def reset(self) -> None:
        self.decoder.reset()
        self.past, self._before = Past(), None

    def _answer(self, text: str) -> Iterator[str]:
        try:
            prompt = self._read(text) if self.template is None else self._read_turn(self.template, text)
            tokens = generate(
                self.decoder,
                prompt,
                self.max_new_tokens + 1,  # never reached: the last token has always yet to be fed
                **dataclasses.asdict(self.sampling),
                seed=None if self.seed is None else self.seed + self.answers,
                stop_ids=self.tokenizer.eos_ids,
                uncounted_ids=self._uncounted,
            )
        except BaseException:
            self.undo()
            raise
        self.answers += 1
        characters, until = CharacterStream(self.tokenizer), UntilText(self._end)
        written: list[int] = []
        answer = ""
        ended = False
        try:
            for token in tokens:
                if written:
                    self.past.fed += self.tokenizer.decode_bytes(written[-1:])
                written.append(token)
                piece = until.feed(characters.feed(token))
                answer += piece
                if piece:
                    yield piece
                if until.reached or len(written) == self.max_new_tokens:
                    break
            else:
                ended = True
            rest = until.feed(characters.finish()) + until.finish()
            answer += rest
            if rest:
                yield rest
        finally:  # also when the listener has had enough
            self._remember(answer, written, ended)

    def _remember(self, answer: str, written: list[int], ended: bool) -> None:
        if self.template is not None:
            if ended and written:
                self.past.fed += self.tokenizer.decode_bytes(written[-1:])
            self.past.messages.append({"role": "assistant", "content": answer})
        else:
            self.past.unfed = [0] if ended else written[-1:]  # after the end of a document a new one begins

    def _read(self, text: str) -> list[int]:
        return self.past.unfed + self.tokenizer.encode(text) or [0]

    def _read_turn(self, template: ChatTemplate, text: str) -> list[int]:
        messages = [*self.past.messages, {"role": "user", "content": text}]
        whole = template.render(messages, add_generation_prompt=True).encode()
        at = len(self.past.fed)
        within_character = at < len(whole) and whole[at] & 0xC0 == 0x80  # an answer was cut there, and is U+FFFD now
        if not whole.startswith(self.past.fed) or within_character:
            self.decoder.reset()
            self.past.fed = b""
        rest = whole[len(self.past.fed) :].decode()
        self.past.messages, self.past.fed = messages, whole
        return self.tokenizer.encode(rest)

    # ---- files --------------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """The conversation and the state after it. ValueError when the file can't be written."""
        layers = [tuple(tensor.cpu() for tensor in layer) for layer in self.decoder.state.layers]
        record = {
            "format": FORMAT,
            "model": self._model_sizes(),
            "weights": self._weights_hash(),
            "messages": self.past.messages,
            "fed": self.past.fed.decode(
                "latin-1"
            ),  # bytes as characters: plain types only, so that loading runs no code
            "unfed": self.past.unfed,
            "layers": layers,
        }
        try:
            with atomic_write(path) as file:
                torch.save(record, file)
        except OSError as error:
            raise UserError(
                f"/save {path}: can't be written ({error.strerror}); name a file in a folder that can be"
            ) from error

    def load(self, path: str | Path) -> None:
        """Go on where a saved conversation ended. ValueError when the file is not one, or is another model's."""
        try:
            record = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise UserError(f"/load {path}: can't be read ({error.strerror})") from error
        except (
            Exception
        ) as error:  # torch raises half a dozen types here; all mean that it is none of its files, or a damaged one
            raise UserError(
                f"/load {path}: no saved conversation, or cut short; expected a file written by /save"
            ) from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise UserError(f"/load {path}: no saved conversation; expected a file written by /save")
        if record["model"] != self._model_sizes():
            raise UserError(
                f"/load {path}: saved with a model of other sizes ({record['model']}, here {self._model_sizes()})"
            )
        if record.get("weights", here := self._weights_hash()) != here:  # older files don't say
            raise UserError(
                f"/load {path}: saved with other weights (or one of the two is in fp16), whose state means nothing to these; load it with its own model and --dtype"
            )
        self.decoder.state = State([LayerState(*layer) for layer in record["layers"]])
        self.past = Past(record["messages"], record["fed"].encode("latin-1"), record["unfed"])
        self._before = None

    def _model_sizes(self) -> dict[str, int]:
        config = self.decoder.config
        return {name: getattr(config, name) for name in ("n_layer", "n_embd", "head_size", "vocab_size")}

    def _weights_hash(self) -> str:
        """Tells models of equal sizes apart, fine-tuned ones too; in bf16, the same for a model that is loaded in fp32 or bf16."""
        model = self.decoder.model
        some = (model.emb.weight[:64], model.head.weight[:64])
        return hashlib.sha256(
            b"".join(t.bfloat16().view(torch.int16).cpu().numpy().tobytes() for t in some)
        ).hexdigest()[:16]

    # ---- settings -----------------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.sampling), "seed": self.seed, "length": self.max_new_tokens}

    def change(self, name: str, value: str) -> None:
        """Set one of `settings()`. ValueError that names it when there is none of that name or the value doesn't do."""
        if name == "seed":
            self.seed, self.answers = (None if value == "none" else _whole(name, value, at_least=0)), 0
        elif name == "length":
            self.max_new_tokens = _whole(name, value, at_least=1)
        elif name == "top_k":
            self.sampling = replace(self.sampling, top_k=_whole(name, value, at_least=0))
        elif name in self.settings():
            self.sampling = replace(self.sampling, **{name: _number(name, value)})  # type: ignore[arg-type]
        else:
            raise UserError(f"/set {name}: no such setting; there are {', '.join(self.settings())}")


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise UserError(f"/set {name} {value}: expected a number, for example /set {name} 0.5") from error


def _whole(name: str, value: str, at_least: int) -> int:
    if not value.isdecimal() or not at_least <= int(value) < 2**63:
        raise UserError(f"/set {name} {value}: expected a whole number of at least {at_least}")
    return int(value)


def find_template(name: str, tokenizer: Tokenizer, pretrained_only: bool = False) -> ChatTemplate | None:
    """The template that --chat_template names: "none", "tokenizer" (its own), "rwkv", or a file; "" is the tokenizer's own, but none for
    a model that is known to have seen plain text only. None: the model continues text. ValueError when there is no such template."""
    if name == "none" or (not name and pretrained_only):
        return None
    if not name:
        return tokenizer.chat_template
    if name == "tokenizer":
        if tokenizer.chat_template is None:
            raise UserError(
                f"--chat_template tokenizer: the tokenizer {tokenizer.name} has none; expected none, rwkv or a Jinja file"
            )
        return tokenizer.chat_template
    if name == "rwkv":
        return ChatTemplate(RWKV_TEMPLATE, {})
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"--chat_template {name}: no such file; expected none, tokenizer, rwkv, or a file with a Jinja template"
        )
    try:
        return ChatTemplate(path.read_text(encoding="utf-8"), tokenizer.specials)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat_template {name}: can't be read as UTF-8 text ({error})") from error


def _end_of_answer(template: ChatTemplate | None) -> str:
    """What the template writes right after an answer, without newlines unless it is nothing else; "" when it writes nothing."""
    if template is None:
        return ""
    mark = "the answer stands here"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    after = template.render(turns).partition(mark)[2]
    return after.rstrip("\n") or after


def _uncounted_ids(tokenizer: Tokenizer) -> frozenset[int]:
    n = len(NOT_COUNTED)
    encoded = (tokenizer.encode(NOT_COUNTED[i:j]) for i in range(n) for j in range(i + 1, n + 1))
    return frozenset(ids[0] for ids in encoded if len(ids) == 1)


def _copy(past: Past) -> Past:
    return Past(list(past.messages), past.fed, list(past.unfed))

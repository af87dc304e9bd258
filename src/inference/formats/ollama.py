"""A folder for `ollama create`: the model as GGUF, and a Modelfile with the chat template in Go's language.

A Jinja template can't be translated in general. Nearly all are sequences of turns, which is what rendering a few
conversations shows: a text before and after the content of each role. Templates that aren't are refused.

Sources: Ollama's docs/modelfile.md and docs/template.md, parser/parser.go (quotation of values).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from src.dataset.chat_template import ChatTemplate, Message
from src.errors import UserError
from src.files import atomic_write
from src.inference.formats.format import Export
from src.inference.formats.gguf import gguf_weights, write_gguf
from src.inference.formats.lazy import LazyWeights
from src.inference.sampling import Sampling

MODEL, MODELFILE = "model.gguf", "Modelfile"
_CONTENTS = ("\ue000", "\ue001", "\ue002", "\ue003")  # private use characters, which no template changes or contains


@dataclass(frozen=True)
class Turns:
    """A chat template as a sequence of turns: (text before, text after) the content of each role.

    opening   text instead of a system turn, where a conversation has none
    answer    text that asks for an answer, at the end
    """

    around: dict[str, tuple[str, str]]
    opening: str
    answer: str

    def render(self, messages: list[Message]) -> str:
        text = "" if messages[0]["role"] == "system" else self.opening
        for message in messages:
            before, after = self.around[message["role"]]
            text += before + message["content"] + after
        return text + self.answer


def _messages(*turns: tuple[str, str]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in turns]


def turns_of(template: ChatTemplate) -> Turns:
    """The turns of a chat template. Raises UserError, its `problem` a clause, where it is no sequence of turns."""
    a, b, c, d = _CONTENTS
    dialogue = (("user", b), ("assistant", c), ("user", d))
    parts = re.split("|".join(_CONTENTS), template.render(_messages(("system", a), *dialogue)))
    without_system = template.render(_messages(*dialogue)).split(b)[0]
    if len(parts) != 5:
        raise UserError("it doesn't copy the contents of the messages")
    before_system, system_user, user_assistant, assistant_user, after_user = parts
    before_user = _before_user(template, after_user, (system_user, assistant_user, without_system))
    turns = Turns(
        {
            "system": (before_system, system_user.removesuffix(before_user)),
            "user": (before_user, after_user),
            "assistant": (user_assistant.removeprefix(after_user), assistant_user.removesuffix(before_user)),
        },
        without_system.removesuffix(before_user),
        template.render(_messages(("user", b)), add_generation_prompt=True).rpartition(b)[2].removeprefix(after_user),
    )
    for messages in (_messages(("user", b)), _messages(*dialogue), _messages(("system", a), *dialogue)):
        if turns.render(messages) != template.render(messages, add_generation_prompt=True):
            raise UserError("it is more than a sequence of turns")
    return turns


def _before_user(template: ChatTemplate, after_user: str, texts: tuple[str, ...]) -> str:
    """The text before the content of a user's turn, with which all of `texts` end."""
    a, b, *_ = _CONTENTS
    try:  # between two turns of the user stand what follows one and what precedes the other
        between = template.render(_messages(("user", a), ("user", b))).split(a)[-1].split(b)[0]
        if between.startswith(after_user) and all(text.endswith(between.removeprefix(after_user)) for text in texts):
            return between.removeprefix(after_user)
    except UserError:  # a template that wants turns to alternate
        pass
    shortest = min(texts, key=len)
    ends = (shortest[begin:] for begin in range(len(shortest)))
    return next((end for end in ends if all(text.endswith(end) for text in texts)), "")


def go_template(turns: Turns) -> str:
    """The same in Go's template language, with Ollama's variables."""
    cases = [
        f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}' for role, (before, after) in turns.around.items()
    ]
    loop = "{{ range .Messages }}{{ " + "{{ else ".join(cases) + "{{ end }}{{ end }}"
    opening = f"{{{{ if not .System }}}}{turns.opening}{{{{ end }}}}" if turns.opening else ""
    return opening + loop + turns.answer


def modelfile(export: Export) -> str:
    """The content of a Modelfile. Raises UserError for a chat template that can't be translated."""
    assert export.tokenizer is not None
    template, stops = "{{ .Prompt }}", []
    if (jinja := export.tokenizer.chat_template) is not None:
        try:
            turns = turns_of(jinja)
            texts = [turns.opening, turns.answer, *(text for pair in turns.around.values() for text in pair)]
            if any("{{" in text or '"""' in text for text in texts):
                raise UserError("it has braces or quotation marks that can't be quoted")
        except UserError as error:
            raise UserError(
                f"the chat template can't be translated for Ollama: {error.problem}",
                flag="tokenizer",
                given=export.tokenizer.name,
                advice="use --format gguf, and write a Modelfile by hand",
            ) from error
        template = go_template(turns)
        # What ends an answer, and what begins the next turn where a model goes on.
        after, before = turns.around["assistant"][1], turns.around["user"][0]
        stops = list(dict.fromkeys(text for text in (after.strip() or after, before.strip()) if text))
    sampling = Sampling()
    lines = [
        f"FROM ./{MODEL}",
        f"TEMPLATE {_quoted(template)}",
        *(f"PARAMETER stop {_quoted(text)}" for text in stops),
        f"PARAMETER temperature {sampling.temperature:g}",
        f"PARAMETER top_p {sampling.top_p:g}",
        "PARAMETER repeat_penalty 1",  # off: Ollama's default is 1.1
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    # No escapes exist: between the quotation marks stands the text itself, line feeds included.
    return f'"""{text}"""'


def write_ollama(export: Export, folder: Path) -> None:
    """Write MODEL and MODELFILE. Raises UserError as `write_gguf` and `modelfile`, and OSError."""
    content = modelfile(export)  # first: it may raise
    folder.mkdir(parents=True, exist_ok=True)
    write_gguf(export, folder / MODEL)
    with atomic_write(folder / MODELFILE, "w") as file:
        file.write(content)


def read_ollama(folder: Path) -> LazyWeights:
    """The weights in a folder, as `gguf_weights` reads them."""
    return gguf_weights(folder / MODEL)


def create_command(title: str, folder: Path) -> str:
    """The command that makes the model in `folder` known to Ollama, under a name that it allows."""
    name = re.sub(r"[^a-z0-9._-]+", "-", title.lower()).strip("-._") or "rwkv7"
    return f"ollama create {name} -f {folder / MODELFILE}"

"""The folder for Ollama: its Modelfile by the documented grammar, and the chat template in Go's language.

No Ollama is run: `parse_modelfile` follows docs/modelfile.md and `render_go` the part of text/template that is used.
"""

import re

import pytest
import torch
from chat_models import CHATML, TEMPLATES, make_tokenizer
from random_model import random_model
from test_gguf import VOCAB_SIZE, pth_of, same

from src.dataset.chat_template import RWKV_TEMPLATE, ChatTemplate
from src.dataset.tokenizer import load_tokenizer
from src.errors import UserError
from src.inference.export import main
from src.inference.formats.format import Export
from src.inference.formats.ollama import go_template, modelfile, turns_of

INSTRUCTIONS = {"from", "template", "system", "adapter", "license", "message", "requires"}
# The parameters of docs/modelfile.md that the export writes, with the type of their value.
PARAMETERS = {"stop": str, "temperature": float, "top_p": float, "repeat_penalty": float}


def parse_modelfile(text):
    """(instruction, value) pairs: `INSTRUCTION value` a line, # comments, values in quotation marks over lines."""
    commands, parameters, at = [], [], 0
    value = r'("""[\s\S]*?"""|"[^"]*"|[^\n]*)(?:\n|$)'
    pattern = re.compile(rf"[ \t\r\n]*(?:#[^\n]*\n|(?i:(parameter)[ \t]+(\w+)|([A-Z]+))[ \t]+{value})")
    while text[at:].strip():
        match = pattern.match(text, at)
        assert match, text[at:]
        at = match.end()
        if match[1]:
            parameters.append((match[2], PARAMETERS[match[2]](unquoted(match[4]))))
        elif match[3]:
            assert match[3].lower() in INSTRUCTIONS
            commands.append((match[3].lower(), unquoted(match[4])))
    assert [name for name, _ in commands].count("from") == 1
    return dict(commands), parameters


def unquoted(value):
    for mark in ('"""', '"'):
        if value.startswith(mark):
            assert value.endswith(mark)
            assert len(value) >= 2 * len(mark)
            return value[len(mark) : -len(mark)]
    return value.strip()


def render_go(template, messages):
    """The actions range .Messages, if eq .Role "x", else if, if not .System, end, .Content."""
    tokens = re.split(r"\{\{ (.*?) \}\}", template)  # text, action, text, ...
    system = next((m["content"] for m in messages if m["role"] == "system"), "")

    def block(at, message, active):
        """The text from `at` to the matching end or else, and its position."""
        out = ""
        while True:
            if at % 2 == 0:
                out += tokens[at] if active else ""
                at += 1
                if at == len(tokens):
                    return out, at
                continue
            action = tokens[at]
            if action.startswith(("end", "else")):
                return out, at
            if action == ".Content":
                out += message["content"] if active else ""
                at += 1
            elif action == "range .Messages":
                begin = at + 1
                for each in messages:
                    part, at = block(begin, each, active)
                    out += part
                assert tokens[at] == "end"
                at += 1
            else:
                done, text = False, action
                while text.startswith("if"):
                    if text == "if not .System":
                        holds = not system
                    else:
                        holds = message["role"] == re.fullmatch(r'if eq \.Role "(\w+)"', text)[1]
                    part, at = block(at + 1, message, active and holds and not done)
                    out, done = out + part, done or holds
                    text = tokens[at].removeprefix("else ")
                assert tokens[at] == "end"
                at += 1

    text, at = block(0, None, True)
    assert at == len(tokens)
    return text


CONVERSATIONS = [
    [("user", "the question")],
    [("system", "Be brief."), ("user", "q"), ("assistant", "a"), ("user", "你好")],
    [("user", "q"), ("assistant", "a <b> & 'c'"), ("user", "and?"), ("assistant", "b"), ("user", "x")],
]


def messages_of(turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize("source", [*TEMPLATES.values(), RWKV_TEMPLATE], ids=[*TEMPLATES, "world"])
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_the_go_template_writes_what_the_jinja_template_does(source, turns):
    template, messages = ChatTemplate(source, {}), messages_of(turns)
    expected = template.render(messages, add_generation_prompt=True)
    assert render_go(go_template(turns_of(template)), messages) == expected


def test_a_stop_text_ends_an_answer():
    turns = turns_of(ChatTemplate(CHATML, {}))
    assert turns.around["assistant"] == ("<|im_start|>assistant\n", "<|im_end|>\n")


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
        "{% for m in messages[-1:] %}{{ m.content }}{% endfor %}",
        "nothing",
    ],
)
def test_a_template_that_is_no_sequence_of_turns_is_refused(source):
    with pytest.raises(UserError):
        turns_of(ChatTemplate(source, {}))


@pytest.mark.parametrize("out", ["model", "sub/My Model"])
def test_the_folder_is_complete(tmp_path, capsys, out):
    model = random_model(n_layer=1, vocab_size=VOCAB_SIZE)
    torch.save(model.state_dict(), tmp_path / "rwkv-final.pth")
    make_tokenizer(tmp_path / "tokenizer")
    folder = tmp_path / out
    assert main([str(tmp_path / "rwkv-final.pth"), str(folder), "--format", "ollama", "--type", "f32"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["Modelfile", "model.gguf"]
    commands, parameters = parse_modelfile((folder / "Modelfile").read_text())
    assert (folder / commands["from"]).samefile(folder / "model.gguf")
    same(pth_of(folder / commands["from"]), model.state_dict())
    stops = [value for name, value in parameters if name == "stop"]
    assert stops == ["<|im_end|>", "<|im_start|>user"]
    messages = messages_of(CONVERSATIONS[1])
    assert render_go(commands["template"], messages) == ChatTemplate(CHATML, {}).render(messages, True)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.fullmatch(rf"ollama create [a-z0-9._-]+ -f {re.escape(str(folder / 'Modelfile'))}", last)


def test_world_stops_at_an_empty_line():
    content = modelfile(Export({}, random_model().config, "x", load_tokenizer("world")))
    commands, parameters = parse_modelfile("# made for a test\n" + content)
    assert [value for name, value in parameters if name == "stop"] == ["\n\n", "User:"]
    assert commands["template"].endswith("Assistant:")


def test_a_template_that_can_not_be_translated_writes_nothing(tmp_path, capsys):
    torch.save(random_model(n_layer=1, vocab_size=VOCAB_SIZE).state_dict(), tmp_path / "rwkv-final.pth")
    make_tokenizer(tmp_path / "tokenizer", "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "rwkv-final.pth"), str(tmp_path / "out"), "--format", "ollama"])
    assert stopped.value.code == 2
    assert "can't be translated for Ollama" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

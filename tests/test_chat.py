"""Chat: the state never reads the past again and is always that of the whole conversation; the program in a terminal and in a pipe."""

import copy
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from chat_models import TEMPLATES, make_tokenizer
from random_model import random_model

from src.dataset.chat_template import ChatTemplate
from src.dataset.tokenizer import load_tokenizer
from src.inference.chat import RWKV_TEMPLATE, Conversation, find_template
from src.inference.decoder import Decoder
from src.inference.load import pretrained_only
from src.inference.sampling import Sampling

READY = "<the program waits for a line>"
PROGRAM = Path(__file__).parents[1] / "API_DEMO_CHAT.py"
MODEL = {"n_layer": 2, "n_embd": 64, "vocab_size": 400}


class Watched(Decoder):
    """A decoder that keeps what it has read."""

    def __init__(self, model):
        super().__init__(model)
        self.read = []
        self.at_once = []

    def prefill(self, prompts):
        self.read += prompts[0]
        self.at_once.append(len(prompts[0]))
        return super().prefill(prompts)

    def step(self, tokens):
        self.read += tokens
        return super().step(tokens)

    def reset(self):
        self.read = []
        super().reset()


@pytest.fixture(scope="module")
def model():
    return random_model(**MODEL)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {name: make_tokenizer(tmp_path_factory.mktemp(name), template) for name, template in TEMPLATES.items()}
    return made | {"none": make_tokenizer(tmp_path_factory.mktemp("none"), None)}


def conversation(model, folder, length=12, seed=1, **sampling):
    tokenizer = load_tokenizer(folder)
    sampling = Sampling(**({"top_p": 1.0} | sampling))
    return Conversation(Watched(model), tokenizer, tokenizer.chat_template, sampling, seed, length)


# ---- the state is that of the conversation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_was_read_is_the_rendered_conversation_once(model, folders, template):
    talk = conversation(model, folders[template])
    questions = ["what is it?", "the answer\nin two lines", "and the list"]
    for turn, question in enumerate(questions):
        answer = "".join(talk.ask(question))
        assert talk.past.messages[2 * turn :] == [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        asked = talk.tokenizer.chat_template.render(talk.past.messages[:-1], add_generation_prompt=True)
        read = talk.tokenizer.decode_bytes(talk.decoder.read)
        assert read.startswith(asked.encode())
        assert read == talk.past.fed
    whole = talk.tokenizer.chat_template.render(talk.past.messages)
    if "\ufffd" not in whole:
        assert whole.encode().startswith(talk.past.fed)
        assert len(talk.decoder.at_once) == 3
        assert max(talk.decoder.at_once[1:]) < len(talk.tokenizer.encode(whole)) / 2, "a turn reads its own part only"


def test_the_state_equals_reading_everything_afresh(model, folders):
    talk = conversation(model, folders["chatml"])
    for question in ("what", "is it"):
        list(talk.ask(question))
    afresh = Decoder(model)
    afresh.prefill([talk.decoder.read])
    for mine, theirs in zip(talk.decoder.state.layers, afresh.state.layers, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_an_answer_that_the_listener_drops_counts_as_far_as_it_went(model, folders):
    talk = conversation(model, folders["chatml"], length=200)
    answer = talk.ask("what is it?")
    heard = "".join(next(answer) for _ in range(3))
    answer.close()
    assert talk.past.messages[-1]["content"] == heard
    list(talk.ask("and"))
    if "\ufffd" not in heard:
        rendered = talk.tokenizer.chat_template.render(talk.past.messages[:-1], add_generation_prompt=True)
        assert talk.tokenizer.decode_bytes(talk.decoder.read).startswith(rendered.encode())


def test_an_answer_that_was_cut_within_a_character_does_not_end_the_conversation(model, folders):
    """Its last character is U+FFFD in the conversation; what was fed ends with a byte that U+FFFD begins with, too."""
    talk = conversation(model, folders["chatml"])
    list(talk.ask("what is it?"))
    talk.past.messages[-1]["content"] = "so\ufffd"
    rendered = talk.tokenizer.chat_template.render(talk.past.messages)
    talk.past.fed = rendered[: rendered.index("\ufffd")].encode() + "\uff0c".encode()[:1]
    list(talk.ask("and"))
    asked = talk.tokenizer.chat_template.render(talk.past.messages[:-1], add_generation_prompt=True)
    assert talk.tokenizer.decode_bytes(talk.decoder.read).startswith(asked.encode())


def test_a_template_that_rewrites_the_past_has_it_read_anew(model, folders):
    strips = ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content[:4] }}{% endfor %}[answer]", {})
    tokenizer = load_tokenizer(folders["none"])
    talk = Conversation(Watched(model), tokenizer, strips, Sampling(top_p=1.0), 1, 12)
    list(talk.ask("what is it?"))
    list(talk.ask("a list"))
    rendered = strips.render(talk.past.messages[:-1])
    assert tokenizer.decode_bytes(talk.decoder.read).startswith(rendered.encode())


def test_without_a_template_the_text_goes_on(model, folders):
    talk = conversation(model, folders["none"], temperature=0)
    first = "".join(talk.ask("def "))
    more = "".join(talk.ask(""))
    longer = conversation(model, folders["none"], length=24, temperature=0)
    assert "".join(longer.ask("def ")) == first + more


def test_retry_reset_and_seeds(model, folders):
    talk = conversation(model, folders["chatml"])
    with pytest.raises(ValueError, match="nothing has been asked"):
        talk.retry()
    first = "".join(talk.ask("what is it?"))
    second = "".join(talk.retry())
    assert first != second
    assert len(talk.past.messages) == 2
    talk.reset()
    talk.change("seed", "1")
    assert "".join(talk.ask("what is it?")) == first
    greedy = conversation(model, folders["chatml"], temperature=0)
    answer = "".join(greedy.ask("what"))
    assert "".join(greedy.retry()) == answer


def test_a_saved_conversation_goes_on_as_if_it_had_not_been_interrupted(model, folders, tmp_path):
    talk = conversation(model, folders["chatml"], temperature=0)
    list(talk.ask("what is it?"))
    talk.save(tmp_path / "talk.state")
    on = "".join(talk.ask("and the list"))
    other = conversation(model, folders["chatml"], temperature=0)
    other.load(tmp_path / "talk.state")
    assert "".join(other.ask("and the list")) == on
    assert other.past == talk.past
    larger = conversation(random_model(**(MODEL | {"n_layer": 3})), folders["chatml"])
    with pytest.raises(ValueError, match="other sizes"):
        larger.load(tmp_path / "talk.state")
    torch.save({"a": torch.zeros(1)}, tmp_path / "foreign")
    (tmp_path / "text").write_text("hello")
    for name in ("foreign", "text", "missing"):
        with pytest.raises(ValueError, match=f"/load .*{name}"):
            other.load(tmp_path / name)
    with pytest.raises(ValueError, match=r"/save .*nowhere/talk: can't be written \(No such file or directory\)"):
        other.save(tmp_path / "nowhere" / "talk")


def test_a_conversation_goes_on_with_its_own_weights_only(model, folders, tmp_path):
    talk = conversation(model, folders["chatml"])
    list(talk.ask("what is it?"))
    talk.save(tmp_path / "talk.state")
    tuned = copy.deepcopy(model)
    tuned.head.weight[5] += 0.1
    other = conversation(tuned, folders["chatml"])
    with pytest.raises(ValueError, match=r"/load .*talk\.state: saved with other weights"):
        other.load(tmp_path / "talk.state")
    assert other.past.messages == []
    conversation(copy.deepcopy(model).bfloat16(), folders["chatml"]).load(tmp_path / "talk.state")
    record = torch.load(tmp_path / "talk.state")
    del record["weights"]
    torch.save(record, tmp_path / "old.state")
    other.load(tmp_path / "old.state")
    assert other.past == talk.past


def test_an_answer_ends_where_the_template_ends_it(model, folders):
    """Without an end token, at the text that follows an answer; what was written of it is not shown."""
    tokenizer = load_tokenizer(folders["none"])
    talk = Conversation(Watched(model), tokenizer, ChatTemplate(RWKV_TEMPLATE, {}), Sampling(temperature=0), 1, 12)
    blank = tokenizer.encode("\n")
    assert len(blank) == 1
    script = [*tokenizer.encode(" the answer"), *blank, *blank, *tokenizer.encode("User: never")]

    def scripted(logits):
        token = script[len(talk.decoder.read) - talk.decoder.at_once[-1]]
        return torch.nn.functional.one_hot(torch.tensor([token]), logits.shape[1]).float()

    inner_prefill, inner_step = talk.decoder.prefill, talk.decoder.step
    talk.decoder.prefill = lambda prompts: scripted(inner_prefill(prompts))
    talk.decoder.step = lambda tokens: scripted(inner_step(tokens))
    pieces = list(talk.ask("what"))
    assert "".join(pieces) == " the answer"
    assert talk.past.messages[-1]["content"] == " the answer"
    rendered = talk.template.render(
        [*talk.past.messages, {"role": "user", "content": "more"}], add_generation_prompt=True
    )
    assert rendered == "User: what\n\nAssistant: the answer\n\nUser: more\n\nAssistant:"
    assert rendered.encode().startswith(talk.past.fed)


def test_templates_are_found_by_name(folders, tmp_path):
    tokenizer = load_tokenizer(folders["chatml"])
    assert find_template("", tokenizer) is tokenizer.chat_template
    assert find_template("none", tokenizer) is None
    assert find_template("rwkv", tokenizer).source == RWKV_TEMPLATE
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    assert find_template(str(tmp_path / "mine.jinja"), tokenizer).render([{"role": "user", "content": "x"}]) == "x"
    (tmp_path / "special.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    assert (
        find_template(str(tmp_path / "special.jinja"), tokenizer).render([{"role": "user", "content": "x"}])
        == "x<|im_end|>"
    )
    (tmp_path / "latin.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"--chat_template .*latin\.jinja: can't be read as UTF-8"):
        find_template(str(tmp_path / "latin.jinja"), tokenizer)
    with pytest.raises(ValueError, match="--chat_template nowhere"):
        find_template("nowhere", tokenizer)
    assert find_template("tokenizer", tokenizer) is tokenizer.chat_template
    with pytest.raises(ValueError, match=r"--chat_template tokenizer: .* has none"):
        find_template("tokenizer", load_tokenizer(folders["none"]))


def test_a_model_that_was_only_pretrained_continues_text(folders, tmp_path):
    """Its tokenizer may have a chat template all the same."""
    tokenizer = load_tokenizer(folders["chatml"])
    for kind, chats in (("binidx", False), ("sft", True)):
        (tmp_path / "run.json").write_text(json.dumps({"settings": {"data_type": kind}}))
        template = find_template("", tokenizer, pretrained_only(tmp_path / "rwkv-final.pth"))
        assert (template is not None) == chats
    assert not pretrained_only(tmp_path / "elsewhere" / "rwkv-final.pth")
    assert find_template("tokenizer", tokenizer, pretrained_only=True) is tokenizer.chat_template


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", "hot", "/set temperature hot: expected a number"),
        ("temperature", "-1", "expected 0"),
        ("top_k", "1.5", "/set top_k 1.5"),
        ("length", "0", "/set length 0"),
        ("seed", "-3", "/set seed -3"),
        ("size", "3", "no such setting"),
    ],
)
def test_wrong_settings_are_explained_and_change_nothing(model, folders, name, value, words):
    talk = conversation(model, folders["chatml"])
    before = talk.settings()
    with pytest.raises(ValueError, match=re.escape(words)):
        talk.change(name, value)
    assert talk.settings() == before


# ---- the program ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "run"
    make_tokenizer(folder / "tokenizer")
    torch.save(model.state_dict(), folder / "rwkv-final.pth")
    return folder


def command(run, *flags):
    return [sys.executable, str(PROGRAM), str(run), "--device", "cpu", "--seed", "1", "--length", "12", *flags]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "PYTHONUTF8": "1"}


def test_one_prompt_and_piped_turns(run, tmp_path):
    def called(*flags, text=""):
        done = subprocess.run(
            command(run, *flags),
            input=text,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    code, answer, _ = called("--prompt", "what is it?")
    assert code == 0
    assert answer.strip("\n")
    script = (
        f"what is it?\n/save {tmp_path}/talk\n/bogus\n/set top_k 1\nand\n/load {tmp_path}/talk\nand\n/exit\nnever\n"
    )
    code, said, faults = called(text=script)
    first, after = said.split(f"saved to {tmp_path}/talk\n")
    assert first == answer
    greedy, again = after.partition("seed 1, length 12\n")[2].split(f"loaded {tmp_path}/talk\n")
    assert greedy == again
    assert "never" not in said
    assert "/bogus: no such command" in faults
    assert code == 1, "a command that failed shows in the exit code of a script"


def test_a_line_that_is_no_text_is_said_and_left_out(run):
    def called(lines):
        strict = environment() | {"PYTHONIOENCODING": "utf-8:strict"}
        done = subprocess.run(command(run), input=lines, env=strict, capture_output=True, timeout=100, check=False)
        return done.returncode, done.stdout, done.stderr

    code, said, faults = called(b"what is it?\ncaf\xe9\nand the list\n")
    assert (0, said, b"") == called(b"what is it?\nand the list\n")
    assert code == 1
    assert faults == b"a line of the input is left out: it is no utf-8 text from its byte 4 on\n"


@pytest.mark.parametrize("program", [[str(PROGRAM)], ["-m", "src.inference.generate"]], ids=["chat", "generate"])
def test_a_reader_that_has_enough_ends_it_without_a_word(run, program):
    arguments = [
        sys.executable,
        *program,
        str(run),
        "--device",
        "cpu",
        "--prompt",
        "def ",
        "--length",
        "100000",
        "--seed",
        "1",
    ]
    with subprocess.Popen(
        arguments, cwd=PROGRAM.parent, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as writing:
        assert writing.stdout.read(3)
        writing.stdout.close()
        assert writing.stderr.read() == b""
    assert writing.returncode == -signal.SIGPIPE


class Terminal:
    """The program in a pseudo-terminal."""

    def __init__(self, arguments, folder):
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execve(arguments[0], arguments, environment())
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
        self.text = ""

    def wait(self, pattern, seconds=100):
        """Read until `pattern` shows up after what was read before; what was read up to its end."""
        limit = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            ready, _, _ = select.select([self.file], [], [], max(0.0, limit - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.text!r}"
            data = os.read(self.file, 65536)
            if b"\x1b[6n" in data:  # the program asks where the cursor is
                os.write(self.file, b"\x1b[24;1R")
            data = data.replace(b"\x1b[?2004h", READY.encode())  # pasting is made possible whenever a line can be typed
            self.text += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data.decode("utf-8", errors="replace"))
        before, self.text = self.text[: found.end()], self.text[found.end() :]
        return before

    def type(self, keys):
        os.write(self.file, keys.encode())

    def end(self):
        """The exit code."""
        try:
            while os.read(self.file, 65536):
                pass
        except OSError:  # the other end is closed
            pass
        _, status = os.waitpid(self.pid, 0)
        os.close(self.file)
        return os.waitstatus_to_exitcode(status)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        self.end()


def test_a_talk_in_a_terminal(run, tmp_path):
    history = tmp_path / "history"
    terminal = Terminal(
        command(run, "--length", "100000", "--history", str(history), "--top_p", "1", "--presence_penalty", "0"),
        tmp_path,
    )
    try:
        terminal.wait("L2-D64, chat; /help")
        terminal.wait(READY)
        terminal.type("/set length 12\r")
        terminal.wait("length 12")
        terminal.wait(READY)
        terminal.type("what is\x1b\rit?\r")  # Alt-Enter between two lines
        terminal.wait(r"it\?")
        terminal.wait(READY)
        terminal.type(f"/save {tmp_path}/talk\r")
        terminal.wait(r"saved to")
        terminal.wait(READY)
        terminal.type("/set length 100000\r")
        terminal.wait("length 100000")
        terminal.wait(READY)
        terminal.type("/retry\r")
        terminal.wait(r"/retry[\s\S]{40}")
        terminal.type("\x03")  # while it answers
        stopped = terminal.wait(rf"\[stopped\]|{READY}")
        assert "[stopped]" in stopped
        terminal.wait(READY)
        terminal.type("/save\r")
        terminal.wait("expected a file name")
        terminal.wait(READY)
        terminal.type("\x03")  # at the prompt
        terminal.wait("Ctrl-D")
        terminal.wait(READY)
        terminal.type("\x1b[A")  # the last line of the history
        terminal.wait("/save")
        terminal.type("\x15\x04")
        assert terminal.end() == 0, "a slip of the fingers is no failure"
    except BaseException:
        terminal.kill()
        raise
    assert torch.load(tmp_path / "talk", weights_only=True)["messages"][0]["content"] == "what is\nit?"
    assert "+what is\n+it?" in history.read_text()

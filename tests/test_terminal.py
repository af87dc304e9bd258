"""Terminals and pages: no control characters and no markup from data, names and models, in any locale."""

import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from chat_models import TEMPLATES, make_tokenizer
from random_model import random_model
from training_runs import flags

import API_DEMO_CHAT
from data import inspect_data, make_data, token_count
from src.dataset import BinIdxWriter
from src.dataset.tokenizer import load_tokenizer
from src.errors import UserError, UserErrors
from src.inference import generate
from src.inference.chat import Conversation
from src.inference.decoder import Decoder
from src.inference.sampling import Sampling
from src.model.weights import save_weights
from src.run_log import read_curves
from src.terminal import prepare_output, printable, show
from src.training import console
from src.training.figures.loss_figure import draw_comparison, draw_run, write_figure
from src.training.figures.report_page import write_report

ROOT = Path(__file__).parents[1]
# Sets the title of the window, colours, an 8-bit CSI, a line that is written over, and one that is reversed.
HOSTILE = "a\x1b]0;title\x07b\x1b[31mc\x9b2Jd\re\bf\u202eg\u2066h\x00i\x7fj"
PLAIN = "a]0;titleb[31mc2Jdefghij"


def is_harmless(text):
    """Independently of the pattern: no control character but tab and newline, and none that changes the direction."""
    kinds = {unicodedata.category(c) for c in text} | {unicodedata.bidirectional(c) for c in text}
    kinds -= {"Cc"} if not {c for c in text if unicodedata.category(c) == "Cc"} - {"\t", "\n"} else set()
    return not kinds & {"Cc", "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def test_control_characters_are_removed_and_texts_stay():
    assert printable(HOSTILE) == PLAIN
    every = "".join(map(chr, range(0x110000)))
    assert is_harmless(printable(every))
    assert len(every) - len(printable(every)) == 30 + 1 + 32 + 5 + 4
    text = "tab\tline\nשלום \u200f, العربية, 世界 🙂 e\u0301"
    assert printable(text) == text


def test_messages_have_no_control_characters(capsys):
    error = UserError(f"bad {HOSTILE}", flag="data_file", given=HOSTILE, expected=HOSTILE, advice=HOSTILE)
    assert is_harmless(str(error))
    assert PLAIN in str(error)
    assert is_harmless(str(UserErrors([error, error])))
    show(HOSTILE)
    console.log(HOSTILE)
    console.log_error(HOSTILE)
    shown = capsys.readouterr()
    assert shown.out == f"{PLAIN}\n{PLAIN}\n"
    assert shown.err == f"train.py: {PLAIN}\n"


def test_answers_have_no_control_characters(tmp_path, monkeypatch, capsys):
    folder = make_tokenizer(tmp_path / "tokenizer", TEMPLATES["chatml"])
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(HOSTILE)
    model = random_model(n_layer=1, n_embd=64, vocab_size=400)
    monkeypatch.setattr("src.inference.chat.generate", lambda *_, **__: iter(ids))
    talk = Conversation(Decoder(model), tokenizer, tokenizer.chat_template, Sampling(), max_new_tokens=len(ids))
    API_DEMO_CHAT.run_turn(talk, "hi", models=None)  # no command switches the model
    assert capsys.readouterr().out == PLAIN + "\n"
    assert talk.transcript.messages[-1]["content"] == HOSTILE  # the model's own text stays what it is
    save_weights(model.state_dict(), tmp_path / "m.pth")
    monkeypatch.setattr(generate, "generate", lambda *_, **__: iter(ids))
    generate.main([str(tmp_path / "m.pth"), "--tokenizer", str(folder), "--prompt", "x\x1b[1m"])
    assert capsys.readouterr().out == f"x[1m{PLAIN}\n"


def test_previews_of_data_have_no_control_characters(tmp_path, monkeypatch, capsys):
    folder = make_tokenizer(tmp_path / "tokenizer", TEMPLATES["chatml"])
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": HOSTILE}) + "\n" + json.dumps({"txt\x1b": HOSTILE}) + "\n")
    make_data.main([str(tmp_path / "x.jsonl"), "4", "4", "--tokenizer", str(folder), "--out", str(tmp_path / "x")])
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "x"), "--tokenizer", str(folder)])
    inspect_data.main()
    turns = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": turns, f"k{HOSTILE}": 1}) + "\n")
    token_count.main([str(tmp_path / "c.jsonl"), "512", "--tokenizer", str(folder), "--preview"])
    shown = capsys.readouterr()
    text = shown.out + shown.err.replace("\r", "")  # progress bars
    assert PLAIN in text
    for colour in (token_count.ANSWER_COLOR, token_count.CONTEXT_COLOR, token_count.RESET):
        assert colour in text
        text = text.replace(colour, "")
    assert is_harmless(text.replace("\x1b[A", ""))


# ---- pages and figures -----------------------------------------------------------------------------------------------

MARKUP = "<script>alert(1)</script>&\"'"


def hostile_run(folder):
    """A run in whose files every value that may be text is markup."""
    folder.mkdir(parents=True)
    # The time is the last column but one: what can't be read of a line is markup.
    rate = "<img/src=x/onerror=alert(1)>"
    (folder / "train_log.txt").write_text(
        json.dumps({MARKUP: MARKUP, "data_file": MARKUP, "tokenizer": MARKUP, "ctx_len": 16, "lr_init": MARKUP})
        + f"\n0 3.5 33.1 {rate} 2026-01-01 00:00:00 0\n1 3.4 30.0 {rate} {rate} {rate} 1\n"
    )
    run = {"environment": {"git commit": MARKUP, MARKUP: MARKUP}, "tokenizer": MARKUP, "version": 1}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "samples.json").write_text(json.dumps([{"prompt": MARKUP, "answer": MARKUP, "continuation": MARKUP}]))
    return folder


def test_no_value_is_markup_in_the_report(tmp_path):
    folder = hostile_run(tmp_path / "<b>run$x^{$")
    log = (folder / "train_log.txt").read_text()
    (folder / "metrics.csv").write_text("step,tokens,loss,lr\n0,64,3.5,0.001\n1,128,3.4,0.001\n")
    page = write_report(folder).read_text(encoding="utf-8")
    assert "<img" in log
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    tags = set(re.findall(r"<\s*(\w+)", page))
    assert not tags & {"script", "img", "b1", "iframe"}
    assert not re.search(r"<[^>]*\son\w+=", page)
    assert "<b>run" not in page


@pytest.mark.parametrize("name", ["a$b$c", "$\\frac$", "$", "$$x^{$", "a\x1b[31m", "a\udcff"])
def test_names_are_drawn_literally(tmp_path, monkeypatch, name):
    """As a formula some of them are an error; with MPLBACKEND unknown, too."""
    folder = hostile_run(tmp_path / "run")
    (folder / "metrics.csv").write_text("step,tokens,loss,lr\n0,64,3.5,0.001\n1,128,3.4,0.001\n")
    curves = read_curves(folder)
    curves.name = name
    write_figure(draw_run(curves), tmp_path / "run.svg")
    write_figure(draw_comparison([curves, curves]), tmp_path / "runs.png")
    if name.isprintable():
        assert name.partition("$")[0] + "$" in (tmp_path / "run.svg").read_text(encoding="utf-8")


# ---- unusual environments --------------------------------------------------------------------------------------------

AWKWARD = os.fsencode("a$b 世") + b"\xff\x1b[31m"


@pytest.mark.slow
def test_a_run_in_an_awkward_place(tmp_path):
    """An ASCII terminal, names that are no text, a relative cache, an unknown backend of Matplotlib: it works, and its
    reports are there."""
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + AWKWARD))
    place.mkdir()
    with BinIdxWriter(place / "data", "uint16") as out:
        for i in range(64):
            out.add_document([*range(1, 30), i % 60 + 1, 0])
    environment = {
        **{**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        **{"MPLBACKEND": "nonsense", "XDG_CACHE_HOME": "relative", "OMP_NUM_THREADS": "1"},
        "PYTHONPATH": str(ROOT),  # for -m from another folder, in which "relative" is,
    }
    argv = flags(place / "run", place / "data", my_exit_tokens=16 * 4 * 4, epoch_steps=2, n_layer=1)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *argv], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    shown = done.stdout.decode("ascii") + done.stderr.decode("ascii")
    assert done.returncode == 0, shown
    assert "Traceback" not in shown
    assert "\x1b" not in shown
    assert "not written" not in shown
    assert (place / "run" / "rwkv-final.pth").is_file()
    for name in ("loss.png", "report.html", "run.json"):
        assert (place / "run" / name).is_file()
    assert not (tmp_path / "relative" / "rwkv7-native").exists()
    report = [sys.executable, "-m", "src.training.html_report", place / "run"]
    again = subprocess.run(report, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert b"wrote" in again.stdout
    missing = [sys.executable, str(ROOT / "API_DEMO_CHAT.py"), place / "nothing", "--prompt", "x"]
    done = subprocess.run(missing, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 2
    assert b"no such file" in done.stderr
    assert b"\x1b" not in done.stderr


def test_a_stream_that_is_no_file_is_left_alone(monkeypatch):
    class Stream:
        def write(self, text):
            return len(text)

    monkeypatch.setattr(sys, "stdout", Stream())
    prepare_output()

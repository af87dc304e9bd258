"""The programs on a device beside CPUs and CUDA's, as a user starts them: tests/fake_device.py is that device."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch
from chat_models import make_tokenizer
from random_model import random_model

from tests.training_runs import flags, losses, train

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, str(ROOT / "tests/fake_device.py")]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}


def on_device(*arguments, cwd=ROOT, text=None):
    """What a program prints: its stdout, and its stderr."""
    command = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, input=text, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.save(random_model(n_layer=2, n_embd=64, vocab_size=400).state_dict(), folder / "base.pth")
    (folder / "text.txt").write_text("what is the answer? it is the string. " * 20)
    return folder / "base.pth", "--tokenizer", make_tokenizer(folder / "tokenizer")


def test_a_run_is_checked_trained_and_resumed(tmp_path, data):
    """With the losses of the same kernel on the CPU, and a held-out loss."""
    settings = {"my_exit_tokens": 16 * 4 * 20, "epoch_save": 1, "val_data_file": data, "val_windows": 4}
    assert train(tmp_path / "cpu", data, kernel="portable", precision="fp32", **settings) == 0
    run = flags(tmp_path / "fake", data, **settings, accelerator="fake")
    printed, _ = on_device("train.py", *run, "--check", 1)
    assert "portable kernel" in printed
    assert "of the float64 reference" in printed
    on_device("train.py", *run)
    assert losses(tmp_path / "fake") == pytest.approx(losses(tmp_path / "cpu"), abs=1e-4)
    (tmp_path / "fake" / "rwkv-final.pth").unlink()
    printed, _ = on_device("train.py", *run)
    assert "resume/step-00000020" in printed
    assert (tmp_path / "fake" / "rwkv-final.pth").exists()


def test_generate_and_chat(model):
    _, notes = on_device("src.inference.generate", *model, "--device", "fake", "--prompt", "the", "--length", 8)
    assert "portable kernel" in notes
    questions = "what is it?\n/exit\n"
    printed, _ = on_device("API_DEMO_CHAT.py", *model, "--device", "fake", "--length", 8, text=questions)
    assert printed.strip()


@pytest.mark.parametrize("how", [(), ("--by_position",)], ids=["mean", "by position"])
def test_evaluate_says_what_it_says_on_a_cpu(model, how, tmp_path):
    text = model[0].parent / "text.txt"
    arguments = ("src.inference.evaluate", *model, "--data", text, "--ctx_len", 64, *how, "--device")
    (printed, _), (expected, _) = (on_device(*arguments, device, cwd=tmp_path) for device in ("fake", "cpu"))
    assert printed == expected


def test_serve(model):
    arguments = [*COMMAND, "src.inference.serve", *map(str, model), "--device", "fake", "--port", "0"]
    with subprocess.Popen(arguments, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = next(line.split()[-1] for line in server.stdout if line.startswith("base URL"))
            body = {"prompt": "the", "max_tokens": 8}
            answer = httpx.post(f"{address}/completions", json=body, timeout=120)
            assert answer.json()["usage"]["completion_tokens"] > 0
        finally:
            server.kill()

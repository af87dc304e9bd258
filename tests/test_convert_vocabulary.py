"""A resized vocabulary: old tokens as before, new ones the mean; by the command and within a run."""

import dataclasses
import json

import pytest
import torch
from chat_models import make_tokenizer
from random_model import random_model
from training_runs import CTX, train

from src.config import RunConfig
from src.errors import UserError
from src.inference.convert_vocabulary import main
from src.inference.load import load_model
from src.model import RWKV7
from src.model.vocabulary import resize_vocabulary
from src.model.weights import read_weights
from src.training.model_setup import find_vocab_size, fit_to_run

IDS = 314  # of the tokenizer that make_tokenizer makes


@pytest.fixture
def model(tmp_path):
    model = random_model(n_layer=2, vocab_size=97)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_tokens_are_the_mean_of_the_old(model, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    grown = resize_vocabulary(weights, 104)
    for name in ("emb.weight", "head.weight"):
        assert grown[name].shape == (104, 128)
        assert torch.equal(grown[name][:97], weights[name])
        mean = weights[name].double().mean(0)
        torch.testing.assert_close(grown[name][97:].double(), mean.expand(7, -1), rtol=2**-8, atol=1e-6)
    assert all(torch.equal(grown[name], weights[name]) for name in weights if name not in ("emb.weight", "head.weight"))
    tokens = torch.tensor([[3, 1, 4, 96]])
    before = RWKV7.from_weights(weights, "old", torch.float32)(tokens)[0]
    after = RWKV7.from_weights(grown, "new", torch.float32)(tokens)[0]
    assert torch.equal(after[..., :97], before)
    torch.testing.assert_close(after[..., 97], before.mean(-1), rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    shrunk = resize_vocabulary(grown, 97)
    assert all(torch.equal(shrunk[name], weights[name]) for name in weights)
    assert shrunk["head.weight"].untyped_storage().nbytes() == shrunk["head.weight"].nbytes  # else a file has all rows


@pytest.mark.parametrize("arguments", [["--vocab_size", "104"], ["--vocab_size", "90"], ["--tokenizer", "{tokenizer}"]])
def test_the_command_writes_a_model(model, tmp_path, arguments):
    folder = make_tokenizer(tmp_path / "tokenizer")
    rows = IDS if arguments[0] == "--tokenizer" else int(arguments[1])
    arguments = [argument.format(tokenizer=folder) for argument in arguments]
    assert main([str(tmp_path / "model.pth"), str(tmp_path / "out.pth"), *arguments]) == 0
    assert load_model(tmp_path / "out.pth", "fp32", "cpu").config.vocab_size == rows
    expected = resize_vocabulary(model.state_dict(), rows)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read_weights(tmp_path / "out.pth").items())


@pytest.mark.parametrize(
    ("out", "arguments", "words"),
    [
        ("there.pth", ["--vocab_size", "104"], "exists"),
        ("out.gguf", ["--vocab_size", "104"], ".pth or .safetensors"),
        ("out.pth", ["--vocab_size", "0"], "at least 1"),
        ("out.pth", ["--vocab_size", "400"], "already"),
        ("out.pth", ["--vocab_size", "300"], f"has ids up to {IDS - 1}"),
        ("out.pth", ["--tokenizer", "nowhere"], "tokenizer.json"),
    ],
)
def test_mistakes_are_one_message(tmp_path, capsys, out, arguments, words):
    torch.save(random_model(n_layer=1, vocab_size=400).state_dict(), tmp_path / "rwkv-final.pth")
    make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "run.json").write_text(json.dumps({"tokenizer": str(tmp_path / "tokenizer")}))
    (tmp_path / "there.pth").write_bytes(b"mine")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), str(tmp_path / out), *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) <= 2
    assert (tmp_path / "there.pth").read_bytes() == b"mine"
    assert not (tmp_path / "out.pth").exists()


def test_weights_without_rows_are_refused():
    with pytest.raises(UserError):
        resize_vocabulary({"emb.weight": torch.zeros(3, 2)}, 5)


@pytest.mark.slow
def test_a_run_adds_the_rows_that_its_tokenizer_needs(tmp_path, data, capfd):
    base = random_model(n_layer=2, n_embd=32, head_size=16, vocab_size=64)
    torch.save(base.state_dict(), tmp_path / "base.pth")
    folder = make_tokenizer(tmp_path / "tokenizer")
    changed = {"load_model": tmp_path / "base.pth", "tokenizer": folder, "vocab_size": 0, "my_exit_tokens": CTX * 4 * 2}
    assert train(tmp_path / "run", data, **changed) == 2
    assert "the weights have 64 rows; add rows with --resize_vocab 1" in capfd.readouterr().err
    assert train(tmp_path / "run", data, resize_vocab=1, check=1, **changed) == 0
    assert train(tmp_path / "run", data, resize_vocab=1, lr_init=1e-9, lr_final=1e-9, **changed) == 0
    tuned = read_weights(tmp_path / "run" / "rwkv-final.pth")
    expected = resize_vocabulary(base.state_dict(), IDS)
    for name in ("emb.weight", "head.weight"):
        torch.testing.assert_close(tuned[name].float(), expected[name], rtol=2**-7, atol=1e-4)
    # complete: the same command has nothing left to do, and doesn't take the saved weights for another model's
    assert train(tmp_path / "run", data, resize_vocab=1, lr_init=1e-9, lr_final=1e-9, **changed) == 0


def test_weights_are_fitted_to_a_larger_vocabulary_if_asked_for(model):
    sizes = dataclasses.replace(model.config, vocab_size=120)
    weights = model.state_dict()
    fitted = fit_to_run(weights, RunConfig(resize_vocab=True), sizes, "base.pth")
    assert torch.equal(fitted["head.weight"], resize_vocabulary(weights, 120)["head.weight"])
    with pytest.raises(UserError, match=r"they fit .*--vocab_size 97"):
        fit_to_run(weights, RunConfig(), sizes, "base.pth")
    with pytest.raises(UserError, match="--vocab_size 97"):  # it adds rows, and never removes what was trained
        fit_to_run(weights, RunConfig(resize_vocab=True), dataclasses.replace(sizes, vocab_size=90), "base.pth")


@pytest.mark.parametrize("flags", [{"peft": "lora"}, {"train_type": "state"}])
def test_an_adapter_has_no_place_for_new_rows(model, flags):
    sizes = dataclasses.replace(model.config, vocab_size=120)
    with pytest.raises(UserError, match=r"convert_vocabulary .*--vocab_size 120"):
        fit_to_run(model.state_dict(), RunConfig(resize_vocab=True, **flags), sizes, "base.pth")
    fit_to_run(model.state_dict(), RunConfig(resize_vocab=True, **flags), model.config, "base.pth")


def test_rows_beyond_the_tokenizer_stay(tmp_path):
    folder = make_tokenizer(tmp_path / "tokenizer")
    small, large = (random_model(n_layer=1, vocab_size=rows).state_dict() for rows in (64, 448))
    for resize in (True, False):
        config = RunConfig(tokenizer=str(folder), resize_vocab=resize)
        assert find_vocab_size(config, large) == 448
    assert find_vocab_size(RunConfig(tokenizer=str(folder), resize_vocab=True), small) == IDS
    with pytest.raises(UserError, match="the weights have 64 rows; add rows with --resize_vocab 1"):
        find_vocab_size(RunConfig(tokenizer=str(folder)), small)

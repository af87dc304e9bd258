"""--load_model takes what chat and export take: files and folders of every format that is read."""

import json
import shutil

import pytest
import torch
from training_runs import losses, train

from src.inference.formats.convert import convert_model
from src.inference.formats.fla import to_fla
from src.inference.formats.gguf import write_tensors
from src.inference.formats.gguf_file import F32
from src.inference.formats.gguf_tensors import to_gguf
from src.inference.load import load_model
from src.model import RWKV7, ModelConfig
from src.model.weights import read_weights

SIZES = {"n_layer": 2, "n_embd": 64, "head_size": 64}
SHORT = {**SIZES, "my_exit_tokens": 16 * 4 * 3}


@pytest.fixture
def base(tmp_path):
    """A run's folder as far as its weights go."""
    torch.manual_seed(3)
    (tmp_path / "base").mkdir()
    weights = RWKV7(ModelConfig(vocab_size=64, **SIZES)).state_dict()
    torch.save(weights, tmp_path / "base" / "rwkv-1.pth")
    torch.save({name: tensor + 0.01 for name, tensor in weights.items()}, tmp_path / "base" / "rwkv-init.pth")
    return tmp_path / "base"


def test_every_format_starts_the_same_run(tmp_path, data, base):
    from safetensors.torch import save_file

    file = base / "rwkv-1.pth"
    save_file(read_weights(file), tmp_path / "base.st")
    torch.save(read_weights(file), tmp_path / "base.bin", _use_new_zipfile_serialization=False)
    convert_model(load_model(file, "as is", "cpu"), tmp_path / "hf", "fla")
    save_file(to_fla(read_weights(file)), tmp_path / "fla.safetensors")
    model = load_model(file, "as is", "cpu")
    sizes = {"block_count": 2, "embedding_length": model.config.n_embd, "wkv.head_size": model.config.head_size}
    keys = {"general.architecture": "rwkv7", **{f"rwkv7.{key}": size for key, size in sizes.items()}}
    write_tensors(tmp_path / "base.gguf", keys, list(to_gguf(model.state_dict(), model.config, F32)))
    curves = {}
    for path in (
        file,
        base,
        tmp_path / "base.st",
        tmp_path / "base.bin",
        tmp_path / "base.gguf",
        tmp_path / "hf",
        tmp_path / "fla.safetensors",
    ):
        out = tmp_path / f"run-{path.name}"
        assert train(out, data, load_model=path, **SHORT) == 0
        curves[path.name] = losses(out)
        assert train(out, data, load_model=path, **SHORT) == 0  # is complete: not taken for another run
        assert not (out / "previous-1").exists()
    assert len({tuple(curve) for curve in curves.values()}) == 1, curves


def test_a_base_that_was_trained_on_does_not_start_another_run(tmp_path, data, base):
    out = tmp_path / "run"
    assert train(out, data, load_model=base, **SHORT) == 0
    shutil.copy(base / "rwkv-init.pth", base / "rwkv-final.pth")
    assert train(out, data, load_model=base, **SHORT) == 0
    assert not (out / "previous-1").exists()
    assert train(out, data, load_model=base, restart=1, **SHORT) == 0
    assert (out / "previous-1").is_dir()
    assert json.loads((out / "run.json").read_text())["origin"]["path"] == str(base / "rwkv-final.pth")


def test_restart_from_a_folder_archives_a_damaged_record(tmp_path, data, base):
    out = tmp_path / "run"
    assert train(out, data, load_model=base, **SHORT) == 0
    (out / "run.json").write_text("{")
    assert train(out, data, load_model=base, **SHORT) == 2
    assert train(out, data, load_model=base, restart=1, **SHORT) == 0
    assert (out / "previous-1" / "run.json").read_text() == "{"


def test_another_hugging_face_folder_starts_another_run(tmp_path, data, base):
    for name in ("rwkv-1", "rwkv-init"):
        convert_model(load_model(base / f"{name}.pth", "as is", "cpu"), tmp_path / name, "fla")
    assert train(tmp_path / "run", data, load_model=tmp_path / "rwkv-1", **SHORT) == 0
    assert train(tmp_path / "run", data, load_model=tmp_path / "rwkv-init", **SHORT) == 0
    assert (tmp_path / "run" / "previous-1").is_dir()


def test_check_reads_a_hugging_face_folder(tmp_path, data, base, capfd):
    convert_model(load_model(base / "rwkv-1.pth", "as is", "cpu"), tmp_path / "hf", "fla")
    train(tmp_path / "run", data, load_model=tmp_path / "hf", check=1, **SHORT)
    assert f"starts from {tmp_path / 'hf'}" in capfd.readouterr().out
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert train(tmp_path / "run", data, load_model=tmp_path / "hf", check=1, **SHORT) == 1
    assert "config.json says 3" in capfd.readouterr().out


FOLDERS = {
    "empty": ({}, "contains no rwkv-final.pth"),
    "adapter": ({"adapter_config.json": "{}"}, "adapter"),
    "configuration of another program": ({"config.json": '{"n_layer": 2}', "model.pth": ""}, "model.pth"),
    "another model": ({"config.json": '{"model_type": "llama"}'}, "model_type llama"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_without_a_model_is_named(tmp_path, data, capfd, name):
    files, problem = FOLDERS[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_text(content)
    assert train(tmp_path / "run", data, load_model=folder, **SHORT) == 2
    message = capfd.readouterr().err
    assert f"--load_model {folder}" in message
    assert problem in message
    assert "Traceback" not in message


def test_weights_with_nan_are_named_before_the_first_step(tmp_path, data, capfd, base):
    weights = torch.load(base / "rwkv-1.pth")
    weights["blocks.1.ffn.key.weight"][0, 0] = float("nan")
    torch.save(weights, tmp_path / "nan.pth")
    assert train(tmp_path / "run", data, load_model=tmp_path / "nan.pth", **SHORT) == 2
    message = capfd.readouterr().err
    assert "nan.pth: blocks.1.ffn.key.weight contains values that are not finite" in message
    assert not list((tmp_path / "run").glob("rwkv-*"))

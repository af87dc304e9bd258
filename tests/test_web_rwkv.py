"""`--format st`: what web-rwkv's loader expects of models, tuned states and LoRA files, and the way back."""

import pytest
import torch
from random_model import random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_export import RELEASED

from src.adapt.adapter_files import Adapter, read_adapter, write_adapter
from src.adapt.base_hash import base_sha256
from src.adapt.config import AdapterConfig
from src.errors import UserError
from src.inference.export import main
from src.inference.formats.web_rwkv_tuned import read_st_lora, write_st_lora, write_st_state
from src.inference.load import load_model
from src.model.weights import IDLE_IN_LAYER_0

# Of web-rwkv's converter: the last two dimensions of these are swapped.
SWAPPED = ("w1", "w2", "a1", "a2", "g1", "g2", "v1", "v2", "time_state", "lora.0")


@pytest.mark.parametrize("size", RELEASED)
@pytest.mark.parametrize("idle", [True, False], ids=["layer-0-v0-v1-v2", "without"])
def test_a_model_is_written_as_its_loader_reads_it(tmp_path, size, idle):
    model = random_model(n_layer=2, n_embd=256, vocab_size=65, **RELEASED[size])
    weights = {n: t for n, t in model.state_dict().items() if idle or n not in IDLE_IN_LAYER_0}
    torch.save(weights, tmp_path / "model.pth")
    assert main([str(tmp_path / "model.pth"), str(tmp_path / "model.st")]) == 0
    with safe_open(tmp_path / "model.st", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    stored = load_file(tmp_path / "model.st")
    for name, tensor in stored.items():
        assert tensor.dtype == torch.float16
        if name in IDLE_IN_LAYER_0 and not idle:
            continue
        original = weights[name].half()
        assert torch.equal(tensor, original.mT if name.endswith(SWAPPED) else original), name
    # how the loader finds the sizes
    ranks = RELEASED[size]
    assert stored["blocks.0.att.w1"].shape == (ranks["d_decay_lora"], 256)
    assert stored["blocks.0.att.a1"].shape == (ranks["d_aaa_lora"], 256)
    assert stored["blocks.0.att.g1"].shape == (ranks["d_gate_lora"], 256)
    assert stored["blocks.1.att.v1"].shape == (ranks["d_mv_lora"], 256)


def test_the_way_back_is_exact_in_fp16(tmp_path):
    model = random_model(n_layer=2, d_decay_lora=32, d_gate_lora=64)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    assert main([str(tmp_path / "model.pth"), str(tmp_path / "model.st")]) == 0
    assert main([str(tmp_path / "model.st"), str(tmp_path / "back.pth")]) == 0
    assert main([str(tmp_path / "back.pth"), str(tmp_path / "again.st")]) == 0
    back = load_model(tmp_path / "back.pth", "as is", "cpu").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back[name], tensor.half()), name
    assert (tmp_path / "again.st").read_bytes() == (tmp_path / "model.st").read_bytes()


@pytest.mark.parametrize(
    ("sizes", "change", "words"),
    [
        ({"n_layer": 1}, None, "two layers or more"),
        ({"n_embd": 64, "d_decay_lora": 64, "d_aaa_lora": 64, "d_gate_lora": 64}, None, "transposed"),
        ({}, ("blocks.1.ffn.value.weight", 7e4), "blocks.1.ffn.value.weight has values up to 70000"),
        ({}, ("blocks.0.att.w0", -1e5), "blocks.0.att.w0 has values up to 100000"),
    ],
    ids=["one-layer", "square", "overflow", "negative"],
)
def test_what_can_not_be_read_there_is_refused_in_one_sentence(tmp_path, capsys, sizes, change, words):
    model = random_model(**{"n_layer": 2, **sizes})
    if change:
        model.get_parameter(change[0]).view(-1)[3] = change[1]
    torch.save(model.state_dict(), tmp_path / "model.pth")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "model.pth"), str(tmp_path / "model.st")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) <= 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth"]


def states():
    generator = torch.Generator().manual_seed(0)
    return {f"blocks.{i}.att.time_state": torch.randn(2, 64, 64, generator=generator) for i in range(3)}


def test_a_tuned_state_is_stored_by_key_then_value(tmp_path):
    original = states()
    write_st_state(original, 1.0, "", tmp_path / "tuned.st")
    stored = load_file(tmp_path / "tuned.st")
    for name, state in original.items():
        assert stored[name].dtype == torch.float16
        assert stored[name][1, 5, 9] == state[1, 9, 5].half()
    read = read_adapter(tmp_path / "tuned.st")
    assert read.config.kind == "state"
    assert all(torch.equal(state.half(), original[name].half()) for name, state in read.tensors.items())
    with pytest.raises(UserError, match=r"emb\.weight"):
        write_st_state({"emb.weight": torch.zeros(2, 2), **original}, 1.0, "", tmp_path / "other.st")
    assert not (tmp_path / "other.st").exists()


def lora():
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "att.key.lora_A": (4, 128),
        "att.key.lora_B": (128, 4),
        "ffn.value.lora_A": (4, 512),
        "ffn.value.lora_B": (128, 4),
    }
    return {f"blocks.0.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_lora_weights_are_stored_as_two_factors(tmp_path):
    original = lora()
    write_st_lora(original, 2.0, "bridge", tmp_path / "lora.st")
    stored = load_file(tmp_path / "lora.st")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert stored["blocks.0.ffn.value.lora.0"].shape == (512, 4)
    # its formula: W + alpha / r * (lora.1 lora.0^T)
    product = stored["blocks.0.att.key.lora.1"].float() @ stored["blocks.0.att.key.lora.0"].float().T
    expected = original["blocks.0.att.key.lora_B"] @ original["blocks.0.att.key.lora_A"]
    torch.testing.assert_close(product, expected, rtol=0, atol=2e-2)
    read, scale = read_st_lora(tmp_path / "lora.st")
    assert scale == 2.0
    assert read.keys() == original.keys()
    assert all(torch.equal(tensor, original[name].half()) for name, tensor in read.items())
    # --adapter needs no --lora_alpha for it
    assert read_adapter(tmp_path / "lora.st").config.lora_alpha == 8.0
    save_file(stored, tmp_path / "foreign.st", {"lora_alpha": "?"})
    with pytest.raises(UserError, match="its lora_alpha is"):
        read_adapter(tmp_path / "foreign.st")
    with pytest.raises(UserError):  # alone it is no model
        load_model(tmp_path / "lora.st", "fp32", "cpu")


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("head.weight", torch.zeros(8, 128), "head.weight"),
        ("blocks.1.att.key.lora_A", torch.zeros(8, 128), "ranks"),
        ("blocks.0.att.key.lora_A", torch.full((4, 128), 1e6), "blocks.0.att.key.lora.0 has values up to 1e"),
    ],
)
def test_what_can_not_be_stored_as_lora_is_refused(tmp_path, name, tensor, words):
    with pytest.raises(UserError, match=words):
        write_st_lora(lora() | {name: tensor}, 1.0, "", tmp_path / "lora.st")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["lora", "state"])
def test_adapters_are_exported_beside_their_base(tmp_path, capsys, kind):
    model = random_model(n_layer=3)
    torch.save(model.state_dict(), tmp_path / "base.pth")
    tensors = states() if kind == "state" else lora()
    config = AdapterConfig("state", target_modules=()) if kind == "state" else AdapterConfig("lora", 4, 8.0)
    adapter = tmp_path / ("tuned.pth" if kind == "state" else "tuned")
    write_adapter(adapter, Adapter(config, tensors, base_sha256(model.state_dict())))
    out = tmp_path / "out.st"
    flag = "--state" if kind == "state" else "--adapter"
    arguments = [str(tmp_path / "base.pth"), str(out), flag, str(adapter), "--format"]
    assert main([*arguments, f"st-{kind}"]) == 0
    assert "logits differ by 0.0e+00 from the weights that were written" in capsys.readouterr().out
    read = read_adapter(out)
    assert all(torch.equal(tensor, tensors[name].half().float()) for name, tensor in read.tensors.items())
    other = "lora" if kind == "state" else "state"
    with pytest.raises(SystemExit):
        main([*arguments, f"st-{other}"])
    assert f"an adapter of the kind {kind}" in capsys.readouterr().err

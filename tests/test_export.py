"""Every format contains the same model: names map both ways, and logits are equal after reading back."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from chat_models import make_tokenizer
from random_model import random_model

from src.errors import UserError
from src.inference.evaluation_data import encode_texts, read_texts
from src.inference.export import ALL_FORMATS, main
from src.inference.formats.convert import FORMATS, convert_model
from src.inference.formats.fla import fla_name, from_fla, rwkv_name, to_fla
from src.inference.formats.format import VerificationError
from src.inference.formats.parity import compare, logits_by_block
from src.inference.heldout_loss import heldout_loss
from src.inference.load import find_tokenizer, find_weights, load_model, load_weights
from src.model.weights import IDLE_IN_LAYER_0, fit_weights, read_weights

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 96, 0, 0, 11]
RELEASED = {  # low-rank sizes of released models: they don't follow the formula
    "0.1B": {"d_decay_lora": 64, "d_aaa_lora": 64, "d_mv_lora": 32, "d_gate_lora": 128},
    "2.9B": {"d_decay_lora": 96, "d_aaa_lora": 96, "d_mv_lora": 64, "d_gate_lora": 320},
    "13.3B": {"d_decay_lora": 192, "d_aaa_lora": 192, "d_mv_lora": 128, "d_gate_lora": 384},
}


@pytest.fixture
def weights(tmp_path):
    model = random_model(n_layer=3, vocab_size=320, d_decay_lora=32, d_gate_lora=64)
    torch.save(model.state_dict(), tmp_path / "rwkv-final.pth")
    make_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "rwkv-final.pth"


def convert(weights, out, format):
    return convert_model(load_model(weights, "as is", "cpu"), out, format)


def logits(path):
    return load_model(find_weights(path), "fp32", "cpu")(torch.tensor([TOKENS]))[0]


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors", "out"])
@pytest.mark.parametrize("dtype", [None, "bf16", "fp16"])
def test_an_export_contains_the_model_and_converts_back_exactly(weights, tmp_path, capsys, name, dtype):
    out, back = tmp_path / "sub" / name, tmp_path / "back.pth"
    assert main([str(weights), str(out), *(["--dtype", dtype] if dtype else [])]) == 0
    assert "logits differ by 0.0e+00 from the weights that were written" in capsys.readouterr().out
    rounded = load_model(weights, dtype or "fp32", "cpu").float()(torch.tensor([TOKENS]))[0]
    torch.testing.assert_close(logits(out), rounded, rtol=0, atol=1e-5)
    assert main([str(out), str(back)]) == 0
    original = read_weights(weights)
    for key, tensor in read_weights(back).items():
        if key not in IDLE_IN_LAYER_0 or name != "out":
            assert torch.equal(tensor, original[key].to(tensor.dtype)), key


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors", "out"])
def test_an_earlier_export_stays_when_verification_of_the_new_one_fails(weights, tmp_path, capsys, monkeypatch, name):
    def contents(folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    out = tmp_path / "exports" / name
    assert main([str(weights), str(out)]) == 0
    before = contents(out.parent)

    def read_damaged(path):
        return {name: t + (name == "head.weight") for name, t in load_weights(path).items()}

    for format, row in FORMATS.items():
        monkeypatch.setitem(FORMATS, format, dataclasses.replace(row, read=read_damaged))
    with pytest.raises(SystemExit) as stopped:
        main([str(weights), str(out), "--dtype", "bf16"])
    assert stopped.value.code == 1
    assert f"{out}: not written" in capsys.readouterr().err
    assert contents(out.parent) == before
    monkeypatch.undo()
    assert main([str(weights), str(out), "--dtype", "bf16"]) == 0
    assert contents(out.parent).keys() == before.keys()
    assert load_model(find_weights(out), "as is", "cpu").emb.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("other", ["model-00001-of-00001.safetensors", "model.safetensors.index.json"])
def test_a_folder_with_other_weights_is_rejected(weights, tmp_path, other):
    convert(weights, tmp_path / "hf", "fla")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / other)
    with pytest.raises(UserError) as caught:
        convert(weights, tmp_path / "hf", "fla")
    assert caught.value.given == tmp_path / "hf"
    assert f"({other})" in caught.value.problem


def test_a_hugging_face_folder_contains_the_tokenizer(weights, tmp_path):
    folder = tmp_path / "hf"
    assert main([str(weights), str(folder)]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["RWKV7ForCausalLM"]
    assert config["eos_token_id"] == 2
    assert find_tokenizer(find_weights(folder), 400).name == str(folder)


def test_names_map_both_ways(weights):
    names = [name for name in read_weights(weights) if name not in IDLE_IN_LAYER_0]
    theirs = [fla_name(name) for name in names]
    assert len(set(theirs)) == len(names)
    assert [rwkv_name(name) for name in theirs] == names
    with pytest.raises(UserError) as caught:
        rwkv_name("model.layers.0.attn.q_proj.weight")
    assert caught.value.given == "model.layers.0.attn.q_proj.weight"


def test_fla_tensors_give_the_output_of_its_layers(weights):
    """The second layer's time mix, written with fla's modules' conventions: linear layers, biases, lerp."""
    model = load_model(weights, "fp32", "cpu")
    tensors = {n: t.double() for n, t in to_fla(model.state_dict()).items()}
    x = torch.randn(1, 1, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v_first = torch.randn(1, 1, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = {n.removeprefix("model.layers.1.attn."): t for n, t in tensors.items() if n.startswith("model.layers.1.attn.")}

    def lora(kind, value, activation):
        inner = activation(F.linear(value, p[f"{kind}_lora.lora.0.weight"]))
        return F.linear(inner, p[f"{kind}_lora.lora.2.weight"], p.get(f"{kind}_lora.lora.2.bias"))

    def heads(value):
        return value.view(2, 64)

    mixed = {c: x + (0 - x) * p[f"x_{c}"] for c in "rwkvag"}
    r, k, v = (F.linear(mixed[c], p[f"{c}_proj.weight"]) for c in "rkv")
    v = torch.lerp(v, v_first, lora("v", mixed["v"], lambda t: t).sigmoid())
    a = lora("a", mixed["a"], lambda t: t).sigmoid()
    g = F.linear(F.linear(mixed["g"], p["g_lora.lora.0.weight"]).sigmoid(), p["g_lora.lora.2.weight"])
    k = k.addcmul(k * (a - 1), p["k_a"])
    y = (heads(r) * heads(k)).sum(-1, keepdim=True) * heads(v)  # the first token: the state is v k^T
    y = F.group_norm(y.reshape(1, 128), 2, p["g_norm.weight"], p["g_norm.bias"], eps=64 * 1e-5)
    y = y + ((heads(r) * heads(k) * p["r_k"]).sum(-1, keepdim=True) * heads(v)).reshape(1, 128)
    expected = F.linear(y.view(1, 1, 128) * g, p["o_proj.weight"])
    actual, *_ = model.blocks[1].att(x.float(), v_first.float())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
    assert "w_lora.lora.2.bias" in p
    assert p["w_lora.lora.0.weight"].shape == (32, 128)


def test_folders_with_stacked_mixes_and_several_files_are_read(weights, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "hf"
    convert(weights, folder, "fla")
    tensors = to_fla(read_weights(weights))
    for layer in range(3):
        mixes = [tensors.pop(f"model.layers.{layer}.attn.x_{c}") for c in "rwkvag"]
        tensors[f"model.layers.{layer}.attn.x_x"] = torch.cat(mixes).view(6, -1)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for part, chosen in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in chosen}, folder / f"model-0000{part + 1}-of-00002.safetensors")
    torch.testing.assert_close(logits(folder), logits(weights), rtol=0, atol=1e-5)
    assert from_fla(tensors).keys() == read_weights(weights).keys() - set(IDLE_IN_LAYER_0)


@pytest.mark.parametrize("size", RELEASED)
def test_files_of_released_models_are_read(tmp_path, size):
    """Their low-rank sizes and dtype, with layer 0's unused parameters of other shapes or missing."""
    sizes = RELEASED[size]
    model = random_model(n_layer=2, n_embd=192, vocab_size=65, **sizes)
    released = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    for name in ("v1", "v2"):
        released[f"blocks.0.att.{name}"] = torch.zeros(1)
    del released["blocks.0.att.v0"]
    torch.save(released, tmp_path / "RWKV-x070.pth")
    read = load_model(tmp_path / "RWKV-x070.pth", "fp32", "cpu")
    for field, value in sizes.items():
        assert getattr(read.config, field) == value
    expected = model.bfloat16().float()(torch.tensor([TOKENS[:5]]).remainder(65))[0]
    torch.testing.assert_close(read(torch.tensor([TOKENS[:5]]).remainder(65))[0], expected, rtol=0, atol=1e-5)
    # As in a fine-tuning run that starts from the file.
    base = random_model(n_layer=2, n_embd=192, vocab_size=65, **sizes)
    assert fit_weights(read_weights(tmp_path / "RWKV-x070.pth"), base, "released").keys() == base.state_dict().keys()


def test_head_sizes_that_the_layout_can_not_express_are_rejected_before_anything_is_written(tmp_path):
    torch.save(random_model(n_embd=96, head_size=32).state_dict(), tmp_path / "small.pth")
    model = load_model(tmp_path / "small.pth", "as is", "cpu")
    with pytest.raises(UserError) as caught:
        convert_model(model, tmp_path / "hf", "fla")
    assert (caught.value.flag, caught.value.given) == ("format", "fla")
    assert not (tmp_path / "hf").exists()
    assert convert_model(model, tmp_path / "small.safetensors", "safetensors").write_error == 0


@pytest.mark.parametrize(
    ("out", "format", "code", "detail"),
    [
        ("{model}", None, 2, "{model}: is MODEL itself"),
        ("x.onnx", None, 2, "x.onnx: no format has the suffix .onnx; expected .pth, .safetensors"),
        ("{folder}", "pth", 2, "{folder}: is a folder"),
        ("{file}/x.pth", None, 1, "{file}"),
        ("name", "safetensors", 2, "expected name.safetensors"),
    ],
)
def test_an_unusable_out_is_rejected(weights, capsys, out, format, code, detail):
    folder = weights.parent / "folder"
    folder.mkdir(exist_ok=True)
    file = weights.parent / "file"
    file.write_text("")
    paths = {"model": weights, "file": file, "folder": folder}
    with pytest.raises(SystemExit) as stopped:
        main([str(weights), out.format(**paths), *(["--format", format] if format else [])])
    assert stopped.value.code == code
    assert detail.format(**paths) in capsys.readouterr().err


def test_a_damaged_file_in_a_folder_is_named(weights, tmp_path):
    folder = tmp_path / "hf"
    convert(weights, folder, "fla")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: math.floor(len(whole) / 2)])
    with pytest.raises(UserError) as caught:
        load_model(folder, "fp32", "cpu")
    assert caught.value.given == folder / "model.safetensors"
    assert "cut short" in caught.value.problem


# ---- Hugging Face folders, and files of other programs ---------------------------------------------------------------


def save_index(folder, places, total=2):
    """The parts of a model by `places` (number of the part -> tensors), and their index."""
    from safetensors.torch import save_file

    weight_map = {}
    for number, tensors in places.items():
        name = f"model-{number:05}-of-{total:05}.safetensors"
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def parts(weights, tmp_path):
    """A Hugging Face folder in two parts with an index: the last layer is in the second."""
    folder = tmp_path / "hf"
    convert(weights, folder, "fla")
    (folder / "model.safetensors").unlink()
    tensors = to_fla(read_weights(weights))
    last = {name: tensor for name, tensor in tensors.items() if ".layers.2." in name}
    save_index(folder, {1: {name: tensors[name] for name in tensors if name not in last}, 2: last})
    return folder


def refused(folder):
    with pytest.raises(UserError) as caught:
        load_model(find_weights(folder), "fp32", "cpu")
    assert str(caught.value.given).startswith(str(folder))
    return caught.value


def test_parts_are_read_by_their_index(parts, weights):
    torch.testing.assert_close(logits(parts), logits(weights), rtol=0, atol=1e-5)
    # of another model in the same folder: the index doesn't name it
    (parts / "adapter_model.safetensors").write_bytes(b"not read")
    torch.testing.assert_close(logits(parts), logits(weights), rtol=0, atol=1e-5)


@pytest.mark.parametrize("has_index", [True, False])
def test_a_missing_part_is_named(parts, has_index):
    (parts / "model-00002-of-00002.safetensors").unlink()
    if not has_index:
        (parts / "model.safetensors.index.json").unlink()
    error = refused(parts)
    assert ("model-00002-of-00002.safetensors" if has_index else "[2] of the 2") in error.problem


def test_a_part_of_another_version_is_named(parts, weights):
    from safetensors.torch import save_file

    other = {name: tensor for name, tensor in to_fla(read_weights(weights)).items() if ".layers.1." in name}
    save_file(other, parts / "model-00002-of-00002.safetensors")
    error = refused(parts)
    assert error.given == parts / "model-00002-of-00002.safetensors"
    assert "model.layers.2." in error.problem


@pytest.mark.parametrize("stale", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"])
def test_a_whole_file_and_parts_in_one_folder_are_ambiguous(parts, weights, stale):
    from safetensors.torch import save_file

    for path in parts.glob("model-*"):
        if path.name != stale:
            path.unlink()
    if not stale.endswith("json"):
        (parts / "model.safetensors.index.json").unlink()
    save_file(to_fla(read_weights(weights)), parts / "model.safetensors")
    error = refused(parts)
    assert "model.safetensors" in error.problem
    assert stale in error.problem


def test_an_index_of_the_whole_file_is_read(weights, tmp_path):
    folder = tmp_path / "hf"
    convert(weights, folder, "fla")
    places = dict.fromkeys(to_fla(read_weights(weights)), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    torch.testing.assert_close(logits(folder), logits(weights), rtol=0, atol=1e-5)


def test_parts_of_two_copies_are_ambiguous(parts, weights):
    from safetensors.torch import save_file

    (parts / "model.safetensors.index.json").unlink()
    save_file(to_fla(read_weights(weights)), parts / "model-00003-of-00003.safetensors")
    assert "two copies" in refused(parts).problem


@pytest.mark.parametrize("outside", ["../secret.safetensors", 7])
def test_an_index_that_leads_out_of_its_folder_is_refused(parts, outside):
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": outside}}))
    assert refused(parts).given == parts / "model.safetensors.index.json"


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 4), ("hidden_size", 192)])
def test_another_model_than_config_json_describes_is_refused(weights, tmp_path, capsys, key, value):
    """As where the part with the last layers is missing: no model of fewer layers is loaded or exported."""
    folder = tmp_path / "hf"
    convert(weights, folder, "fla")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    assert f"{key} {config[key]}, config.json says {value}" in refused(folder).problem
    with pytest.raises(SystemExit) as stopped:
        main([str(folder), str(tmp_path / "back.pth")])
    assert stopped.value.code == 2
    assert not (tmp_path / "back.pth").exists()


def test_a_folder_of_torch_files_is_read(weights, tmp_path):
    folder = tmp_path / "hf"
    convert(weights, folder, "fla")
    (folder / "model.safetensors").unlink()
    torch.save(to_fla(read_weights(weights)), folder / "pytorch_model.bin")
    torch.testing.assert_close(logits(folder), logits(weights), rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "rwkv7."])
def test_a_folder_with_the_names_of_a_pth_is_read(parts, weights, prefix):
    """As transformers' own RWKV-7 class was proposed; its prefix is also in the index."""
    for path in parts.glob("*.safetensors"):
        path.unlink()
    tensors = {
        name if name == "head.weight" else prefix + name: tensor
        for name, tensor in read_weights(weights).items()
        if name not in IDLE_IN_LAYER_0
    }
    names = sorted(tensors)
    save_index(parts, {1: {n: tensors[n] for n in names[::2]}, 2: {n: tensors[n] for n in names[1::2]}})
    torch.testing.assert_close(logits(parts), logits(weights), rtol=0, atol=1e-5)


def test_a_head_tied_to_the_embedding_is_read(tmp_path):
    model = random_model()
    model.head.weight.copy_(model.emb.weight)
    torch.save(model.state_dict(), tmp_path / "tied.pth")
    folder = tmp_path / "hf"
    convert_model(load_model(tmp_path / "tied.pth", "as is", "cpu"), folder, "fla")
    from safetensors.torch import save_file

    tensors = to_fla(model.state_dict())
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    assert "head.weight is missing" in refused(folder).problem
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    torch.testing.assert_close(logits(folder), logits(tmp_path / "tied.pth"), rtol=0, atol=1e-5)


def test_one_file_of_a_hugging_face_folder_is_read_or_known_as_a_part(weights, parts, tmp_path):
    convert(weights, tmp_path / "whole", "fla")
    (tmp_path / "whole" / "model.safetensors").rename(tmp_path / "renamed.bin")
    torch.testing.assert_close(logits(tmp_path / "renamed.bin"), logits(weights), rtol=0, atol=1e-5)
    error = refused(parts / "model-00001-of-00002.safetensors")
    assert "parts" in error.problem
    assert str(parts) in error.advice


def test_files_of_web_rwkv_are_read(weights, tmp_path):
    """Its converter writes fp16 and transposes the low-rank matrices."""
    from safetensors.torch import save_file

    original = {name: tensor.half() for name, tensor in read_weights(weights).items()}
    low_rank = [f".{kind}{part}" for kind in "wavg" for part in (1, 2)]
    swapped = {n: t.t().contiguous() if n[-3:] in low_rank else t for n, t in original.items()}
    save_file(swapped, tmp_path / "model.st", metadata={"format": "pt"})
    read = load_model(find_weights(tmp_path / "model.st"), "as is", "cpu")
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, original[name]), name


@pytest.mark.parametrize("place", ["everywhere", "one logit"])
def test_logits_that_are_no_numbers_do_not_pass_the_comparison(weights, tmp_path, monkeypatch, place):
    """NaN is not larger than any tolerance, and max() may overlook it."""
    damaged = load_weights(weights)
    damaged["head.weight"][slice(None) if place == "everywhere" else 5] = math.nan
    monkeypatch.setitem(FORMATS, "pth", dataclasses.replace(FORMATS["pth"], read=lambda path: damaged))
    # the comparison of the tensors finds it as well: this is about that of the logits
    by_logits = "src.inference.formats.convert.compare"
    monkeypatch.setattr(by_logits, lambda *given: dataclasses.replace(compare(*given), different=""))
    with pytest.raises(VerificationError, match="differ by nan"):
        convert(weights, tmp_path / "out.pth", "pth")
    assert not (tmp_path / "out.pth").exists()


def test_a_huge_config_is_refused_unread(weights, tmp_path):
    out = tmp_path / "fla"
    assert main([str(weights), str(out)]) == 0
    with open(out / "config.json", "wb") as file:
        file.truncate(1 << 40)  # takes no place on the disk
    with pytest.raises(UserError) as caught:
        find_weights(out)
    assert caught.value.given == out / "config.json"


@pytest.mark.parametrize("attn", [{"layers": [1], "num_heads": 2}, {"layers": []}])
def test_a_hybrid_model_is_refused_by_its_config(weights, tmp_path, attn):
    """Its layers of attention would be missing from the weights, or be taken for others."""
    out = tmp_path / "fla"
    assert main([str(weights), str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["attn"] is None
    (out / "config.json").write_text(json.dumps(config | {"attn": attn}))
    assert "hybrid" in refused(out).problem


def test_folders_of_other_models_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "model_type llama" in refused(tmp_path).problem
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter" in refused(tmp_path).problem


def test_the_list_and_the_page_have_every_format(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--list"])
    assert stopped.value.code == 0
    listed = capsys.readouterr().out
    for page in ("formats.md", "formats_CN.md"):
        text = (Path(__file__).parents[1] / "docs" / page).read_text(encoding="utf-8")
        for name, format in ALL_FORMATS.items():
            assert f"\n{name} " in f"\n{listed}"
            row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
            assert (f"`{format.suffix}`" in row) == bool(format.suffix)
            for program in format.programs:
                assert program.name in listed
                assert program.name.split(",")[0] in text


def test_held_out_data_gives_the_loss_of_both(weights, tmp_path, capsys):
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("the answer to the question is a string, and the list of numbers " * 30)
    assert main([str(weights), str(tmp_path / "x.pth"), "--dtype", "bf16", "--data", str(held_out)]) == 0
    before, after = map(float, re.search(r"held-out loss: (\S+) original, (\S+) as", capsys.readouterr().out).groups())
    tokenizer = find_tokenizer(weights, 320)
    tokens = encode_texts(read_texts(held_out, "data"), tokenizer)
    for path, expected in ((weights, before), (tmp_path / "x.pth", after)):
        loss = heldout_loss(load_model(path, "fp32", "cpu"), tokens, 512, 32).loss
        assert loss == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("has_states", [False, True], ids=["zero-states", "tuned-states"])
def test_the_comparison_by_blocks_is_the_model(weights, has_states):
    model = load_model(weights, "fp32", "cpu")
    if has_states:
        model.set_initial_states({f"blocks.{i}.att.time_state": torch.randn(2, 64, 64) for i in range(3)}, "a test")
    tokens = torch.tensor([TOKENS, TOKENS[::-1]])
    by_block = logits_by_block(model.state_dict(), model.config, tokens).view(2, len(TOKENS), -1)
    torch.testing.assert_close(by_block, model(tokens)[0], rtol=0, atol=1e-5)


def test_a_tensor_that_no_sampled_token_reaches_is_compared(weights, tmp_path, monkeypatch, capsys):
    """A row of the embedding that the text hasn't got: logits don't show it, the tensors do."""

    def read_damaged(path):
        read = load_weights(path)
        return {**read, "emb.weight": torch.cat([read["emb.weight"][:-1], read["emb.weight"][-1:] + 1])}

    monkeypatch.setitem(FORMATS, "pth", dataclasses.replace(FORMATS["pth"], read=read_damaged))
    with pytest.raises(SystemExit) as stopped:
        main([str(weights), str(tmp_path / "x.pth")])
    assert stopped.value.code == 1
    assert "emb.weight" in capsys.readouterr().err
    assert not (tmp_path / "x.pth").exists()

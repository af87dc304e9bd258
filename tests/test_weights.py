"""Weights files: read without running code, sizes found, misfits with_oom_advice."""

import pickle

import pytest
import torch

from src.model import RWKV7, ModelConfig
from src.model.weights import read_weights, save_weights

CONFIG = ModelConfig(2, 64, 40, head_size=32, d_decay_lora=8, d_aaa_lora=16, d_mv_lora=24, d_gate_lora=48, dim_ffn=96)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = RWKV7(CONFIG)
    save_weights(model.state_dict(), tmp_path / "m.pth")
    return model, tmp_path / "m.pth"


def rewrite(path, change):
    weights = torch.load(path)
    change(weights)
    torch.save(weights, path)


def test_sizes_are_read_from_the_tensors(saved):
    model, path = saved
    loaded = RWKV7.from_checkpoint(path)
    assert loaded.config == CONFIG
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_dtype_and_safetensors(saved, tmp_path):
    from safetensors.torch import save_file

    model, path = saved
    assert RWKV7.from_checkpoint(path, dtype=torch.bfloat16).emb.weight.dtype == torch.bfloat16
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    assert torch.equal(RWKV7.from_checkpoint(tmp_path / "m.safetensors").head.weight, model.head.weight)


def test_official_files_without_layer_0_value_residual(saved):
    model, path = saved
    rewrite(path, lambda w: [w.pop(f"blocks.0.att.{name}") for name in ("v0", "v1", "v2")])
    loaded = RWKV7.from_checkpoint(path)
    tokens = torch.arange(9).unsqueeze(0)
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])


def test_prefix_of_foreign_savers_is_taken_off(saved):
    _, path = saved

    def add_prefix(weights):
        for name in list(weights):
            weights["_forward_module." + name] = weights.pop(name)

    rewrite(path, add_prefix)
    assert RWKV7.from_checkpoint(path).config == CONFIG


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_hostile_pickle_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"emb.weight": Bomb()}, "bomb.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.pth", "raw.pth"):
        with pytest.raises(ValueError, match=name):
            read_weights(name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text", "list"])
def test_unreadable_files_are_named(saved, damage):
    _, path = saved
    whole = path.read_bytes()
    match damage:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(whole[: len(whole) // 2])
        case "text":
            path.write_text("hello")
        case "list":
            torch.save([torch.zeros(2)], path)
    with pytest.raises(ValueError, match=r"m\.pth"):
        RWKV7.from_checkpoint(path)


def test_foreign_weights_are_no_rwkv7(tmp_path):
    torch.save({"layer.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"not RWKV-7 weights.*emb\.weight"):
        RWKV7.from_checkpoint(tmp_path / "other.pth")


def test_missing_and_unknown_parameters_are_named(saved):
    _, path = saved
    rewrite(path, lambda w: w.pop("blocks.1.att.k_a"))
    with pytest.raises(ValueError, match=r"blocks\.1\.att\.k_a is missing"):
        RWKV7.from_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("blocks.0.att.a1"), r"blocks\.0\.att\.a1 is missing"),
        (lambda w: w.pop("blocks.0.att.g1"), r"blocks\.0\.att\.g1 is missing"),
        (
            lambda w: w.update({"blocks.0.att.r_k": w["blocks.0.att.r_k"].flatten()}),
            r"blocks\.0\.att\.r_k is \[64\], expected two dimensions",
        ),
        (lambda w: w.update({"blocks.1.att.v1": w["blocks.1.att.v1"].flatten()}), r"blocks\.1\.att\.v1 is \[1536\]"),
        (lambda w: w.update({"emb.weight": w["emb.weight"].long()}), r"emb\.weight is int64: expected floating point"),
        (
            lambda w: w.update({"blocks.1.ffn.key.weight": w["blocks.1.ffn.key.weight"].to(torch.int8)}),
            r"blocks\.1\.ffn\.key\.weight is int8",
        ),
    ],
)
def test_weights_whose_sizes_or_numbers_make_no_model_are_named(saved, change, words):
    _, path = saved
    rewrite(path, change)
    with pytest.raises(ValueError, match=rf"m\.pth: .*{words}"):
        RWKV7.from_checkpoint(path)


def test_a_failed_save_leaves_the_earlier_file_whole(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def full(*_args, **_kwargs):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(model.state_dict(), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["m.pth"]


def test_files_that_are_not_state_dicts_say_what_they_are(saved, tmp_path, monkeypatch):
    model, path = saved
    weights = model.state_dict()
    for wrong, words in (
        (
            {"model": weights, "optimizer": {}},
            r"'model', 'optimizer' is no such entry; the weights are in its part 'model'",
        ),
        ({**weights, 7: weights["head.weight"]}, "7 is no such entry"),
        ({**weights, "emb.weight": weights["emb.weight"].to_sparse()}, "'emb.weight' is no such entry"),
    ):
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(ValueError, match=words):
            read_weights(tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"a folder; name a weights file in it \(m.pth, wrong.pth\)"):
        read_weights(tmp_path)

    def refused(self, *args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refused)  # root may read everything
    with pytest.raises(ValueError, match=r"can't be read \(Permission denied\)"):
        read_weights(path)

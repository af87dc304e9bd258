"""Weights files: read without executing code, sizes inferred from the tensors, mismatches named."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.errors import UserError
from src.model import RWKV7, ModelConfig
from src.model.weights import WRAPPER_PREFIXES, read_weights, save_weights

CONFIG = ModelConfig(2, 64, 40, head_size=32, d_decay_lora=8, d_aaa_lora=16, d_mv_lora=24, d_gate_lora=48, dim_ffn=96)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = RWKV7(CONFIG)
    save_weights(model.state_dict(), tmp_path / "m.pth")
    return model, tmp_path / "m.pth"


def flatten(weights, name):
    weights[name] = weights[name].flatten()


def rewrite(path, change):
    weights = torch.load(path)
    change(weights)
    torch.save(weights, path)


def test_sizes_are_inferred_from_the_tensors(saved):
    model, path = saved
    loaded = RWKV7.from_checkpoint(path)
    assert loaded.config == CONFIG
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_dtype_conversion_and_safetensors(saved, tmp_path):
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


def test_loading_imports_neither_the_compiler_nor_plotting(saved):
    """Each takes a second, for which the first prompt of a chat would wait."""
    code = "import sys; from src.model import RWKV7; RWKV7.from_checkpoint(sys.argv[1]); print(*sys.modules)"
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved[1])], cwd=root, capture_output=True, text=True, check=True
    )
    assert "src.model.rwkv7" in done.stdout.split()
    assert not {"torch._dynamo", "torch._inductor", "sympy", "matplotlib", "safetensors"} & set(done.stdout.split())


@pytest.mark.parametrize("prefix", WRAPPER_PREFIXES)
def test_prefixes_of_wrappers_are_removed(saved, prefix):
    _, path = saved

    def add_prefix(weights):
        for name in list(weights):
            weights[prefix + name] = weights.pop(name)

    rewrite(path, add_prefix)
    assert RWKV7.from_checkpoint(path).config == CONFIG


class OpensFile:
    """Unpickling it creates a file."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def test_code_in_a_pickle_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"emb.weight": OpensFile()}, "hostile.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(OpensFile()))
    for name in ("hostile.pth", "raw.pth"):
        with pytest.raises(UserError) as caught:
            read_weights(name)
        assert str(caught.value.given) == name
        assert caught.value.expected or caught.value.advice
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text", "list"])
def test_an_error_about_an_unreadable_file_names_it(saved, damage):
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
    with pytest.raises(UserError) as caught:
        RWKV7.from_checkpoint(path)
    assert caught.value.given == path


def test_files_of_torch_before_1_6_are_read(saved):
    model, path = saved
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    assert torch.equal(RWKV7.from_checkpoint(path).head.weight, model.head.weight)


def test_weights_of_another_architecture_are_rejected(tmp_path):
    torch.save({"layer.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(UserError) as caught:
        RWKV7.from_checkpoint(tmp_path / "other.pth")
    assert caught.value.given == str(tmp_path / "other.pth")
    assert "emb.weight is missing" in caught.value.problem
    assert "RWKV-7" in caught.value.expected


@pytest.mark.parametrize("name", ["blocks.1.att.k_a", "blocks.1.att.unknown"])
def test_missing_and_unknown_parameters_are_named(saved, name):
    _, path = saved
    rewrite(path, lambda w: w.pop(name) if name in w else w.update({name: torch.zeros(1)}))
    with pytest.raises(UserError) as caught:
        RWKV7.from_checkpoint(path)
    assert name in caught.value.problem
    assert "--n_layer 2 --n_embd 64 --vocab_size 40" in caught.value.advice


@pytest.mark.parametrize(
    ("change", "name", "clause"),
    [
        (lambda w: w.pop("blocks.0.att.a1"), "blocks.0.att.a1", "is missing"),
        (lambda w: w.pop("blocks.0.att.g1"), "blocks.0.att.g1", "is missing"),
        (lambda w: flatten(w, "blocks.0.att.r_k"), "blocks.0.att.r_k", "is [64]"),
        (lambda w: flatten(w, "blocks.1.att.v1"), "blocks.1.att.v1", "is [1536]"),
        (lambda w: w.update({"emb.weight": w["emb.weight"].long()}), "emb.weight", "is int64"),
        (
            lambda w: w.update({"blocks.1.ffn.key.weight": w["blocks.1.ffn.key.weight"].to(torch.int8)}),
            "blocks.1.ffn.key.weight",
            "is int8",
        ),
    ],
)
def test_an_unusable_parameter_is_named(saved, change, name, clause):
    _, path = saved
    rewrite(path, change)
    with pytest.raises(UserError) as caught:
        RWKV7.from_checkpoint(path)
    assert caught.value.given == str(path)
    assert f"{name} {clause}" in caught.value.problem


def test_missing_blocks_are_numbered(saved):
    _, path = saved
    rewrite(path, lambda w: w.update({n.replace("blocks.1.", "blocks.3."): w.pop(n) for n in list(w) if "s.1." in n}))
    with pytest.raises(UserError) as caught:
        RWKV7.from_checkpoint(path)
    assert "[1, 2]" in caught.value.problem


def test_a_failed_save_leaves_the_earlier_file_intact(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def full(*_args, **_kwargs):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(model.state_dict(), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["m.pth"]


def test_files_that_are_not_state_dicts_are_rejected(saved, tmp_path):
    weights = saved[0].state_dict()
    for wrong, entry, nested in (
        ({"model": weights, "optimizer": {}}, "'model', 'optimizer'", "'model'"),
        ({**weights, 7: weights["head.weight"]}, "7", ""),
        ({**weights, "emb.weight": weights["emb.weight"].to_sparse()}, "'emb.weight'", ""),
    ):
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(UserError) as caught:
            read_weights(tmp_path / "wrong.pth")
        assert f"the entry {entry} is" in caught.value.problem
        assert nested in caught.value.advice
        assert bool(nested) == bool(caught.value.advice)


def test_a_folder_or_a_file_without_read_permission_is_named(saved, tmp_path, monkeypatch):
    _, path = saved
    with pytest.raises(UserError) as caught:
        read_weights(tmp_path)
    assert caught.value.given == tmp_path
    assert "(m.pth)" in caught.value.expected

    def deny(self, *args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", deny)  # root may read everything
    with pytest.raises(UserError) as caught:
        read_weights(path)
    assert caught.value.given == path
    assert "Permission denied" in caught.value.problem

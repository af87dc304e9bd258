"""Weights files: read without executing code, sizes inferred from the tensors, mismatches named."""

import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from src.errors import UserError
from src.model import RWKV7, ModelConfig
from src.model.file_kind import file_kind
from src.model.weights import IDLE_IN_LAYER_0, WRAPPER_PREFIXES, fit_weights, read_weights, save_weights

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


@pytest.mark.parametrize("placeholder", [(64, 8), (64, 1), (1,), None])
def test_the_rank_of_the_value_residual_is_not_that_of_layer_0(saved, placeholder):
    """Layer 0 doesn't use its own, and files hold placeholders of any shape there."""
    model, path = saved
    name = "blocks.0.att.v1"
    rewrite(path, lambda w: w.pop(name) if placeholder is None else w.update({name: torch.zeros(placeholder)}))
    loaded = RWKV7.from_checkpoint(path)
    assert loaded.config == CONFIG
    assert torch.equal(loaded.blocks[1].att.v1, model.blocks[1].att.v1)


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
    # no sizes make a file fit that lacks a parameter or has one too many, so none are advised
    assert "--n_layer" not in caught.value.advice
    assert "incomplete or of another architecture" in caught.value.advice


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


# ---- what kind of file it is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.pth", "m.bin", "m.st", "m.safetensors", "m.gguf", "m"])
@pytest.mark.parametrize("kind", ["zip", "pickle", "safetensors"])
def test_the_kind_of_a_file_is_that_of_its_bytes(saved, tmp_path, kind, name):
    from safetensors.torch import save_file

    model, _ = saved
    path = tmp_path / name
    if kind == "safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    loaded = RWKV7.from_checkpoint(path)
    assert loaded.config == CONFIG
    assert torch.equal(loaded.head.weight, model.head.weight)


@pytest.mark.parametrize("length", [0x80, 0x280, 0x8B1F, 0xB528])
def test_the_header_length_of_safetensors_is_no_signature(tmp_path, length):
    """0x80 is how a pickle begins, 1F 8B how gzip does; a safetensors file begins with the length of its header."""
    header = b'{"emb.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    path = tmp_path / "m.pth"
    path.write_bytes(length.to_bytes(8, "little") + header + bytes(4))
    assert file_kind(path) == "safetensors"
    assert read_weights(path)["emb.weight"].tolist() == [0.0]


def npz(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weight.npy", b"\x93NUMPY")


def torch_script(path):
    """By the names of its members; torch.jit.script, which would write a real one, is deprecated."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("model/data.pkl", "model/code/__torch__.py"):
            archive.writestr(name, b"")


FOREIGN_FILES = {
    "gguf": (b"GGUF\x03\0\0\0", "GGUF file"),
    "ggml": (b"fmgg\x64\0\0\0", "GGML file"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "page": (b"\n<!DOCTYPE html><html></html>", "web page"),
    "gzip": (b"\x1f\x8b\x08\0", "compressed"),
    "index": (b"MMIDIDX\0\0", "index of training data"),
    "npz": (npz, "weight.npy"),
    "TorchScript": (torch_script, "TorchScript"),
}


@pytest.mark.parametrize("kind", FOREIGN_FILES)
def test_files_of_other_programs_are_named(tmp_path, kind):
    content, named = FOREIGN_FILES[kind]
    path = tmp_path / "weights.pth"
    if callable(content):
        content(path)
    else:
        path.write_bytes(content + bytes(100))
    with pytest.raises(UserError) as caught:
        read_weights(path)
    assert caught.value.given == path
    assert named in caught.value.problem
    assert "cut short" not in caught.value.problem


OTHER_KINDS = {
    "LoRA": ("blocks.0.att.key.lora_A", "LoRA"),
    "LoRA of PEFT": ("base_model.model.model.layers.0.attn.r_proj.lora_A.weight", "LoRA"),
    "LoRA of web-rwkv": ("blocks.0.ffn.value.lora.1", "LoRA"),
    "MiSS": ("blocks.0.att.key.disha", "MiSS"),
    "state": ("blocks.0.att.time_state", "initial state"),
    "7a": ("blocks.0.ffn.s_emb.weight", "RWKV-7a"),
    "7b": ("blocks.0.qkv.k_emb.weight", "RWKV-7b"),
    "RWKV-6": ("blocks.0.att.time_maa_x", "earlier version"),
}


# states beside a whole model belong to it
@pytest.mark.parametrize(("kind", "alone"), [(k, a) for k in OTHER_KINDS for a in (True, False) if a or k != "state"])
def test_files_of_other_models_are_named_for_what_they_are(saved, kind, alone):
    """With and without the parameters of a whole model beside theirs, and without advice to use other sizes."""
    model, path = saved
    name, named = OTHER_KINDS[kind]
    torch.save({**({} if alone else model.state_dict()), name: torch.zeros(4, 4)}, path)
    for use in (lambda: RWKV7.from_checkpoint(path), lambda: fit_weights(read_weights(path), model, str(path), True)):
        with pytest.raises(UserError) as caught:
            use()
        assert caught.value.given == str(path)
        assert named in caught.value.problem
        assert name in caught.value.problem
        assert "--n_layer" not in caught.value.advice


# ---- advice and values -----------------------------------------------------------------------------------------------


def test_advice_on_sizes_holds(saved):
    """The advised sizes are those of a model that the weights fit; a file that fits no model gets no such advice."""
    model, _ = saved
    other = RWKV7(ModelConfig(3, 64, 40, head_size=32))
    with pytest.raises(UserError) as caught:
        fit_weights(model.state_dict(), other, "file")
    numbers = dict(zip(*[iter(caught.value.advice.removeprefix("they fit ").split())] * 2, strict=True))
    advised = ModelConfig(**{flag.removeprefix("--"): int(value) for flag, value in numbers.items()})
    assert fit_weights(model.state_dict(), RWKV7(advised), "file").keys() == model.state_dict().keys()

    lacking = {name: tensor for name, tensor in model.state_dict().items() if name != "blocks.1.ffn.x_k"}
    with pytest.raises(UserError) as caught:
        fit_weights(lacking, other, "file")
    assert "--n_layer" not in caught.value.advice
    assert "blocks.1.ffn.x_k is missing" in caught.value.advice
    wider = RWKV7(ModelConfig(2, 128, 40, head_size=32))
    with pytest.raises(UserError) as caught:  # --load_partial takes the parameter that is missing from the model
        fit_weights(lacking, wider, "file", partial=True)
    assert "--n_layer 2 --n_embd 64" in caught.value.advice


def test_sizes_that_no_model_has_are_an_error_about_the_file(saved):
    weights = saved[0].state_dict()
    weights["blocks.0.att.r_k"] = torch.zeros(8, 8)
    with pytest.raises(UserError) as caught:
        RWKV7.from_weights(weights, "file.pth")
    assert caught.value.given == "file.pth"
    assert "head_size 8" in caught.value.problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(saved, dtype, value):
    weights = {name: tensor.clone() for name, tensor in saved[0].state_dict().items()}
    RWKV7.from_weights({name: tensor.to(dtype) for name, tensor in weights.items()}, "file.pth")
    weights["blocks.1.att.key.weight"][3, 5] = value
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    with pytest.raises(UserError) as caught:
        RWKV7.from_weights(weights, "file.pth")
    assert caught.value.given == "file.pth"
    assert "blocks.1.att.key.weight" in caught.value.problem
    assert "not finite" in caught.value.problem


def test_unused_parameters_may_hold_anything(saved):
    weights = saved[0].state_dict()
    for name in IDLE_IN_LAYER_0:
        weights[name] = torch.full_like(weights[name], float("nan"))
    assert RWKV7.from_weights(weights, "file.pth").config == CONFIG


def test_weights_are_in_the_order_of_the_model(saved):
    model, _ = saved
    weights = dict(reversed(model.state_dict().items()))
    assert list(fit_weights(weights, model, "file.pth")) == list(model.state_dict())

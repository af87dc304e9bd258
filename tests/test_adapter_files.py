"""Adapter files: what PEFT loads and writes, the dialects of other programs, merging, and files that don't fit."""

import json
import re
from contextlib import nullcontext

import peft
import pytest
import torch
from random_adapter import random_adapter
from random_model import random_model
from safetensors.torch import save_file

from src.adapt import adapter_files
from src.adapt.adapter_files import read_adapter, write_adapter
from src.adapt.adapter_names import OTHER_MODULES, adapter_name, peft_name
from src.adapt.base_hash import base_sha256
from src.adapt.config import TARGETS, AdapterConfig
from src.adapt.merge import check_adapter, merge_adapter
from src.errors import UserError
from src.inference.formats.fla import fla_name
from src.model import RWKV7
from src.model.safetensors_file import write_safetensors

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 96, 0, 0, 11]])
SIZES = {"n_layer": 2, "n_embd": 64}
WHOLE = (
    *(f"{norm}.{part}" for norm in ("blocks.1.ln2", "blocks.0.att.ln_x", "ln_out") for part in ("weight", "bias")),
    *("blocks.1.att.k_k", "blocks.0.ffn.x_k", "blocks.0.ln1.weight"),
)


def logits(model):
    with torch.no_grad():
        return model(TOKENS)[0][0]


def merged_model(model, adapter):
    return RWKV7.from_weights(merge_adapter(model.state_dict(), adapter), "merged").eval()


CONFIGS = {
    "lora": AdapterConfig("lora", r=4, lora_alpha=6.0),
    "rslora": AdapterConfig("lora", r=4, lora_alpha=6.0, use_rslora=True, target_modules=("att.key", "ffn.key")),
    "lora and norms": AdapterConfig("lora", r=4, lora_alpha=6.0, train=("ln", "vectors")),
    "dora": AdapterConfig("dora", r=4, lora_alpha=6.0),
    "miss": AdapterConfig("miss", r=16),
    "miss with a remainder": AdapterConfig("miss", r=12, target_modules=("att.output", "ffn.value")),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_loads_what_is_written_and_merges_it_alike(tmp_path, kind):
    model = random_model(**SIZES)
    adapter = random_adapter(model, CONFIGS[kind], whole=WHOLE if kind == "lora and norms" else ())
    write_adapter(tmp_path / "adapter", adapter)
    merged = merged_model(model, adapter)
    before = logits(model)
    theirs = peft.PeftModel.from_pretrained(random_model(**SIZES), tmp_path / "adapter").eval()
    assert (logits(merged) - before).abs().max() > 0.1, "an adapter without effect would be equal in any format"
    torch.testing.assert_close(logits(theirs), logits(merged), rtol=1e-5, atol=1e-5)
    weights = theirs.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_a_write_that_fails_is_tried_twice(tmp_path, monkeypatch):
    adapter, attempts = random_adapter(random_model(**SIZES), CONFIGS["lora"]), []

    def write(tensors, path, metadata):
        attempts.append(path)
        if len(attempts) < 2 or not works:
            raise OSError("no space left")
        write_safetensors(tensors, path, metadata)

    monkeypatch.setattr(adapter_files, "write_safetensors", write)
    for works, count in ((True, 2), (False, 2)):
        attempts.clear()
        with nullcontext() if works else pytest.raises(OSError, match="adapter could not be written"):
            write_adapter(tmp_path / "adapter", adapter)
        assert len(attempts) == count
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert read_adapter(tmp_path / "adapter").config.r == 4


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_written_is_read_back(tmp_path, kind):
    model = random_model(**SIZES)
    adapter = random_adapter(model, CONFIGS[kind], whole=WHOLE if kind == "lora and norms" else ())
    for _ in range(2):  # over an earlier one, too
        write_adapter(tmp_path / "adapter", adapter)
    back = read_adapter(tmp_path / "adapter")
    assert back.base_sha256 == adapter.base_sha256
    assert back.base_path == "base.pth"
    assert (back.config.kind, back.config.r, back.config.target_modules, back.config.train) == (
        *(adapter.config.kind, adapter.config.r, adapter.config.target_modules),
        ("ln", "vectors") if kind == "lora and norms" else (),
    )
    if kind != "miss" and "miss" not in kind:
        assert back.config.scale == adapter.config.scale
    assert back.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in adapter.tensors.items())
    check_adapter(back, model.state_dict(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "miss"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_peft_writes_is_read_and_merged_alike(tmp_path, kind):
    targets = [*TARGETS] if kind != "rslora" else ["key", "value"]
    settings = {
        "miss": peft.MissConfig(r=12, target_modules=targets, init_weights=False),
        "lora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, modules_to_save=["ln1", "ln_out"]),
        "rslora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=True),
        "dora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_dora=True),
    }[kind]
    theirs = peft.get_peft_model(random_model(**SIZES), settings).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if re.search("lora_|miss_|modules_to_save", name):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    theirs.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.config.kind == kind.replace("rs", "")
    assert adapter.config.target_modules == (
        TARGETS if kind != "rslora" else ("att.key", "att.value", "ffn.key", "ffn.value")
    )
    model = random_model(**SIZES)
    check_adapter(adapter, model.state_dict(), tmp_path)
    torch.testing.assert_close(logits(merged_model(model, adapter)), logits(theirs), rtol=1e-5, atol=1e-5)


# ---- other programs --------------------------------------------------------------------------------------------------


def folder(path, tensors, **config):
    path.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 6.0} | config))
    return path


def fla_lora_name(name):
    module, _, part = name.rpartition(".")
    return f"base_model.model.{fla_name(module + '.weight').removesuffix('.weight')}.{part}.weight"


DIALECTS = {
    "old RWKV-PEFT": lambda path, t: torch.save(t, path),
    "web-rwkv": lambda path, t: save_file(
        {
            n.replace("lora_A", "lora.0").replace("lora_B", "lora.1"): (x.t() if "lora_A" in n else x)
            .half()
            .contiguous()
            for n, x in t.items()
        },
        path,
    ),
    "PEFT over fla": lambda path, t: folder(path, {fla_lora_name(n): x for n, x in t.items()}, r=4),
    "PEFT in a wrapper": lambda path, t: folder(
        path, {peft_name(n).replace("model.blocks", "model.model.blocks"): x for n, x in t.items()}, r=4
    ),
    "rwkvtune": lambda path, t: folder(path, t, r=4, target_modules=["key", "value_ffn"]),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_of_other_programs_are_read(tmp_path, dialect):
    adapter = random_adapter(random_model(**SIZES), CONFIGS["lora"])
    DIALECTS[dialect](tmp_path / "file", adapter.tensors)
    if not (tmp_path / "file").is_dir():
        with pytest.raises(UserError) as caught:
            read_adapter(tmp_path / "file")
        assert caught.value.flag == "lora_alpha"
        assert "rank 4" in caught.value.expected
    back = read_adapter(tmp_path / "file", None if (tmp_path / "file").is_dir() else 6.0)
    assert back.config == adapter.config
    assert back.tensors.keys() == adapter.tensors.keys()
    for name, tensor in adapter.tensors.items():
        torch.testing.assert_close(back.tensors[name], tensor, rtol=0, atol=1e-3 if dialect == "web-rwkv" else 0)


@pytest.mark.parametrize("key", ["disha", "bone"])
def test_earlier_names_of_miss_are_read(tmp_path, key):
    adapter = random_adapter(random_model(**SIZES), CONFIGS["miss"])
    torch.save({name.replace("miss_block", key): t for name, t in adapter.tensors.items()}, tmp_path / "rwkv-1.pth")
    back = read_adapter(tmp_path / "rwkv-1.pth")
    assert (back.config.kind, back.config.r) == ("miss", 16)
    assert back.tensors.keys() == adapter.tensors.keys()


def test_module_names_agree_with_those_of_the_model_format():
    for theirs, ours in OTHER_MODULES.items():
        if theirs != "attn":
            assert fla_name(f"blocks.0.{ours}.weight") == f"model.layers.0.{theirs}.weight"
    for name in ("ln_out.weight", "emb.weight", "head.weight", "blocks.7.att.x_r", "blocks.0.ln0.bias"):
        assert str(adapter_name("base_model.model." + fla_name(name))) == name
        assert str(adapter_name(peft_name(name))) == name


def test_states_are_read_in_either_axis_order(tmp_path):
    model = random_model(**SIZES)
    adapter = random_adapter(model, AdapterConfig("state", target_modules=()))
    write_adapter(tmp_path / "state.pth", adapter)
    assert torch.load(tmp_path / "state.pth", weights_only=True).keys() == adapter.tensors.keys()
    swapped = {name: t.transpose(1, 2).contiguous() for name, t in adapter.tensors.items()}
    save_file(swapped, tmp_path / "web-rwkv.state")
    torch.save({name: t.flatten(0, 1) for name, t in swapped.items()}, tmp_path / "swapped.pth")
    for name, layout in {"state.pth": "", "web-rwkv.state": "", "swapped.pth": "key-value"}.items():
        back = read_adapter(tmp_path / name, state_layout=layout)
        assert back.config.kind == "state"
        assert all(torch.equal(back.tensors[key], t) for key, t in adapter.tensors.items()), name
    other = read_adapter(tmp_path / "state.pth", state_layout="key-value")
    assert not torch.equal(other.tensors["blocks.0.att.time_state"], adapter.tensors["blocks.0.att.time_state"])


# ---- what doesn't fit ------------------------------------------------------------------------------------------------


def lora_tensors():
    return dict(random_adapter(random_model(**SIZES), CONFIGS["lora"]).tensors)


def renamed(tensors, old, new):
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


BAD_FILES = {
    "no config": (lambda p: p.mkdir(), "adapter_config.json"),
    "no tensors": (lambda p: (p.mkdir(), (p / "adapter_config.json").write_text("{}")), "without tensors"),
    "damaged config": (lambda p: (p.mkdir(), (p / "adapter_config.json").write_text("{")), "can't be read"),
    "another method": (lambda p: folder(p, lora_tensors(), peft_type="IA3"), "IA3"),
    "rank": (lambda p: folder(p, lora_tensors(), r=8), "rank 8"),
    "no number": (lambda p: folder(p, lora_tensors(), lora_alpha="large"), 'lora_alpha is "large"'),
    "ranks": (
        lambda p: folder(
            p,
            lora_tensors()
            | {"blocks.0.att.key.lora_A": torch.zeros(2, 64)}
            | {"blocks.0.att.key.lora_B": torch.zeros(64, 2)},
        ),
        "has rank 2",
    ),
    "half a pair": (lambda p: torch.save({"blocks.0.att.key.lora_A": torch.zeros(4, 64)}, p), "other half"),
    "PiSSA of PEFT": (lambda p: folder(p, lora_tensors(), init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
    "rank_pattern": (lambda p: folder(p, lora_tensors(), rank_pattern={"key": 8}), "rank_pattern"),
    "MiSS bat": (lambda p: torch.save({"blocks.0.att.key.miss_block": torch.zeros(16, 4, 4)}, p), "bat"),
    "another matrix": (lambda p: folder(p, renamed(lora_tensors(), "att.key", "att.gate")), "att.gate"),
    "a model": (lambda p: torch.save(random_model(**SIZES).state_dict(), p), "a whole model"),
    "norms only": (lambda p: torch.save({"blocks.0.ln1.weight": torch.ones(64)}, p), "not an adapter"),
    "a state of another shape": (
        lambda p: torch.save({"blocks.0.att.time_state": torch.zeros(3, 5, 7)}, p),
        "[3, 5, 7]",
    ),
    "alpha twice": (lambda p: folder(p, lora_tensors()), "the file says 6"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_can_not_be_used_are_named(tmp_path, case):
    write, message = BAD_FILES[case]
    write(tmp_path / "file")
    with pytest.raises(UserError) as caught:
        read_adapter(tmp_path / "file", 32.0 if case == "alpha twice" else None)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_an_adapter_of_another_base_is_refused():
    model, config = random_model(**SIZES), CONFIGS["lora"]
    adapter = random_adapter(model, config)
    other = random_model(seed=2, **SIZES).state_dict()
    with pytest.raises(UserError, match="other numbers") as caught:
        check_adapter(adapter, other, "adapter")
    assert caught.value.expected == "base.pth"
    check_adapter(adapter, other, "adapter", other_base=True)
    for sizes, message in (({"n_layer": 1}, "blocks.1"), ({"n_embd": 128}, "expected [4, 128]")):
        with pytest.raises(UserError, match=re.escape(message)):
            check_adapter(adapter, random_model(**SIZES | sizes).state_dict(), "adapter", other_base=True)
    state = random_adapter(model, AdapterConfig("state", target_modules=()))
    with pytest.raises(UserError, match=r"time_state is \[1, 64, 64\], expected \[2, 64, 64\]"):
        check_adapter(state, random_model(**SIZES | {"n_embd": 128}).state_dict(), "state")
    adapter.tensors["blocks.0.att.key.lora_B"][0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        check_adapter(adapter, model.state_dict(), "adapter")


def test_the_hash_of_a_base_is_that_of_its_numbers():
    weights = random_model(**SIZES).bfloat16().state_dict()
    stripped = {name: t.float() for name, t in reversed(weights.items()) if not name.startswith("blocks.0.att.v")}
    squeezed = {name: t.squeeze() for name, t in stripped.items()}
    assert base_sha256(weights) == base_sha256(
        squeezed | {"blocks.0.att.value.weight": weights["blocks.0.att.value.weight"]}
    )
    full = random_model(**SIZES).state_dict()
    assert base_sha256(full) == base_sha256({name: t.double() for name, t in full.items()})
    assert base_sha256(full) not in (base_sha256(weights), base_sha256(random_model(**SIZES).half().state_dict()))
    changed = weights | {"blocks.1.ffn.value.weight": weights["blocks.1.ffn.value.weight"] + 1}
    assert base_sha256(weights) != base_sha256(changed)


def test_merging_rounds_once_and_leaves_the_rest(tmp_path):
    model = random_model(**SIZES).bfloat16()
    base = model.state_dict()
    adapter = random_adapter(model, AdapterConfig("lora", r=4, lora_alpha=6.0, target_modules=("ffn.value",)))
    merged = merge_adapter(base, adapter)
    a, b = (adapter.tensors[f"blocks.1.ffn.value.lora_{part}"].double() for part in "AB")
    exact = base["blocks.1.ffn.value.weight"].double() + 1.5 * b @ a
    error = (merged["blocks.1.ffn.value.weight"].double() - exact).abs()
    assert bool((error <= exact.abs() * 2.0**-8).all())
    assert merged["blocks.1.ffn.value.weight"].dtype == torch.bfloat16
    assert all(merged[name] is base[name] for name in base if "ffn.value" not in name)

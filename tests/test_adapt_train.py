"""Runs that train an adapter or initial states: results, resuming, refusals, estimates. Real fits of a tiny model."""

import json
from dataclasses import asdict

import pytest
import torch
from random_model import random_model
from safetensors.torch import save_file
from training_runs import CTX, VOCAB, losses, train, train_until, verified

from src.adapt.adapter import add_adapter
from src.adapt.adapter_files import read_adapter
from src.adapt.base_hash import base_sha256
from src.adapt.quantize import quantize_base
from src.cli import interpret, parse
from src.config import refusal
from src.model import RWKV7, ModelConfig
from src.model.weights import read_weights
from src.training import trainer
from src.training.checkpoint.storage import state_folders
from src.training.data import HeldOut
from src.training.model_setup import with_known_sizes
from src.training.run import run

SIZES = {"n_layer": 2, "n_embd": 32, "head_size": 16, "vocab_size": VOCAB, "d_decay_lora": 8, "d_gate_lora": 24}
SHORT = {"my_exit_tokens": CTX * 4 * 12, "epoch_steps": 4, "epoch_save": 1, "lr_init": 1e-2, "lr_final": 1e-2}


@pytest.fixture
def base(tmp_path):
    model = random_model(**SIZES)
    torch.save(model.state_dict(), tmp_path / "base.pth")
    return tmp_path / "base.pth"


def adapt(out, data, base, **changed):
    return train(out, data, load_model=base, **{**SHORT, **changed})


def tensors(path):
    return read_adapter(path).tensors


LORA = {"peft": "lora", "lora_r": 4, "lora_dropout": 0.3, "grad_cp": 1, "save_minutes": 1e-6}
STATE = {"train_type": "state", "save_minutes": 1e-6}


@pytest.mark.parametrize(
    "changed",
    [LORA, STATE, {"peft": "pissa", "lora_r": 4, "quant": "int8", "save_minutes": 1e-6}],
    ids=["lora", "state", "pissa"],
)
def test_a_killed_run_continues_to_the_same_adapter(changed, tmp_path, data, base, monkeypatch):
    final = "state.pth" if changed is STATE else "adapter"
    before = base.read_bytes()
    assert adapt(tmp_path / "whole", data, base, **changed) == 0
    train_until(7, tmp_path / "cut", data, monkeypatch, load_model=base, **{**SHORT, **changed})
    assert not (tmp_path / "cut" / final).exists()
    assert adapt(tmp_path / "cut", data, base, **changed) == 0
    whole, cut = tensors(tmp_path / "whole" / final), tensors(tmp_path / "cut" / final)
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert any(tensor.abs().max() > 1e-3 for tensor in whole.values())
    assert base.read_bytes() == before


def test_a_run_leaves_adapters_and_a_state_of_the_adapter_alone(tmp_path, data, base):
    out = tmp_path / "run"
    assert adapt(out, data, base, peft="lora", lora_r=4, lora_train="ln", val_data_file=data, val_windows=8) == 0
    assert {path.name for path in out.glob("adapter*")} == {
        "adapter",
        "adapter-0",
        "adapter-1",
        "adapter-2",
        "adapter-best",
    }
    assert not list(out.glob("rwkv-*"))
    adapter = read_adapter(out / "adapter")
    assert (adapter.config.r, adapter.config.lora_alpha) == (4, 64.0)
    assert adapter.base_sha256 == base_sha256(read_weights(base))
    recorded = json.loads((out / "run.json").read_text())
    assert recorded["origin"]["path"] == str(base)
    assert recorded["settings"]["base_sha256"] == adapter.base_sha256
    keys = verified(state_folders(out)[0]).tensors()
    assert {key.rsplit("/", 1)[0] for key in keys} == set(adapter.tensors)
    assert {key.rsplit("/", 1)[1] for key in keys} == {"master", "exp_avg", "exp_avg_sq"}


def test_the_adapter_has_the_held_out_loss_that_the_run_reports(tmp_path, data, base):
    out = tmp_path / "run"
    assert adapt(out, data, base, peft="lora", lora_r=4, val_data_file=data, val_windows=8, quant="nf4") == 0
    rows = [line.split(",") for line in (out / "val.csv").read_text().splitlines()]
    losses = [float(row[rows[0].index("loss")]) for row in rows[1:]]
    assert losses[-1] < losses[0] - 0.05  # the first was measured before the first step
    config, _ = parse(
        ["--data_file", str(data), "--val_data_file", str(data), "--ctx_len", str(CTX), "--val_windows", "8"]
    )
    adapter = read_adapter(out / "adapter")
    model = RWKV7.from_checkpoint(base)
    quantize_base(model, "nf4")
    add_adapter(model, adapter.config)
    model.load_state_dict(adapter.tensors, strict=False)
    total = count = 0.0
    with torch.no_grad():
        for inputs, targets in HeldOut(config).batches(0, 1):
            logits = model(inputs)[0].flatten(0, 1)
            total += torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum").item()
            count += int((targets >= 0).sum())
    assert total / count == pytest.approx(losses[-1], abs=1e-4)


def test_fp16_takes_the_steps_of_fp32(tmp_path, data, base):
    short = {"peft": "dora", "lora_r": 4, "my_exit_tokens": CTX * 4 * 4}
    for precision in ("fp32", "fp16"):
        assert adapt(tmp_path / precision, data, base, precision=precision, **short) == 0
    expected, half = losses(tmp_path / "fp32"), losses(tmp_path / "fp16")
    assert half == pytest.approx(expected, abs=0.02)
    assert abs(expected[0] - expected[-1]) > 0.05


def test_another_base_and_another_kind_are_refused(tmp_path, data, base, capfd, monkeypatch):
    out = tmp_path / "run"
    assert adapt(out, data, base, **STATE) == 0
    other = tmp_path / "other.pth"
    torch.save(random_model(seed=1, **SIZES).state_dict(), other)
    for _ in ("complete", "as stopped in its last step"):
        assert adapt(out, data, other, **STATE) == 2
        assert "an adapter of other weights" in capfd.readouterr().err
        (out / "state.pth").unlink(missing_ok=True)
    assert adapt(out, data, base, peft="lora") == 2
    assert "--peft lora: was none in the run of" in capfd.readouterr().err
    assert train(out, data, load_model=base, **SHORT) == 2
    assert "--train_type none: was state" in capfd.readouterr().err
    # the same numbers in another file are the same base
    converted = tmp_path / "converted.safetensors"
    save_file(read_weights(base), converted)
    checked = []
    monkeypatch.setattr(trainer, "refuse_unusable", lambda *args: checked.append(args[-1]))
    assert adapt(out, data, converted, **STATE) == 0
    assert checked == ["state.pth"]  # here, too, where no step is left
    assert (out / "state.pth").exists()


def test_the_sizes_come_from_the_weights(tmp_path, data, base):
    argv = [
        "--load_model",
        base,
        "--data_file",
        data,
        "--proj_dir",
        tmp_path / "run",
        "--tokenizer",
        "",
        "--n_layer",
        "2",
    ]
    config, _, faults = interpret([str(word) for word in argv])
    assert not faults
    config = with_known_sizes(config, config.given)
    own = asdict(config.model_config(VOCAB))
    expected = asdict(ModelConfig(**SIZES))
    assert {name: own[name] for name in expected} == expected
    explicit, _, _ = interpret([str(word) for word in [*argv, "--n_embd", "512"]])
    assert with_known_sizes(explicit, explicit.given).n_embd == 512  # what is given is not replaced


@pytest.mark.parametrize("kind", ["state", "lora"])
def test_check_dry_run_and_plan_know_adapters(kind, tmp_path, data, base, capfd):
    flags = [
        "--load_model",
        base,
        "--data_file",
        data,
        "--proj_dir",
        tmp_path / "run",
        "--ctx_len",
        CTX,
        "--micro_bsz",
        4,
    ]
    flags += ["--accelerator", "cpu", "--vocab_size", VOCAB]
    flags += ["--train_type", "state"] if kind == "state" else ["--peft", kind, "--lora_dropout", "0.1"]
    argv = [str(word) for word in flags]
    assert run(*parse([*argv, "--dry_run"])) == 0
    assert "OK: 2 of" in capfd.readouterr().out
    assert run(*parse([*argv, "--plan"])) == 0
    output = capfd.readouterr().out
    assert "the frozen base is stored as it is" in output
    assert "deepspeed_stage_3" not in output
    run(*parse([*argv, "--check"]))
    assert "model  L2-D32" in capfd.readouterr().out
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*adapter*"))


def test_the_table_of_combinations_names_reasons():
    assert refusal("full", "fp32", "ZeRO 3") is None
    assert refusal("lora", "nf4", "ZeRO 2") is None
    assert refusal("full", "nf4", "one process").flag == "quant"
    assert refusal("state", "int8", "ZeRO 3").flag == "strategy"

"""The precision on a CPU without --precision: measured for a new run, kept by a resumed one."""

import json
import time

import pytest
import torch

from src import run_folder
from src.config import RunConfig
from src.training.hardware import cpu_precision
from src.training.hardware.selection import choose_hardware


def config(folder, **changed):
    return RunConfig(**{"proj_dir": str(folder), "accelerator": "cpu", "n_embd": 512, **changed})


@pytest.mark.parametrize(("gain", "expected"), [(0.3, "fp32"), (1.2, "fp32"), (2.4, "bf16")])
def test_bf16_is_chosen_only_where_it_is_clearly_faster(tmp_path, monkeypatch, gain, expected):
    monkeypatch.setattr(cpu_precision, "product_rates", lambda width, tokens: (100.0, 100 * gain))
    hardware = choose_hardware(config(tmp_path))
    assert hardware.precision == expected
    assert any(
        f"{expected}: " in note and f"100 GFLOP/s in fp32 and {100 * gain:.0f} in bf16" in note
        for note in hardware.notes
    )


@pytest.mark.parametrize("began", ["fp32", "bf16", "tf32"])
@pytest.mark.parametrize("gain", [0.3, 6.0])
def test_a_resumed_run_keeps_its_precision(tmp_path, monkeypatch, began, gain):
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"precision": began, "accelerator": "cpu"}}))
    monkeypatch.setattr(cpu_precision, "product_rates", lambda width, tokens: (100.0, 100 * gain))
    assert choose_hardware(config(tmp_path)).precision == began
    assert choose_hardware(config(tmp_path, restart=1)).precision == ("bf16" if gain > 1 else "fp32")


def test_a_new_run_in_the_folder_of_an_earlier_one_is_measured(tmp_path, monkeypatch):
    """Another file under the name rwkv-init.pth starts another run, which inherits nothing."""
    weights = tmp_path / "rwkv-init.pth"
    weights.write_bytes(b"old")
    origin = run_folder.fingerprint(weights)
    (tmp_path / "run.json").write_text(
        json.dumps({"settings": {"precision": "fp32", "accelerator": "cpu"}, "origin": origin})
    )
    monkeypatch.setattr(cpu_precision, "product_rates", lambda width, tokens: (100.0, 100 * 6.0))
    assert choose_hardware(config(tmp_path, train_stage=3)).precision == "fp32"
    weights.write_bytes(b"new")
    assert choose_hardware(config(tmp_path, train_stage=3)).precision == "bf16"


def test_the_precision_of_a_run_on_a_gpu_is_not_kept(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"precision": "bf16", "accelerator": "gpu"}}))
    monkeypatch.setattr(cpu_precision, "product_rates", lambda width, tokens: (100.0, 100 * 0.3))
    assert choose_hardware(config(tmp_path)).precision == "fp32"


@pytest.mark.parametrize("changed", [{"precision": "fp32"}, {"n_embd": 256}, {"devices": "2"}], ids=str)
def test_nothing_is_measured_where_the_result_is_known(tmp_path, monkeypatch, changed):
    monkeypatch.setattr(cpu_precision, "product_rates", lambda width, tokens: pytest.fail("measured"))
    assert choose_hardware(config(tmp_path, **changed)).precision == "fp32"


def test_the_measurement_takes_less_than_two_seconds():
    start = time.process_time()  # of this process: another one may have the core in between
    assert min(cpu_precision.product_rates(512, 2048)) > 0
    assert time.process_time() - start < 2 * torch.get_num_threads()  # some hundredths of a second

"""Devices beside CPUs and CUDA's. There is none here: PyTorch's answers about them are replaced."""

import pytest
import torch

from src.config import RunConfig
from src.errors import UserError
from src.ops.devices import default_precision, find_device, free_device_memory, sum_dtype
from src.training.hardware.lightning_accelerator import single_device
from src.training.hardware.selection import Hardware, choose_hardware, lightning_strategy
from src.training.preflight.kernel import TOLERANCE, kernel_error
from tests.training_runs import train


@pytest.fixture
def one_xpu(monkeypatch):
    """PyTorch finds one Intel GPU."""
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda: "Arc A770")
    monkeypatch.setattr(torch.xpu, "mem_get_info", lambda index: (5 << 30, 16 << 30))


@pytest.mark.parametrize(("name", "expected"), [
    ("sundial", "no such device"), ("meta", "not supported"), ("xpu", "finds no xpu device"),
    ("mps", "finds no mps device"),
])  # fmt: skip
def test_what_is_not_there_is_a_mistake_of_the_user(name, expected):
    with pytest.raises(UserError, match=expected) as caught:
        find_device(name, "device")
    assert (caught.value.flag, caught.value.given) == ("device", name)
    with pytest.raises(UserError, match=expected):
        choose_hardware(RunConfig(accelerator=name))


def test_what_is_there_is_found(one_xpu):
    assert find_device("cpu", "device") == torch.device("cpu")
    assert find_device("xpu:0", "device") == torch.device("xpu", 0)
    with pytest.raises(UserError, match="finds 1 of them"):
        find_device("xpu:1", "device")
    assert free_device_memory("xpu") == 5 << 30


def test_a_run_takes_the_device_with_the_precision_that_suits_it(one_xpu):
    hardware = choose_hardware(RunConfig(accelerator="xpu"))
    assert (hardware.device_type, hardware.precision, hardware.strategy) == ("xpu", "bf16", "plain")
    assert (hardware.device_name, hardware.description) == ("Arc A770", "1 process")
    assert choose_hardware(RunConfig(accelerator="xpu", precision="fp32")).precision == "fp32"
    strategy = lightning_strategy(RunConfig(), hardware)
    assert strategy.root_device == torch.device("xpu", 0)
    for flag, value in (("devices", "2"), ("num_nodes", "2")):
        with pytest.raises(UserError, match="1 with --accelerator xpu") as caught:
            choose_hardware(RunConfig(accelerator="xpu", **{flag: value}))
        assert caught.value.flag == flag


def test_mps_has_no_float64_and_no_safe_bf16():
    assert default_precision("mps") == "fp32"
    assert sum_dtype(torch.device("mps")) == torch.float32
    assert sum_dtype(torch.device("cpu")) == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_portable_kernel_passes_the_check_of_a_run(dtype):
    assert kernel_error("cpu", dtype, 64, "portable") < TOLERANCE[dtype] / 2


def test_a_run_trains_on_a_device_that_lightning_does_not_know(tmp_path, data, one_xpu, monkeypatch):
    """The CPU under another name, by the accelerator and the strategy of such a device."""
    used = []

    def on_a_cpu(device_type):
        used.append(device_type)
        return single_device("cpu")

    monkeypatch.setattr(Hardware, "device_type", "cpu")
    monkeypatch.setattr("src.training.hardware.lightning_accelerator.single_device", on_a_cpu)
    assert train(tmp_path / "run", data, accelerator="xpu", kernel="portable", precision="fp32") == 0
    assert used
    assert (tmp_path / "run" / "rwkv-final.pth").exists()

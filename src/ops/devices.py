"""Devices beside CPUs and CUDA's: whether PyTorch has one, what it is called, its memory, the precision that suits it.

Such a device is a name that torch.device knows, with a module torch.NAME: mps (Apple), xpu (Intel), and those that a
package adds to PyTorch when it is installed, such as npu. None could be tried on hardware by this project's tests.
"""

from __future__ import annotations

from typing import Any

import torch

from src.errors import UserError

NAMED = "cpu, cuda, cuda:1, mps, xpu, or another device of torch.accelerator"


def find_device(name: str, flag: str) -> torch.device:
    """The device of that name. Raises UserError, about --`flag`, for one that PyTorch doesn't know or doesn't find."""
    # Checked here, as torch reports a missing device only when the first tensor is moved, in a message of many lines.
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError("no such device", flag=flag, given=name, expected=NAMED) from error
    if device.type == "cpu":
        return device
    module: Any = getattr(torch, device.type, None)
    if not (hasattr(module, "is_available") and hasattr(module, "device_count")):  # meta, or a back end without it
        raise UserError("not supported", flag=flag, given=name, expected=f"{NAMED} (AMD GPUs are cuda devices)")
    if not module.is_available():
        what = "GPU" if device.type == "cuda" else f"{device.type} device"
        advice = "leave the flag out to use the CPU" if flag == "device" else f"use --{flag} cpu"
        raise UserError(f"PyTorch finds no {what}", flag=flag, given=name, advice=advice)
    if (device.index or 0) >= (count := module.device_count()):
        raise UserError(f"PyTorch finds {count} of them, numbered from {device.type}:0", flag=flag, given=name)
    return device


def device_name(device_type: str) -> str:
    """What the driver calls the device, where its module says so: "Intel(R) Arc(TM) A770 Graphics"; else its type."""
    module = torch.get_device_module(device_type)
    return str(module.get_device_name()) if hasattr(module, "get_device_name") else device_type


def free_device_memory(device_type: str, index: int = 0) -> float | None:
    """Bytes that may still be allocated on a device; None where its module doesn't say."""
    module: Any = torch.get_device_module(device_type)
    if hasattr(module, "mem_get_info"):
        return float(module.mem_get_info(index)[0])
    if device_type == "mps":  # shares the machine's memory; the driver has a limit for it
        return float(module.recommended_max_memory() - module.driver_allocated_memory())
    return None


def default_precision(device_type: str) -> str:
    """bf16 where every such device of the last years multiplies it in hardware, else fp32."""
    # Apple's M1 has no bf16, and PyTorch takes it there only on macOS 14 and later.
    return "bf16" if device_type in ("cuda", "xpu") else "fp32"


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64, or fp32 on mps, which has no float64: of sums over many tokens."""
    return torch.float32 if device.type == "mps" else torch.float64

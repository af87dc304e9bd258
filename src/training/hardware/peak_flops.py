"""Peak FLOP/s of GPUs, from which a run's model FLOPs utilisation (MFU) is computed."""

from __future__ import annotations

import math
import re

import torch

from src.config import ModelConfig
from src.model.cost import training_flops_per_token
from src.training.hardware.selection import Hardware

# Dense bf16 matrix products with fp32 accumulation, TFLOP/s, by a pattern of the name that the driver reports; the
# first match counts, so that "H100 PCIe" stands before "H100". From the vendors' data sheets, which often print twice
# as much, with structured sparsity: NVIDIA's of each product (SXM boards unless the name says PCIe or NVL; GeForce
# cards from the architecture papers "Ampere GA102", "Ada", "RTX Blackwell"), AMD's of the Instinct series.
PEAKS: tuple[tuple[str, float], ...] = (
    (r"\bGB200\b", 2500.0),
    (r"\bB200\b", 2250.0),
    (r"\bH100 NVL\b", 835.0),
    (r"\bH100 PCIe\b", 756.0),
    (r"\b(H100|H200|H800|GH200)\b", 989.4),
    (r"\bH20\b", 148.0),
    (r"\b(A100|A800)\b", 312.0),
    (r"\bA40\b", 149.7),
    (r"\bRTX A6000\b", 154.8),
    (r"\bA30\b", 165.0),
    (r"\bA10\b", 125.0),
    (r"\bL40S\b", 362.0),
    (r"\bL40\b", 181.0),
    (r"\bL4\b", 121.0),
    (r"\bRTX 5090\b", 209.5),
    (r"\bRTX 4090\b", 165.2),
    (r"\bRTX 3090\b", 71.0),
    (r"\bMI300X\b", 1307.4),
    (r"\bMI250X\b", 383.0),
)


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of one device in dense bf16 products; None where the table has no entry.

    `device_name` is what torch.cuda.get_device_name returns: "NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090 D" (no
    entry), ...
    """
    if re.search(r"\bRTX \d+ (D|Laptop)\b", device_name):  # slower cards under the same name
        return None
    return next((peak * 1e12 for pattern, peak in PEAKS if re.search(pattern, device_name)), None)


def peak_tokens_per_second(model: ModelConfig, hardware: Hardware) -> float:
    """Tokens/s of the run with all devices at their peak FLOP/s; NaN where that is unknown (CPU, fp32, other GPUs)."""
    # fp16 products have the same peak as bf16 ones on all of these GPUs; fp32 and tf32 have others
    if hardware.accelerator != "gpu" or hardware.precision not in ("bf16", "fp16"):
        return math.nan
    peak = peak_flops(torch.cuda.get_device_name())
    return math.nan if peak is None else peak * hardware.world_size / training_flops_per_token(model)

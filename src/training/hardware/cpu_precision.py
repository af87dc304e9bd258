"""fp32 or bf16 on a CPU where --precision leaves it open: what the run began in, else what a short measurement says.

Most CPUs multiply bf16 slowly; those with AMX or AVX512-BF16 do it two to four times as fast as fp32. Only products are measured; the rest of
a step gains little, so bf16 has to be CLEARLY faster to be taken. A run keeps the precision that it began in, whatever a later measurement would say.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

from src import run_folder
from src.config import RunConfig

# Times as fast. Products are three quarters of an fp32 step, the rest takes up to 1.2 times as long in bf16, so a step takes 0.75 / 1.5 + 0.25 * 1.2 =
# 0.8 of the time there. Measured steps (tests/bench/train_step.py): products 2.4 times as fast, step 1.9; 3.5 and 2.0.
CLEARLY = 1.5
NARROWEST = 512  # n_embd: below it a step's time is not in its products
ROWS, REPETITIONS = 512, 5


def cpu_precision(config: RunConfig, processes: int) -> tuple[str, str]:
    """The precision, and a sentence for the user where it is not the plain default."""
    if began := _began_in(config):
        return began, f"{began}, in which this run began (--precision changes it)" if began != "fp32" else ""
    if processes > 1 or config.n_embd < NARROWEST:  # several processes might measure differently
        return "fp32", ""
    gain = bf16_gain(config.n_embd)
    if gain < CLEARLY:
        return "fp32", ""
    return "bf16", (
        f"bf16: this CPU multiplies it {gain:.1f} times as fast as fp32 (measured just now; --precision fp32 for fp32)"
    )


def _began_in(config: RunConfig) -> str:
    """The precision on a CPU of the run that goes on here; '' where a new one begins, or it began elsewhere."""
    proj_dir = Path(config.proj_dir)
    origin = run_folder.origin_weights(proj_dir, config.train_stage, config.load_model)
    if config.restart or run_folder.is_swapped(proj_dir, origin):
        return ""
    settings = run_folder.read_run(proj_dir).get("settings", {})
    return settings.get("precision", "") if settings.get("accelerator") == "cpu" else ""


def bf16_gain(width: int) -> float:
    """How many times as fast as fp32 products this CPU's bf16 products are, [512, C] x [C, 4C]; some hundredths of a second."""
    operands = {
        dtype: (torch.full((ROWS, width), 0.5, dtype=dtype), torch.full((width, 4 * width), 0.5, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in operands}
    for repetition in range(REPETITIONS + 1):  # in turns, so that both see the same machine; the first warms up
        for dtype, (x, weight) in operands.items():
            start = time.perf_counter()
            x @ weight
            if repetition:
                seconds[dtype].append(time.perf_counter() - start)
    fp32, bf16 = (statistics.median(s) for s in seconds.values())
    return fp32 / bf16

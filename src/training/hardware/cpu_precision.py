"""Chooses fp32 or bf16 on a CPU without --precision: the precision that the run began in, else by a short measurement.

Most CPUs multiply bf16 slowly; those with AMX or AVX512-BF16 do it two to four times as fast as fp32. Only products are
measured; the rest of a step gains little, so bf16 is chosen only where it is clearly faster. A resumed run is never
measured again: another result would change its precision halfway.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

from src import run_folder
from src.config import RunConfig

# bf16 is chosen when its products are so many times as fast. Products are three quarters of an fp32 step, and the rest
# takes up to 1.2 times as long in bf16, so a step takes 0.75 / 1.5 + 0.25 * 1.2 = 0.8 of the time there. Measured steps
# (tests/bench/train_step.py): products 2.4 times as fast, step 1.9; 3.5 and 2.0.
MIN_GAIN = 1.5
MIN_N_EMBD = 512  # below it products are not what a step's time is spent on
REPETITIONS = 5
LARGEST_PRODUCT = 5e9  # operations: fp32 takes some hundredths of a second for it
# Without bf16 instructions a bf16 product can take a hundred times as long as an fp32 one: a few rows show it.
FEW_ROWS = 16


def cpu_precision(config: RunConfig, processes: int) -> tuple[str, str]:
    """(precision, note for the user); the note is empty where fp32 was not measured."""
    if recorded := _recorded_precision(config):
        note = f"{recorded}, the precision that this run began in (--precision changes it)"
        return recorded, note if recorded != "fp32" else ""
    # several processes might measure differently, and their gradients have to be of one dtype
    if processes > 1 or config.n_embd < MIN_N_EMBD:
        return "fp32", ""
    fp32, bf16 = product_rates(config.n_embd, config.micro_bsz * config.ctx_len)
    speeds = f"this CPU multiplies the run's matrices at {fp32:.0f} GFLOP/s in fp32 and {bf16:.0f} in bf16"
    if bf16 < MIN_GAIN * fp32:
        return "fp32", f"fp32: {speeds}"
    return "bf16", f"bf16: {speeds} (--precision fp32 overrides this)"


def _recorded_precision(config: RunConfig) -> str:
    """The precision on a CPU of the run that is resumed; "" where a new run starts, or where it began on a GPU."""
    proj_dir = Path(config.proj_dir)
    origin = run_folder.origin_weights(proj_dir, config.train_stage, config.load_model)
    if config.restart or run_folder.is_swapped(proj_dir, origin):
        return ""
    settings = run_folder.read_run(proj_dir).get("settings", {})
    return settings.get("precision", "") if settings.get("accelerator") == "cpu" else ""


def product_rates(width: int, tokens: int) -> tuple[float, float]:
    """GFLOP/s of this CPU in fp32 and in bf16, at the product [tokens, C] x [C, 4C]; takes tenths of a second.

    Of a large product only some rows are computed.
    """
    few = _rates(width, FEW_ROWS, 1)
    if few[1] < few[0] / MIN_GAIN:
        return few
    return _rates(width, min(tokens, max(FEW_ROWS, round(LARGEST_PRODUCT / (8 * width * width)))), REPETITIONS)


def _rates(width: int, rows: int, repetitions: int) -> tuple[float, float]:
    operands = {
        dtype: (torch.full((rows, width), 0.5, dtype=dtype), torch.full((width, 4 * width), 0.5, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in operands}
    for repetition in range(repetitions + 1):
        for dtype, (x, weight) in operands.items():  # alternating, so that other load affects both alike
            start = time.perf_counter()
            x @ weight
            if repetition:  # the first one warms up
                seconds[dtype].append(time.perf_counter() - start)
    # a median ignores one disturbed product
    fp32, bf16 = (8 * rows * width * width / 1e9 / statistics.median(s) for s in seconds.values())
    return fp32, bf16

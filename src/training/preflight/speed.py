"""The expected speed of a run: measured in the run so far, else by a few complete steps on random tokens."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from src import run_folder
from src.config import ModelConfig, RunConfig
from src.model import RWKV7
from src.run_folder import METRICS
from src.run_log import read_columns
from src.training.hardware import memory_limits
from src.training.hardware.selection import Hardware
from src.training.objectives import NextToken
from src.training.objectives.segments import Segments
from src.training.optim import MasterAdamW, adam_arguments, parameter_groups
from src.training.preflight.checklist import Checklist
from src.training.preflight.out_of_memory import SAFE_SHARE, estimate, is_out_of_memory, oom_message

RECENT_STEPS = 50  # the last rows of metrics.csv, whose median is the speed
# Settings that decide how long a step takes: a speed measured with other values of these is not that of this run.
SPEED_SETTINGS = (
    *("n_layer", "n_embd", "head_size", "dim_ffn", "ctx_len", "micro_bsz", "grad_cp", "head_chunk"),
    *("chunk_ctx", "context_parallel", "kernel", "strategy", "compile", "cuda_graph"),
)
# A check should take seconds. The speed per token hardly depends on the number of samples, so a step that would take
# longer than STEP_SECONDS is timed with fewer.
TRIAL_SECONDS = 12.0  # of all timed steps together
STEP_SECONDS = 4.0
MAX_TRIAL_STEPS = 10
WARM_UP_TOKENS = 128


@dataclass(frozen=True)
class Speed:
    """Tokens per second, and how they were measured."""

    tokens_per_second: float
    detail: str


def expected_speed(checks: Checklist, config: RunConfig, hardware: Hardware, model: ModelConfig) -> Speed | None:
    """Tokens per second of all processes: of this run so far, else measured now. None where that isn't possible."""
    recorded = _recorded_speed(config, hardware)
    if recorded is not None:
        return recorded
    # The trial is one process, so it holds the whole model even where the run would partition it.
    one_process = replace(hardware, devices=1, num_nodes=1, strategy="plain")
    free = memory_limits.free_memory(hardware.accelerator, 1)
    if free is not None and estimate(config, model, one_process).total > SAFE_SHARE[hardware.accelerator] * free:
        checks.report(
            "time", "not measured: one process would be out of memory; --plan SPEED gives the time at a speed"
        )
        return None
    try:
        one = timed_steps(config, replace(model, grad_cp=bool(config.grad_cp)), hardware)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        checks.problems.append(oom_message(config, model, hardware, free, error))
        return None
    count = hardware.world_size
    scaled = f" of one process, times {count}, without communication" if count > 1 else ""
    return Speed(one.tokens_per_second * count, one.detail + scaled)


def _recorded_speed(config: RunConfig, hardware: Hardware) -> Speed | None:
    """From metrics.csv, when the run in the folder has the same SPEED_SETTINGS; else None."""
    proj_dir = Path(config.proj_dir)
    before = run_folder.read_run(proj_dir).get("settings", {})
    # dim_ffn 0 stands for a size derived from n_embd, which is compared itself; run.json records the derived one
    now = {name: getattr(config, name) for name in SPEED_SETTINGS if name != "dim_ffn" or config.dim_ffn}
    global_batch = config.micro_bsz * config.accumulate_grad_batches * hardware.data_parallel_size
    now |= {"precision": hardware.precision, "accelerator": hardware.accelerator, "global_batch": global_batch}
    if not (proj_dir / METRICS).is_file() or any(before.get(name) != value for name, value in now.items()):
        return None
    column = read_columns(proj_dir / METRICS).get("tokens_per_second", [])
    speeds = [speed for speed in column if math.isfinite(speed)][-RECENT_STEPS:]
    if not speeds:
        return None
    return Speed(float(np.median(speeds)), f"median of the last {len(speeds)} steps in {METRICS}")


def timed_steps(config: RunConfig, model_config: ModelConfig, hardware: Hardware) -> Speed:
    """Time complete steps (forward, backward, optimizer) of one process on random tokens, for about TRIAL_SECONDS.

    The micro batch is the run's, or as much of it as takes STEP_SECONDS; without torch.compile and communication.
    Raises the allocator's errors.
    """
    device = torch.device(hardware.device_type)
    with torch.device("meta"):
        model = RWKV7(model_config)
    model = model.to(hardware.dtype).to_empty(device=device)
    for parameter in model.parameters():
        # The values don't matter, but denormal numbers and infinities would change the speed.
        torch.nn.init.normal_(parameter, std=0.02)
    optimizer = MasterAdamW(parameter_groups(model, config.weight_decay), **adam_arguments(config))

    def step(rows: int, length: int) -> float:
        began = time.perf_counter()
        tokens = torch.randint(model_config.vocab_size, (rows, length + 1), device=device)
        # shorter than the run's samples perhaps, but in pieces where those are
        segments = Segments(min(config.chunk_ctx, max(1, length // 2)), length)
        loss, _ = NextToken(model.head, config.head_chunk, segments)(model, (tokens[:, :-1], tokens[:, 1:]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type != "cpu":  # kernels run asynchronously
            torch.get_device_module(device).synchronize()
        return time.perf_counter() - began

    length = min(config.ctx_len, WARM_UP_TOKENS)
    step(1, length)  # builds kernels and allocates the optimizer's moments
    per_token = step(1, length) / length
    affordable = max(1, int(STEP_SECONDS / per_token))
    length = min(config.ctx_len, affordable)
    rows = max(1, min(config.micro_bsz, affordable // length))
    began, times = time.perf_counter(), [step(rows, length)]
    while len(times) < MAX_TRIAL_STEPS and time.perf_counter() - began + times[-1] < TRIAL_SECONDS:
        times.append(step(rows, length))
    timed = times[1:] or times  # the first one at this size allocates memory
    return Speed(
        rows * length / statistics.median(timed),
        f"measured on {len(timed)} step{'s' * (len(timed) > 1)} of {rows} x {length} tokens",
    )

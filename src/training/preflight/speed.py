"""How fast the run will be: as it was so far, else by some whole steps on random tokens."""

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
from src.training.hardware.selection import Hardware
from src.training.objectives.next_token import HeadLoss
from src.training.optim import MasterAdamW, parameter_groups
from src.training.preflight import machine
from src.training.preflight.checklist import Checklist
from src.training.preflight.out_of_memory import SAFE, advice, estimate, is_out_of_memory

MEASURED_STEPS = 50  # of metrics.csv
# settings with which a step takes as long as in the run that was measured
DECIDES_SPEED = (
    *("n_layer", "n_embd", "head_size", "dim_ffn", "ctx_len", "micro_bsz", "grad_cp", "head_chunk"),
    *("kernel", "strategy", "compile"),
)
TRIAL_SECONDS = 12.0  # of timed steps
STEP_SECONDS = 4.0  # a step that would take longer is tried with fewer samples


@dataclass(frozen=True)
class Speed:
    """Tokens per second, and how they were found."""

    tokens_per_second: float
    detail: str


def expected_speed(checks: Checklist, config: RunConfig, hardware: Hardware, model: ModelConfig) -> Speed | None:
    """Tokens per second of all processes: of this run so far, else tried now."""
    measured = _measured_speed(config, hardware)
    if measured is not None:
        return measured
    alone = replace(hardware, devices=1, num_nodes=1, strategy="plain")  # the trial is one process
    free = machine.free_memory(hardware.accelerator, 1)
    if free is not None and estimate(config, model, alone).total > SAFE[hardware.accelerator] * free:
        checks.found(
            "time",
            "not tried, as one process has no memory for the whole run; --plan SPEED says how long it takes at a speed",
        )
        return None
    try:
        one = timed_steps(config, replace(model, grad_cp=bool(config.grad_cp)), hardware)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        checks.to_do.append(advice(config, model, hardware, free, str(error)))
        return None
    many = (
        ""
        if hardware.world_size == 1
        else f" of one process, times {hardware.world_size}: without the exchange between them"
    )
    return Speed(one.tokens_per_second * hardware.world_size, one.detail + many)


def _measured_speed(config: RunConfig, hardware: Hardware) -> Speed | None:
    """From metrics.csv, when the run in the folder was made with what decides the speed."""
    proj_dir = Path(config.proj_dir)
    before = run_folder.read_run(proj_dir).get("settings", {})
    now = {name: getattr(config, name) for name in DECIDES_SPEED if name != "dim_ffn" or config.dim_ffn}
    global_batch = config.micro_bsz * config.accumulate_grad_batches * hardware.world_size
    now |= {"precision": hardware.precision, "accelerator": hardware.accelerator, "global_batch": global_batch}
    if not (proj_dir / METRICS).is_file() or any(before.get(name) != value for name, value in now.items()):
        return None
    column = read_columns(proj_dir / METRICS).get("tokens_per_second", [])
    speeds = [speed for speed in column if math.isfinite(speed)][-MEASURED_STEPS:]
    if not speeds:
        return None
    return Speed(float(np.median(speeds)), f"the median of the last {len(speeds)} steps in {METRICS}")


def timed_steps(config: RunConfig, model_config: ModelConfig, hardware: Hardware) -> Speed:
    """Whole steps of one process (forward, backward, optimizer) of a model of this size on random tokens, for about TRIAL_SECONDS.

    The micro batch is the run's, or as much of it as a step of STEP_SECONDS takes; without torch.compile and without exchange between
    processes. Errors of the allocator pass through.
    """
    device = torch.device(hardware.device_type)
    with torch.device("meta"):
        model = RWKV7(model_config)
    model = model.to(hardware.dtype).to_empty(device=device)
    for parameter in model.parameters():  # the numbers don't matter, but denormals or infinities would change the speed
        torch.nn.init.normal_(parameter, std=0.02)
    adam = {"lr": 1e-6, "betas": (0.9, 0.99), "eps": 1e-8, "grad_clip": 1.0}
    optimizer = MasterAdamW(parameter_groups(model, 0.0), **adam)  # type: ignore[arg-type]
    head_loss = HeadLoss(model.head, config.head_chunk)

    def step(rows: int, length: int) -> float:
        begin = time.perf_counter()
        tokens = torch.randint(model_config.vocab_size, (rows, length + 1), device=device)
        head_loss(model.hidden(tokens[:, :-1])[0], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    length = min(config.ctx_len, 128)
    step(1, length)  # kernels are built and memory is fetched
    per_token = step(1, length) / length
    affordable = max(1, int(STEP_SECONDS / per_token))
    length = min(config.ctx_len, affordable)
    rows = max(1, min(config.micro_bsz, affordable // length))
    began, times = time.perf_counter(), [step(rows, length)]
    while len(times) < 10 and time.perf_counter() - began + times[-1] < TRIAL_SECONDS:
        times.append(step(rows, length))
    timed = times[1:] or times  # the first still fetches memory
    return Speed(
        rows * length / statistics.median(timed),
        f"measured now on {len(timed)} step{'s' * (len(timed) > 1)} of {rows} x {length} tokens",
    )

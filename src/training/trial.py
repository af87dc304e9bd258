"""Small trials before a run: the recurrence's kernel against the reference, and how fast steps are."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from src.config import ModelConfig, RunConfig
from src.model import RWKV7
from src.ops.reference import wkv7_reference
from src.ops.wkv7 import wkv7
from src.training.module import HeadLoss
from src.training.optim import MasterAdamW, parameter_groups
from src.training.strategy import Hardware

# |difference| / |reference| that counts as agreement: some units in the last place of the inputs' dtype
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
TRIAL_TOKENS, TRIAL_HEADS = 40, 2
TRIAL_SECONDS = 12.0  # of timed steps
STEP_SECONDS = 4.0  # a step that would take longer is tried with fewer samples


def kernel_error(device: str, dtype: torch.dtype, head_size: int, kernel: str) -> float:
    """The largest |difference| / |reference| over output, state and the seven gradients of one forward and backward pass.

    The reference computes in float64 from the same inputs. Not a number when the kernel's result isn't finite.
    """
    shape = (1, TRIAL_TOKENS, TRIAL_HEADS, head_size)
    numbers = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=numbers) for _ in range(5)]
    key = torch.nn.functional.normalize(torch.randn(shape, generator=numbers), dim=-1)
    inputs[4], b = -key, key * torch.sigmoid(inputs[4])
    state = torch.randn(1, TRIAL_HEADS, head_size, head_size, generator=numbers)
    given = [*(x.to(device, dtype) for x in (*inputs, b)), state.to(device)]
    weights = [torch.randn(shape, generator=numbers), torch.randn(state.shape, generator=numbers)]

    def outputs(op: object, double: bool) -> list[Tensor]:
        own = [(x.double() if double else x.clone()).requires_grad_() for x in given]
        made = wkv7_reference(*own) if op is wkv7_reference else wkv7(*own, kernel=kernel)
        loss = sum((made_one * w.to(made_one)).sum() for made_one, w in zip(made, weights, strict=True))
        grads = torch.autograd.grad(loss, own)  # type: ignore[arg-type]
        return [x.detach().double() for x in (*made, *grads)]

    pairs = zip(outputs(wkv7, False), outputs(wkv7_reference, True), strict=True)
    errors = [float((got - expected).norm() / expected.norm()) for got, expected in pairs]
    return float("nan") if any(error != error for error in errors) else max(errors)


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one process, and how they were found."""

    tokens_per_second: float
    words: str


def timed_steps(config: RunConfig, model_config: ModelConfig, hardware: Hardware) -> Speed:
    """Whole steps (forward, backward, optimizer) of a model of this size on random tokens, for about TRIAL_SECONDS.

    The micro batch is the run's, or as much of it as a step of STEP_SECONDS takes; without torch.compile and without exchange between
    processes. Errors of the allocator pass through.
    """
    device = torch.device("cuda" if hardware.accelerator == "gpu" else "cpu")
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

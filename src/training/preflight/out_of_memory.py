"""Which settings to change when a run is out of memory: from the estimate and the free memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from src.config import ModelConfig, RunConfig
from src.training.distributed.process_group import ProcessGroup
from src.training.hardware.selection import Hardware
from src.training.preflight import plan
from src.training.preflight.machine import free_memory
from src.training.preflight.plan import GIB, Memory

# share of what is free that an estimate may fill: a GPU's allocator rounds up, other programs need something of a machine's
SAFE = {"gpu": 0.92, "cpu": 0.85}
GAPS = 0.2  # of malloc on a CPU as allocator.py sets it up, as a share of the tensors; next to none where it is lean (--grad_cp 1)
SMALL_HEAD_CHUNK = 1024
# what CPU allocators, CUDA libraries and NCCL say in a RuntimeError
SIGNS = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "alloc_failed")
Change = dict[str, Any]  # flags and their new values


class OutOfMemory(Exception):
    """The run didn't fit; the text says what to change."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, Python or a library of the GPU says that memory is used up."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def estimate(config: RunConfig, model: ModelConfig, hardware: Hardware) -> Memory:
    """Memory of one process of this run, by the formulas of plan.py."""
    strategy = config.strategy if hardware.strategy == "deepspeed" else "auto"
    tokens = config.micro_bsz * config.ctx_len
    model = replace(model, grad_cp=bool(config.grad_cp))
    memory = plan.memory(
        model,
        strategy,
        hardware.world_size,
        hardware.precision,
        tokens,
        config.head_chunk,
        config.ds_bucket_mb,
        native_loss=hardware.accelerator == "gpu" or hardware.precision != "fp16",
        on_gpu=hardware.accelerator == "gpu",
    )
    with_gaps = hardware.accelerator == "cpu" and not config.grad_cp
    return replace(memory, gaps=GAPS * memory.total) if with_gaps else memory


def suggest_settings(config: RunConfig, model: ModelConfig, hardware: Hardware, allowed: float) -> list[str]:
    """Changes of flags with which the estimate stays within `allowed` bytes, a line each, those that cost least first.

    Each fits alone where that is possible; else together; else where the memory goes, and what is the least that is needed.
    """
    chunk = min(config.head_chunk or SMALL_HEAD_CHUNK, SMALL_HEAD_CHUNK)
    lean_head: Change = (
        {} if config.head_chunk == chunk or config.micro_bsz * config.ctx_len <= chunk else {"head_chunk": chunk}
    )
    recompute: Change = {} if config.grad_cp else {"grad_cp": 1}
    offers = [change for change in (lean_head, recompute, _smaller_batch(config, model, hardware, allowed)) if change]
    found = [change for change in offers if _total(config, change, model, hardware) <= allowed]
    if not found:
        both = {**lean_head, **recompute}
        if both and _total(config, both, model, hardware) <= allowed:
            found = [both]
        elif more := _smaller_batch(replace(config, **both), model, hardware, allowed):
            found = [{**both, **more}]
    if found:
        return [_describe(change, _total(config, change, model, hardware), hardware) for change in found]
    least: Change = {**lean_head, **recompute, "micro_bsz": 1}
    if hardware.accelerator == "gpu":
        for name in ("deepspeed_stage_2_offload", "deepspeed_stage_3_offload"):
            change: Change = {**least, "strategy": name}
            shared = replace(hardware, strategy="deepspeed")
            if config.strategy != name and (total := _total(config, change, model, shared)) <= allowed:
                return [
                    _describe(change, total, hardware)
                    + ": keeps the optimizer in the machine's memory, which needs deepspeed"
                ]
    need = _total(config, least, model, hardware)
    return [f"a smaller model (--n_layer, --n_embd): even {_flags(least)} needs {need / GIB:.1f} GiB by the estimate"]


def _total(config: RunConfig, change: Change, model: ModelConfig, hardware: Hardware) -> float:
    return estimate(replace(config, **change), model, hardware).total


def _smaller_batch(config: RunConfig, model: ModelConfig, hardware: Hardware, allowed: float) -> Change:
    """The largest micro batch that fits and keeps the samples of a step the same."""
    for micro_bsz in range(config.micro_bsz - 1, 0, -1):
        if config.micro_bsz % micro_bsz == 0:
            steps = config.accumulate_grad_batches * config.micro_bsz // micro_bsz
            change: Change = {"micro_bsz": micro_bsz, "accumulate_grad_batches": steps}
            if _total(config, change, model, hardware) <= allowed:
                return change
    return {}


def _flags(change: Change) -> str:
    return " ".join(f"--{name} {value}" for name, value in change.items())


def _describe(change: Change, total: float, hardware: Hardware) -> str:
    costs = []
    if "micro_bsz" in change:
        costs.append("the same steps, in smaller parts")
    if "grad_cp" in change:
        # measured on a CPU only, where memory is mapped anew, too (allocator.py)
        costs.append("blocks are computed twice" if hardware.accelerator == "gpu" else "steps take 40 to 95 % longer")
    if "head_chunk" in change:
        costs.append("costs next to nothing")
    return f"{_flags(change)}    {total / GIB:.1f} GiB by the estimate" + (f"; {costs[-1]}" if len(costs) == 1 else "")


def describe_parts(memory: Memory) -> str:
    """ "weights 0.1, gradients 0.1, ...: 2.3 GiB in all"."""
    names = ["weights", "gradients", "optimizer", "activations", "logits", *["gaps"] * (memory.gaps > 0)]
    parts = ", ".join(f"{name} {getattr(memory, name) / GIB:.2f}" for name in names)
    step = f" (during the optimizer's step {memory.step / GIB:.2f} instead of activations and logits)" * (
        memory.step > 0
    )
    at_once = " (logits and the block that is recomputed are not there at once)" * (memory.recomputed > 0)
    return f"{parts}{at_once}{step}: {memory.total / GIB:.2f} GiB at the most"


@contextmanager
def with_oom_advice(
    config: RunConfig, model: ModelConfig, hardware: Hardware, process_group: ProcessGroup
) -> Iterator[None]:
    """Turns an error of this block that means "no memory" into OutOfMemory."""
    free = free_memory(hardware.accelerator, hardware.devices, process_group.environment.local_rank())
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(advice(config, model, hardware, free, str(error))) from error


def advice(config: RunConfig, model: ModelConfig, hardware: Hardware, free: float | None, error: str = "") -> str:
    """What happened (`error`: in the allocator's words) and what to change. Where the estimate would have fitted, it was too low: a
    quarter less than it is aimed at."""
    memory = estimate(config, model, hardware)
    allowed = (
        0.75 * memory.total
        if free is None
        else min(SAFE[hardware.accelerator] * free, 0.75 * memory.total if error else memory.total)
    )
    where = "of the GPU" if hardware.accelerator == "gpu" else "of the machine"
    there = (
        ""
        if free is None
        else f"; {free / GIB:.2f} GiB were free for {'it' if hardware.devices == 1 else 'each process'}"
    )
    told = f"\n  ({(error.splitlines() or [''])[0][:200]})" if error else ""
    changes = suggest_settings(config, model, hardware, allowed)
    head = "what would fit:" if len(changes) == 1 else "each of these would fit:"
    return (
        f"out of memory {where}{told}\n  by the estimate the run takes {describe_parts(memory)}{there}\n  {head}\n    "
        + "\n    ".join(changes)
    )

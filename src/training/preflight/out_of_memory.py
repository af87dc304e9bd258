"""Recognises out-of-memory errors and suggests settings that fit, from the estimate and the free memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from src.adapt.config import adapter_of
from src.config import ModelConfig, RunConfig
from src.training.distributed.process_group import ProcessGroup
from src.training.hardware.memory_limits import free_memory
from src.training.hardware.selection import Hardware
from src.training.preflight import plan
from src.training.preflight.piece_memory import cut_of
from src.training.preflight.plan import GIB, Memory

# The share of free memory that an estimate may fill: a GPU's allocator rounds sizes up, and on a CPU other programs
# need memory too.
SAFE_SHARE = defaultdict(lambda: 0.85, gpu=0.92)  # by accelerator
# Unusable memory between the blocks of malloc as hardware/allocator.py sets it up, as a share of the tensors; with
# --grad_cp 1, where large tensors are mapped one by one, there is next to none. docs/running.md compares with real
# runs.
FRAGMENTATION_SHARE = 0.2
# After a run was out of memory although its estimate fitted, settings are suggested whose estimate is a quarter lower.
REDUCTION_AFTER_ERROR = 0.75
SMALL_HEAD_CHUNK = 1024
SMALLEST_PIECE = 256  # tokens, with which a processor is still busy
ERROR_CHARACTERS = 200  # of an allocator's message, which may continue with a report of many lines
# In the messages, in lower case, of RuntimeErrors of PyTorch's CPU allocator, the CUDA libraries and NCCL.
OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "alloc_failed",
)
Change = dict[str, Any]  # new values by flag


class OutOfMemory(Exception):
    """A run is out of memory; the text suggests settings that fit."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch, Python or a GPU library means that memory is exhausted."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The CPU allocator, cuBLAS and NCCL raise plain RuntimeErrors: only their text tells. This is the one place that
    # reads the text of an error.
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY_TEXTS)


def estimate(config: RunConfig, model: ModelConfig, hardware: Hardware) -> Memory:
    """Memory of one process of this run in bytes, by the formulas of plan.py."""
    strategy = config.strategy if hardware.strategy == "deepspeed" else "auto"
    model = replace(model, grad_cp=bool(config.grad_cp))
    memory = plan.memory(
        model,
        strategy,
        hardware.world_size,
        hardware.precision,
        cut_of(config),
        config.head_chunk,
        config.ds_bucket_mb,
        # on a CPU the native loss has no fp16
        native_loss=hardware.accelerator == "gpu" or hardware.precision != "fp16",
        on_gpu=hardware.accelerator == "gpu",
        adapter=adapter_of(config),
        quant=config.quant,
    )
    memory = plan.with_front_end(memory, config, model, hardware.precision)
    is_fragmented = hardware.accelerator == "cpu" and not config.grad_cp
    return replace(memory, fragmentation=FRAGMENTATION_SHARE * memory.total) if is_fragmented else memory


# ---- settings that fit -----------------------------------------------------------------------------------------------


def suggest_settings(config: RunConfig, model: ModelConfig, hardware: Hardware, allowed: float) -> list[str]:
    """Changes of settings with which the estimate stays within `allowed` bytes, cheapest first, one text each.

    Each change fits alone where one does, else one combination is given; both keep the number of samples per step.
    Where nothing fits, the text says what the smallest run would need.
    """
    chunk = min(config.head_chunk or SMALL_HEAD_CHUNK, SMALL_HEAD_CHUNK)
    # a micro batch with fewer tokens than a chunk has no smaller logits by it
    is_chunk_useful = config.head_chunk != chunk and cut_of(config).tokens > chunk
    small_head: Change = {"head_chunk": chunk} if is_chunk_useful else {}
    recompute: Change = {} if config.grad_cp else {"grad_cp": 1}
    batch = _smaller_batch(config, model, hardware, allowed)
    candidates = [small_head, recompute, batch, _pieces(config, model, hardware, allowed)]
    fitting = [change for change in candidates if change and _total(config, change, model, hardware) <= allowed]
    if not fitting:
        both = {**small_head, **recompute}
        smaller = replace(config, **both)
        if both and _total(config, both, model, hardware) <= allowed:
            fitting = [both]
        elif batch := _smaller_batch(smaller, model, hardware, allowed):
            fitting = [{**both, **batch}]
        elif pieces := _pieces(replace(smaller, micro_bsz=1), model, hardware, allowed):
            fitting = [{**both, **_batch_of_one(config), **pieces}]
    if fitting:
        return [_describe(change, _total(config, change, model, hardware), hardware) for change in fitting]
    smallest: Change = {**small_head, **recompute, "micro_bsz": 1}
    if hardware.accelerator == "gpu" and (offloaded := _offloaded(config, smallest, model, hardware, allowed)):
        return [offloaded]
    needed = _total(config, smallest, model, hardware) / GIB
    return [f"a smaller model (--n_layer, --n_embd): even {_flags(smallest)} needs {needed:.1f} GiB (estimate)"]


def _offloaded(config: RunConfig, smallest: Change, model: ModelConfig, hardware: Hardware, allowed: float) -> str:
    """The change with which the smallest run fits when its optimizer is in CPU memory; '' where it doesn't."""
    # stage 2 first: stage 3 keeps the weights in CPU memory too, which is slower
    for name in ("deepspeed_stage_2_offload", "deepspeed_stage_3_offload"):
        change: Change = {**smallest, "strategy": name}
        total = _total(config, change, model, replace(hardware, strategy="deepspeed"))
        if config.strategy != name and total <= allowed:
            return _describe(change, total, hardware) + "; keeps the optimizer in CPU memory, needs deepspeed"
    return ""


def _total(config: RunConfig, change: Change, model: ModelConfig, hardware: Hardware) -> float:
    return estimate(replace(config, **change), model, hardware).total


def _smaller_batch(config: RunConfig, model: ModelConfig, hardware: Hardware, allowed: float) -> Change:
    """The largest micro batch that fits and keeps the number of samples per step."""
    for micro_bsz in range(config.micro_bsz - 1, 0, -1):
        if config.micro_bsz % micro_bsz == 0:
            accumulated = config.accumulate_grad_batches * config.micro_bsz // micro_bsz
            change: Change = {"micro_bsz": micro_bsz, "accumulate_grad_batches": accumulated}
            if _total(config, change, model, hardware) <= allowed:
                return change
    return {}


def _batch_of_one(config: RunConfig) -> Change:
    return {"micro_bsz": 1, "accumulate_grad_batches": config.accumulate_grad_batches * config.micro_bsz}


def _pieces(config: RunConfig, model: ModelConfig, hardware: Hardware, allowed: float) -> Change:
    """The largest pieces of a sample with which the run fits; none below SMALLEST_PIECE tokens, which would be slow."""
    for pieces in range(2, config.ctx_len // SMALLEST_PIECE + 1):
        change: Change = {"chunk_ctx": config.ctx_len // pieces}
        is_smaller = not config.chunk_ctx or change["chunk_ctx"] < config.chunk_ctx
        if config.ctx_len % pieces == 0 and is_smaller and _total(config, change, model, hardware) <= allowed:
            return change
    return {}


def _flags(change: Change) -> str:
    return " ".join(f"--{name} {value}" for name, value in change.items())


def _describe(change: Change, total: float, hardware: Hardware) -> str:
    costs = []
    if "micro_bsz" in change:
        costs.append("the same steps in smaller parts")
    if "chunk_ctx" in change:
        costs.append("the same gradients for one more forward pass")
    if "grad_cp" in change:
        # Measured on a CPU only, where recomputing also maps memory anew (hardware/allocator.py).
        costs.append("blocks are computed twice" if hardware.accelerator == "gpu" else "steps take 40 to 95 % longer")
    if "head_chunk" in change:
        costs.append("costs next to nothing")
    # The costs of a combination don't add up to a sentence that is true, so only a single one is named.
    return f"{_flags(change)}    {total / GIB:.1f} GiB (estimate)" + (f"; {costs[0]}" if len(costs) == 1 else "")


def list_settings(changes: list[str], indent: str) -> str:
    """The result of `suggest_settings`, with a heading, one change per line."""
    heading = "this would fit:" if len(changes) == 1 else "each of these would fit:"
    return heading + "".join(f"\n{indent}{change}" for change in changes)


# ---- messages --------------------------------------------------------------------------------------------------------


def describe_memory(memory: Memory) -> str:
    """For example "weights 0.10, gradients 0.10, ...: 2.30 GiB at peak"."""
    names = ["weights", "gradients", "optimizer", "activations", "logits"]
    names += ["pieces"] * (memory.pieces > 0) + ["fragmentation"] * (memory.fragmentation > 0)
    parts = ", ".join(f"{name} {getattr(memory, name) / GIB:.2f}" for name in names)
    notes = []
    if memory.recomputed > 0:
        notes.append("logits and the recomputed block are never allocated together")
    if memory.step > 0:
        notes.append(f"the optimizer step takes {memory.step / GIB:.2f} instead of activations and logits")
    note = f" ({'; '.join(notes)})" if notes else ""
    return f"{parts}{note}: {memory.total / GIB:.2f} GiB at peak"


@contextmanager
def with_oom_advice(
    config: RunConfig, model: ModelConfig, hardware: Hardware, process_group: ProcessGroup
) -> Iterator[None]:
    """Raise an out-of-memory error of this block as OutOfMemory, with settings that fit."""
    # measured before anything is allocated: afterwards free memory says nothing
    free = free_memory(hardware.accelerator, hardware.devices, process_group.environment.local_rank())
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(oom_message(config, model, hardware, free, error)) from error


def oom_message(
    config: RunConfig, model: ModelConfig, hardware: Hardware, free: float | None, error: Exception | None = None
) -> str:
    """What happened (`error`, or a warning before a run), the estimate, and settings that fit."""
    memory = estimate(config, model, hardware)
    # An error proves that an estimate that fitted was too low, so the suggested settings stay below it.
    allowed = memory.total if error is None and free is not None else REDUCTION_AFTER_ERROR * memory.total
    if free is not None:
        allowed = min(allowed, SAFE_SHARE[hardware.accelerator] * free)
    event = "may run out of memory" if error is None else "out of memory"
    device = "the GPU" if hardware.accelerator == "gpu" else "the CPU"
    first_line = str(error).partition("\n")[0][:ERROR_CHARACTERS] if error is not None else ""
    cause = f" ({first_line})" if first_line else ""
    recipient = "" if hardware.devices == 1 else " per process"
    free_text = "" if free is None else f"; {free / GIB:.2f} GiB were free{recipient}"
    changes = suggest_settings(config, model, hardware, allowed)
    return (
        f"{event} on {device}{cause}\n  estimate: {describe_memory(memory)}{free_text}\n  "
        f"{list_settings(changes, indent='    ')}"
    )

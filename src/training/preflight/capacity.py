"""Is there room for the run: memory for its tensors, disk for its files."""

from __future__ import annotations

from pathlib import Path

from src.config import ModelConfig, RunConfig
from src.model.cost import parameter_count
from src.training.checkpoint.resume import Start
from src.training.checkpoint.storage import STATE_BYTES, states
from src.training.hardware.selection import Hardware
from src.training.preflight import machine, plan
from src.training.preflight.checklist import Checklist, Finding
from src.training.preflight.out_of_memory import SAFE, estimate, parts_in_words, suggest_settings
from src.training.preflight.plan import GIB


def check_memory(checks: Checklist, config: RunConfig, hardware: Hardware, model: ModelConfig) -> None:
    """The estimate beside what is free, and changes with which it would fit."""
    memory, free = estimate(config, model, hardware), machine.free_memory(hardware.accelerator, hardware.devices)
    who = "the GPU" if hardware.accelerator == "gpu" else "a process"
    there = "what is free is not known here" if free is None else f"{free / GIB:.2f} GiB are free for it"
    checks.found("model", f"{model.title}, {parameter_count(model):,} parameters, vocabulary {model.vocab_size:,}")
    checks.found("memory", f"of {who}, in GiB: {parts_in_words(memory)}; {there}")
    if memory.on_cpu:
        checks.found("", f"and of the machine, for each process: {memory.on_cpu / GIB:.2f} GiB")
    if free is None or memory.total <= SAFE[hardware.accelerator] * free:
        return
    changes = suggest_settings(config, model, hardware, SAFE[hardware.accelerator] * free)
    one = "this would fit:" if len(changes) == 1 else "each of these would fit:"
    checks.to_do.append(
        f"memory: {memory.total / GIB:.1f} GiB are needed, {free / GIB:.1f} are free; {one}"
        + "".join(f"\n       {c}" for c in changes)
    )


def disk(config: RunConfig, hardware: Hardware, model: ModelConfig, start: Start, proj_dir: Path) -> Finding:
    """What the files of the rest of the run will take, and what is free."""
    weights = plan.BYTES[hardware.precision] * parameter_count(model)
    state = STATE_BYTES * parameter_count(model)
    first = start.first_mini_epoch
    last = start.length.mini_epoch(max(0, start.length.steps - 1))
    more_states = max(0, config.keep_resume + 1 - len(states(proj_dir)))  # one is written before the oldest goes

    def files(epoch_save: int) -> int:
        """rwkv-N.pth that are still to be written, and rwkv-final.pth, rwkv-best.pth."""
        multiples = last // epoch_save - (first - 1) // epoch_save
        return max(0, multiples) + (last % epoch_save != 0) + 1 + bool(config.val_data_file)

    needed = files(config.epoch_save) * weights + more_states * state
    there, free = machine.free_disk(proj_dir)
    words = (
        f"{needed / GIB:.2f} GiB for {files(config.epoch_save):,} weights files and {more_states} full states of {state / GIB:.2f}; "
        f"{free / GIB:.1f} GiB are free"
    )
    if needed <= free:
        return Finding("disk", words)
    room = (free - more_states * state) / weights
    fewer = next((n for n in range(config.epoch_save + 1, last + 2) if files(n) <= room), None)
    change = (
        f"--epoch_save {fewer} (every {fewer} mini-epochs)"
        if fewer
        else "a smaller --keep_resume, and another disk (--proj_dir)"
    )
    return Finding(
        "disk",
        words,
        f"disk: the run will write {needed / GIB:.2f} GiB, {free / GIB:.2f} are free under {there}; free some, or use {change}",
    )

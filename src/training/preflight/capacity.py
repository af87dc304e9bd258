"""Whether the run fits: its tensors in memory, its files on the disk."""

from __future__ import annotations

from pathlib import Path

from src.config import ModelConfig, RunConfig
from src.model.cost import parameter_count
from src.training.checkpoint.resume import ResumePoint
from src.training.checkpoint.storage import STATE_BYTES_PER_PARAMETER, state_folders
from src.training.hardware import memory_limits
from src.training.hardware.selection import Hardware
from src.training.model_setup import held_count
from src.training.preflight import machine, plan
from src.training.preflight.checklist import Checklist, Finding
from src.training.preflight.out_of_memory import SAFE_SHARE, describe_memory, estimate, list_settings, suggest_settings
from src.training.preflight.plan import GIB


def check_memory(checks: Checklist, config: RunConfig, hardware: Hardware, model: ModelConfig) -> None:
    """Compare the estimate with the free memory; a problem names settings with which the run would fit."""
    memory, free = estimate(config, model, hardware), memory_limits.free_memory(hardware.accelerator, hardware.devices)
    # On a CPU the free memory of the machine is divided by its processes, so both numbers are per process.
    unit = "per GPU" if hardware.accelerator == "gpu" else "per process"
    free_text = "free memory is unknown on this system" if free is None else f"{free / GIB:.2f} GiB are free"
    checks.report("model", f"{model.title}, {parameter_count(model):,} parameters, vocabulary {model.vocab_size:,}")
    checks.report("memory", f"{unit}, in GiB: {describe_memory(memory)}; {free_text}")
    if memory.on_cpu:
        checks.report("", f"CPU memory of each process, for offloading: {memory.on_cpu / GIB:.2f} GiB")
    # The estimate may be too low, so a run that would fill all free memory counts as one that doesn't fit.
    if free is None or memory.total <= SAFE_SHARE[hardware.accelerator] * free:
        return
    changes = suggest_settings(config, model, hardware, SAFE_SHARE[hardware.accelerator] * free)
    checks.problems.append(
        f"memory: {memory.total / GIB:.1f} GiB are needed, {free / GIB:.1f} are free; "
        + list_settings(changes, indent="       ")
    )


def check_disk(
    config: RunConfig, hardware: Hardware, model: ModelConfig, resume: ResumePoint, proj_dir: Path, prime: int
) -> Finding:
    """Compare the files that the rest of the run writes with the free space. `prime`: as in `SaveWeights`."""
    held = held_count(config, model)
    weights_bytes = (plan.BYTES[hardware.precision] if held == parameter_count(model) else 4) * held
    state_bytes = STATE_BYTES_PER_PARAMETER * held
    # A resumed run writes only the rest of its files; those that it has are not free space any more.
    first = resume.first_mini_epoch
    last = resume.length.mini_epoch(max(0, resume.length.steps - 1))
    last_whole = prime // resume.length.mini_epoch_samples - 1
    draws_weights = resume.state is None and resume.weights is None
    # + 1: a new state is complete before the oldest one is deleted
    new_states = max(0, config.keep_resume + 1 - len(state_folders(proj_dir)))

    def weights_files(epoch_save: int) -> int:
        """How many of rwkv-N.pth are still to be written, with rwkv-init.pth, rwkv-final.pth and rwkv-best.pth; under
        stage 3 also the temporary file in which one is collected."""
        multiples = last // epoch_save - (first - 1) // epoch_save
        others = {n for n in (last_whole, last) if first <= n <= last and n % epoch_save != 0}
        named = max(0, multiples) + len(others) + draws_weights + 1 + bool(config.val_data_file)
        return named + hardware.is_partitioned

    needed = weights_files(config.epoch_save) * weights_bytes + new_states * state_bytes
    folder, free = machine.free_disk(proj_dir)
    detail = (
        f"{needed / GIB:.2f} GiB for {weights_files(config.epoch_save):,} weights files and {new_states} full states "
        f"of {state_bytes / GIB:.2f}; {free / GIB:.1f} GiB are free"
    )
    if needed <= free:
        return Finding("disk", detail)
    # States are needed to resume, so the advice is about weights files: the smallest interval with which they fit.
    affordable_files = (free - new_states * state_bytes) / weights_bytes
    intervals = range(config.epoch_save + 1, last + 2)
    epoch_save = next((n for n in intervals if weights_files(n) <= affordable_files), None)
    change = (
        f"use --epoch_save {epoch_save} (every {epoch_save} mini-epochs)"
        if epoch_save
        else "use a smaller --keep_resume and a --proj_dir on another disk"
    )
    problem = f"disk: the run will write {needed / GIB:.2f} GiB, {free / GIB:.2f} are free in {folder}"
    return Finding("disk", detail, f"{problem}; free some space, or {change}")

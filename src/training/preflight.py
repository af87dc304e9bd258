"""Will this run fit and work: `train.py --check` looks at everything, each start at what takes no time. Nothing is written."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from src.config import ModelConfig, RunConfig
from src.dataset.sft_cache import look_at_conversations
from src.dataset.tokenizer import WORLD_VOCAB_SIZE, Tokenizer, load_tokenizer
from src.model import RWKV7
from src.model.weights import Weights, fit_weights, read_weights
from src.ops.build import BuildError
from src.ops.wkv7 import describe_kernel
from src.training import checkpoint, machine, plan
from src.training.data import SAMPLED_WINDOWS, PretrainSamples, Samples, SftSamples, look_at_samples
from src.training.folder import FINAL, METRICS
from src.training.log_files import read_columns
from src.training.out_of_memory import (
    SAFE,
    advice,
    estimate,
    is_out_of_memory,
    parts_in_words,
    remedies,
)
from src.training.plan import GIB
from src.training.resume import states
from src.training.say import say
from src.training.schedule import RunLength
from src.training.start import Start, find_vocab_size, length_of_run, look_at_start
from src.training.strategy import Hardware, choose_hardware
from src.training.trial import TOLERANCE, Speed, kernel_error, timed_steps
from src.training.validate import HeldOut

SHOWN_TEXT = 160  # characters of the decoded window
SAMPLED_DOCUMENTS = 200
STRANGE_TEXT = 0.05  # share of unreadable characters from which a tokenizer is thought to be the wrong one
MEASURED_STEPS = 50  # of metrics.csv, for the speed

T = TypeVar("T")


class Checklist:
    """Says what is found, line by line, and collects what there is to do."""

    def __init__(self) -> None:
        self.to_do: list[str] = []

    def found(self, name: str, words: str) -> None:
        say(f"{name:>12}  {words}")

    def take(self, finding: machine.Finding) -> None:
        self.found(finding.name, finding.words)
        if finding.to_do:
            self.to_do.append(finding.to_do)

    def attempt(self, name: str, question: Callable[[], T]) -> T | None:
        """The answer, or None and its error on the list."""
        try:
            return question()
        except (ValueError, OSError, BuildError) as error:
            if str(error) not in self.to_do:
                self.found(name, "see below")
                self.to_do.append(str(error))
            return None

    def result(self) -> int:
        if not self.to_do:
            say("OK: nothing stands in the way of this run")
            return 0
        say("not OK; what to do:")
        for number, words in enumerate(self.to_do, start=1):
            say(f"  {number}. {words}")
        return 1


def check(config: RunConfig, notes: list[str]) -> int:
    """`train.py --check`. Exit code 0 when nothing stands in the way, 1 with a list of what to do."""
    checks = Checklist()
    for note in notes:
        say(f"note: {note}")
    checks.take(machine.software())
    checks.take(machine.build_tools())
    checks.take(machine.cuda(config.accelerator != "cpu"))
    if config.wandb and importlib.util.find_spec("wandb") is None:
        checks.to_do.append(f"pip install wandb, or leave --wandb {config.wandb} out")
    hardware = checks.attempt("device", lambda: choose_hardware(config))
    if hardware is None:
        return checks.result()
    where = (
        torch.cuda.get_device_name()
        if hardware.accelerator == "gpu"
        else f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    )
    checks.found("device", f"{where}, {hardware.in_words}, {hardware.precision}")
    for note in hardware.notes:
        say(f"note: {note}")
    _check_kernel(checks, config, hardware)
    looked = checks.attempt("data", lambda: look_at_samples(config))
    weights = _weights(checks, config)
    vocab_size = (
        checks.attempt("vocabulary", lambda: find_vocab_size(config, weights)) if looked or config.vocab_size else None
    )
    if vocab_size is None:
        return checks.result()
    model = config.model_config(vocab_size)
    if looked:
        samples, share = looked
        checks.attempt("data", lambda: _check_data(checks, config, samples, share, vocab_size))
    if config.val_data_file:
        checks.attempt("held-out", lambda: _check_held_out(checks, config, vocab_size))
    _check_memory(checks, config, hardware, model)
    positions = config.my_exit_tokens or (looked and round(looked[0].once / looked[1]))
    if positions:
        about = (
            " (about: the conversations were only looked at)"
            if looked and looked[1] < 1 and not config.my_exit_tokens
            else ""
        )
        _check_run(checks, config, hardware, model, positions, about)
    return checks.result()


def warn_at_start(
    config: RunConfig, hardware: Hardware, model: ModelConfig, samples: Samples, start: Start, proj_dir: Path
) -> None:
    """At every start: only what is quick, and only what is wrong is said."""
    findings = [machine.software(), machine.cuda(config.accelerator != "cpu")]
    wrong = [finding.to_do for finding in findings if finding.to_do]
    wrong += _wrong_kernel(config, hardware, model.head_size)[1]
    wrong += _wrong_document_ends(samples)[1]
    wrong += _wrong_disk(config, hardware, model, start.length, start, proj_dir)[1]
    memory, free = estimate(config, model, hardware), machine.free_memory(hardware.accelerator, hardware.devices)
    if free is not None and memory.total > free:
        wrong.append(advice(config, model, hardware, free))
    for words in wrong:
        say(f"WARNING: {words}")


# ---- kernel -----------------------------------------------------------------------------------------------------------------


def _check_kernel(checks: Checklist, config: RunConfig, hardware: Hardware) -> None:
    device = "cuda" if hardware.accelerator == "gpu" else "cpu"
    which = checks.attempt("wkv7", lambda: describe_kernel(device, hardware.dtype, config.head_size, config.kernel))
    if which is not None:
        words, wrong = _wrong_kernel(config, hardware, config.head_size)
        checks.found("wkv7", f"{which}; {words}")
        checks.to_do += wrong


def _wrong_kernel(config: RunConfig, hardware: Hardware, head_size: int) -> tuple[str, list[str]]:
    """One step of the recurrence beside the reference: in words, and what to do."""
    device = "cuda" if hardware.accelerator == "gpu" else "cpu"
    error, allowed = kernel_error(device, hardware.dtype, head_size, config.kernel), TOLERANCE[hardware.dtype]
    words = f"output and gradients within {error:.1e} of the float64 reference"
    if error <= allowed:
        return words, []
    to_do = (
        f"--kernel {config.kernel} gives wrong numbers here: {error:.1e} from the reference, expected at most {allowed:.0e}. Train with "
        "--kernel reference (slow), delete the build cache ~/.cache/rwkv7-native, and report it with the output of --check"
    )
    return words, [to_do]


# ---- data -------------------------------------------------------------------------------------------------------------------


def _check_held_out(checks: Checklist, config: RunConfig, vocab_size: int) -> None:
    if config.data_type == "sft":  # to look at all of it would leave its tokens behind
        conversations, _ = look_at_conversations(config.val_data_file, config.tokenizer)
        checks.found("held-out", f"{config.val_data_file}, {len(conversations.data):,} conversations looked at")
    else:
        held_out = HeldOut(config)
        held_out.check_ids(vocab_size)
        checks.found("held-out", f"{config.val_data_file}, {held_out.count} windows")


def _check_data(checks: Checklist, config: RunConfig, samples: Samples, share: float, vocab_size: int) -> None:
    checks.found(
        "data", samples.words + f"; the first {share:.1%} of the file, the rest is tokenised at the start" * (share < 1)
    )
    words, wrong = _wrong_document_ends(samples)
    ids, largest = _sampled_ids(samples, config.ctx_len)
    checks.found("", f"{words}; ids {ids}, vocabulary {vocab_size:,}")
    checks.to_do += wrong
    samples.check_ids(vocab_size)
    tokenizer = _tokenizer(config, vocab_size)
    if tokenizer is None:
        checks.found("", "give --tokenizer to see a piece of it as text")
        return
    if tokenizer.vocab_size > vocab_size:
        checks.to_do.append(
            f"--vocab_size {vocab_size}: the tokenizer {tokenizer.name} has {tokenizer.vocab_size} entries; use that, or a multiple of 64 above"
        )
    ids_of_window = _first_window(config, samples)
    wrong_tokenizer = (
        f"--tokenizer {tokenizer.name}: the data is no readable text with it; name the one that made --data_file"
    )
    if max(ids_of_window) >= tokenizer.vocab_size:
        checks.to_do.append(wrong_tokenizer)
        return
    text = tokenizer.decode(ids_of_window)
    checks.found("text", f"{text[:SHOWN_TEXT]!r}, by the tokenizer {tokenizer.name}")
    if text.count("\N{REPLACEMENT CHARACTER}") > STRANGE_TEXT * len(text):
        checks.to_do.append(wrong_tokenizer)
    if largest < vocab_size // 2:
        checks.found(
            "",
            f"the largest id seen is {largest:,}: much of the vocabulary is never used; is it the tokenizer of this data?",
        )


def _sampled_ids(samples: Samples, ctx_len: int) -> tuple[str, int]:
    """The ids of some windows, spread over the data: in words, and the largest."""
    if not isinstance(samples, PretrainSamples):
        return f"up to {samples.largest_id():,}", samples.largest_id()
    tokens = samples.data.tokens
    starts = np.linspace(0, max(0, len(tokens) - ctx_len), SAMPLED_WINDOWS).astype(np.int64)
    ends = [(int(part.min()), int(part.max())) for part in (tokens[at : at + ctx_len] for at in starts.tolist())]
    smallest, largest = min(low for low, _ in ends), max(high for _, high in ends)
    return f"{smallest:,} to {largest:,} in {SAMPLED_WINDOWS} windows", largest


def _wrong_document_ends(samples: Samples) -> tuple[str, list[str]]:
    """Whether documents end with token 0: in words, and what to do."""
    if isinstance(samples, SftSamples):
        found = samples.rows.conversations
        return f"{found.answer_tokens:,} tokens of {len(found.data.tokens):,} are answers", []
    assert isinstance(samples, PretrainSamples)
    data = samples.data
    documents = len(data.doc_idx) - 1
    sampled = np.unique(np.linspace(0, documents - 1, min(documents, SAMPLED_DOCUMENTS)).astype(np.int64))
    last = [data[int(data.doc_idx[d + 1]) - 1] for d in sampled.tolist() if data.doc_idx[d + 1] > data.doc_idx[d]]
    open_ends = sum(1 for item in last if len(item) == 0 or item[-1] != 0)
    if not open_ends:
        return f"{documents:,} documents, token 0 ends them", []
    to_do = (
        f"--data_file {data.prefix}: {open_ends} of {len(last)} documents looked at don't end with token 0, so the model can't learn where texts "
        "end; make the data with data/make_data.py"
    )
    return f"{documents:,} documents", [to_do]


def _tokenizer(config: RunConfig, vocab_size: int) -> Tokenizer | None:
    """That of the flags, of the run in --proj_dir, or World where the vocabulary has its size."""
    name = config.tokenizer or checkpoint.read_run(Path(config.proj_dir)).get("tokenizer", "")
    if not name and vocab_size == WORLD_VOCAB_SIZE and importlib.util.find_spec("pyrwkv_tokenizer"):
        name = "world"
    return load_tokenizer(name) if name else None


def _first_window(config: RunConfig, samples: Samples) -> list[int]:
    """The ids that the run begins with."""
    item = samples.dataset(0, config.micro_bsz, 0, 1, (), 1 << 62)[0]
    while not isinstance(item, torch.Tensor):  # inputs come first, and rows of conversations bring more with them
        item = item[0]
    return item.tolist()[: 2 * SHOWN_TEXT]


# ---- memory, disk, time -----------------------------------------------------------------------------------------------------


def _check_memory(checks: Checklist, config: RunConfig, hardware: Hardware, model: ModelConfig) -> None:
    memory, free = estimate(config, model, hardware), machine.free_memory(hardware.accelerator, hardware.devices)
    who = "the GPU" if hardware.accelerator == "gpu" else "a process"
    there = "what is free is not known here" if free is None else f"{free / GIB:.2f} GiB are free for it"
    checks.found("model", f"{model.title}, {plan.parameter_count(model):,} parameters, vocabulary {model.vocab_size:,}")
    checks.found("memory", f"of {who}, in GiB: {parts_in_words(memory)}; {there}")
    if memory.on_cpu:
        checks.found("", f"and of the machine, for each process: {memory.on_cpu / GIB:.2f} GiB")
    if free is None or memory.total <= SAFE[hardware.accelerator] * free:
        return
    changes = remedies(config, model, hardware, SAFE[hardware.accelerator] * free)
    one = "this would fit:" if len(changes) == 1 else "each of these would fit:"
    checks.to_do.append(
        f"memory: {memory.total / GIB:.1f} GiB are needed, {free / GIB:.1f} are free; {one}"
        + "".join(f"\n       {c}" for c in changes)
    )


def _check_run(
    checks: Checklist,
    config: RunConfig,
    hardware: Hardware,
    model: ModelConfig,
    positions: int,
    about: str,
) -> None:
    proj_dir = Path(config.proj_dir)
    fresh = length_of_run(config, positions, hardware.world_size)
    start = checks.attempt("folder", lambda: look_at_start(config, proj_dir, fresh))
    if start is None:
        return
    there, _ = machine.free_disk(proj_dir)
    if not os.access(there, os.W_OK):
        checks.to_do.append(f"--proj_dir {proj_dir}: {there} can't be written; choose a folder of yours")
    length, step = start.length, start.position.step
    begins = start.loaded.folder if start.loaded else start.weights or "new weights"
    checks.found("folder", f"{proj_dir}, starts from {begins}" + f" at step {step:,}" * (step > 0))
    if (proj_dir / FINAL).exists() and step >= length.steps:
        checks.found("", "the run in it is complete; --restart 1 begins again")
    if (file := start.weights) is not None:
        checks.attempt("weights", lambda: _fit_weights(config, model, file))
    words, wrong = _wrong_disk(config, hardware, model, length, start, proj_dir)
    checks.found("disk", words)
    checks.to_do += wrong
    left = length.exit_tokens - length.tokens(step)
    checks.found(
        "run",
        f"{length.exit_tokens:,} tokens{about} in {length.steps:,} steps of {length.tokens_per_step:,}, "
        f"{(count := length.mini_epoch(max(0, length.steps - 1)) + 1):,} mini-epoch{'s' * (count > 1)}"
        + f"; {length.steps - step:,} steps to come"
        * (step > 0),
    )
    speed = checks.attempt("time", lambda: _speed(checks, config, hardware, model))
    if speed is not None:
        checks.found(
            "time",
            f"{_duration(max(0, left) / speed.tokens_per_second)} at {speed.tokens_per_second:,.0f} tokens/s, {speed.words}",
        )


def _weights(checks: Checklist, config: RunConfig) -> Weights | None:
    """The weights that the run begins from, where they are a file."""
    origin = checkpoint.origin_weights(Path(config.proj_dir), config.train_stage, config.load_model)
    return checks.attempt("weights", lambda: read_weights(origin)) if origin is not None and origin.is_file() else None


def _fit_weights(config: RunConfig, model: ModelConfig, file: Path) -> None:
    with torch.device("meta"):
        like = RWKV7(model)
    fit_weights(read_weights(file), like, str(file), partial=bool(config.load_partial))


def _wrong_disk(
    config: RunConfig, hardware: Hardware, model: ModelConfig, length: RunLength, start: Start, proj_dir: Path
) -> tuple[str, list[str]]:
    """What the files of the rest of the run will take and what is free: in words, and what to do."""
    weights = plan.BYTES[hardware.precision] * plan.parameter_count(model)
    state = 12 * plan.parameter_count(model)  # fp32 weights and two moments
    first = start.first_mini_epoch
    last = length.mini_epoch(max(0, length.steps - 1))
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
        return words, []
    room = (free - more_states * state) / weights
    fewer = next((n for n in range(config.epoch_save + 1, last + 2) if files(n) <= room), None)
    change = (
        f"--epoch_save {fewer} (every {fewer} mini-epochs)"
        if fewer
        else "a smaller --keep_resume, and another disk (--proj_dir)"
    )
    return words, [
        f"disk: the run will write {needed / GIB:.2f} GiB, {free / GIB:.2f} are free under {there}; free some, or use {change}"
    ]


def _speed(checks: Checklist, config: RunConfig, hardware: Hardware, model: ModelConfig) -> Speed | None:
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
    return Speed(one.tokens_per_second * hardware.world_size, one.words + many)


def _measured_speed(config: RunConfig, hardware: Hardware) -> Speed | None:
    """From metrics.csv, when the run in the folder was made with what decides the speed."""
    proj_dir = Path(config.proj_dir)
    before = checkpoint.read_run(proj_dir).get("settings", {})
    same = (
        "n_layer",
        "n_embd",
        "head_size",
        "dim_ffn",
        "ctx_len",
        "micro_bsz",
        "grad_cp",
        "head_chunk",
        "kernel",
        "strategy",
        "compile",
    )
    now = {name: getattr(config, name) for name in same if name != "dim_ffn" or config.dim_ffn}
    global_batch = config.micro_bsz * config.accumulate_grad_batches * hardware.world_size
    now |= {"precision": hardware.precision, "accelerator": hardware.accelerator, "global_batch": global_batch}
    if not (proj_dir / METRICS).is_file() or any(before.get(name) != value for name, value in now.items()):
        return None
    column = read_columns(proj_dir / METRICS).get("tokens_per_second", [])
    speeds = [speed for speed in column if math.isfinite(speed)][-MEASURED_STEPS:]
    if not speeds:
        return None
    return Speed(float(np.median(speeds)), f"the median of the last {len(speeds)} steps in {METRICS}")


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"

"""What a run will need, before it is started: parameters, memory of each device by part, tokens, steps, time. Pure formulas.

Bytes per device, P parameters, b bytes of the run's dtype, W processes (tests compare them with what torch really keeps):

    weights      b P, under ZeRO 3 b P / W and the parameters gathered at a time
    gradients    b P, under ZeRO 2, 3 b P / W and the buckets under way
    optimizer    two fp32 moments and, below fp32 or under ZeRO, an fp32 master: 8 P or 12 P, under ZeRO / W; with offload on the CPU
    step         fp32 copies of gradients while the optimizer works: under ZeRO 4 P / W; else, below fp32, those of a piece (optim.MAX_FP32_GRAD_NUMEL)
    activations  tokens of a micro batch * (what a block keeps for backward), of every layer or, with --grad_cp, of one; each other layer then
                 keeps its input and what the recurrence gave
                 (the block at work comes when the logits have gone: the larger of the two counts)
    logits       tokens * V * b, their gradient takes their place; with --head_chunk those of a chunk, and the head's gradient in fp32, twice
                 while it is scaled; where the loss is plain PyTorch (no native library, fp16 on a CPU) the rows at work in fp32 besides
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from src.config import STRATEGIES, ModelConfig, RunConfig
from src.model.cost import parameter_count, training_flops_per_token
from src.ops.loss import ROWS
from src.ops.recurrence import CHUNKED_SEGMENT, CHUNKED_SLOT, CPU_SEGMENT, CUDA_WINDOW
from src.training import optim

BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2}
# Tensors [token, C] that a block keeps for backward in the run's dtype, beside the hidden layer of the channel mix (twice, before and
# after its activation) and the low-rank products; counted from src/model/layers.py, tested against torch's saved tensors.
KEPT_BY_BLOCK = 30
# parameters that ZeRO 3 holds whole at a time (DeepSpeed's stage3_max_live_parameters)
GATHERED_AT_A_TIME = 1_000_000_000
GIB = 1 << 30


def kept_by_recurrence(c: ModelConfig, precision: str, on_gpu: bool = False) -> float:
    """Bytes per token that wkv7 keeps in one layer beside its inputs: states, and S a (all fp32) but for the chunked kernel."""
    if on_gpu and precision == "bf16" and c.head_size == 64 and c.kernel in ("auto", "chunked"):
        return 4 * c.n_head * CHUNKED_SLOT / CHUNKED_SEGMENT
    every = CUDA_WINDOW.get(c.head_size, CPU_SEGMENT) if on_gpu else CPU_SEGMENT
    return 4 * c.n_embd * (1 + c.head_size / every)


def kept_by_block(c: ModelConfig, precision: str, on_gpu: bool = False) -> float:
    """Bytes per token that one block keeps for backward."""
    low_rank = c.d_decay_lora + c.d_aaa_lora + c.d_mv_lora + c.d_gate_lora
    in_dtype = KEPT_BY_BLOCK * c.n_embd + 2 * c.dim_ffn + low_rank
    return BYTES[precision] * in_dtype + kept_by_recurrence(c, precision, on_gpu)


def activation_bytes(c: ModelConfig, tokens: int, precision: str, on_gpu: bool = False) -> float:
    """What a forward pass over `tokens` keeps for backward, without the head; with grad_cp what one block at work takes besides."""
    vector = BYTES[precision] * c.n_embd
    if c.grad_cp:
        given = vector + kept_by_recurrence(
            c, precision, on_gpu
        )  # the recurrence's output, and what its gradients need
        return tokens * (2 * vector + c.n_layer * (vector + given)) + recomputed_bytes(c, tokens, precision, on_gpu)
    return tokens * (2 * vector + c.n_layer * kept_by_block(c, precision, on_gpu))


def recomputed_bytes(c: ModelConfig, tokens: int, precision: str, on_gpu: bool = False) -> float:
    """The part of `activation_bytes` that one block at work takes: it comes when the logits have gone."""
    given = BYTES[precision] * c.n_embd + kept_by_recurrence(c, precision, on_gpu)
    return tokens * (kept_by_block(c, precision, on_gpu) - given) if c.grad_cp else 0.0


def logit_bytes(c: ModelConfig, tokens: int, dtype_bytes: int, head_chunk: int, native_loss: bool = True) -> float:
    """The logits, or a chunk of them with what sums up the head's gradient; without the native loss what plain PyTorch adds."""
    rows = min(head_chunk or tokens, tokens)
    per_row = c.vocab_size * dtype_bytes
    in_fp32 = 0 if native_loss else c.vocab_size * (4 * rows if dtype_bytes == 4 else 8 * min(rows, ROWS))
    if not head_chunk:
        return rows * per_row + in_fp32
    head = 4 * c.vocab_size * c.n_embd
    return head + max(rows * per_row + in_fp32, head) + dtype_bytes * tokens * c.n_embd


@dataclass(frozen=True)
class Memory:
    """Bytes of one device by part, and of the CPU for each process (offload)."""

    weights: float
    gradients: float
    optimizer: float
    step: float
    activations: float
    logits: float
    on_cpu: float = 0.0
    recomputed: float = 0.0  # of the activations: there when the logits aren't
    gaps: float = 0.0  # between the tensors, where the allocator leaves many

    @property
    def total(self) -> float:
        """At the worst moment: backward, with activations, or the optimizer's step, without."""
        at_rest = self.weights + self.gradients + self.optimizer + self.gaps
        at_work = self.activations + self.logits - min(self.recomputed, self.logits)
        return at_rest + max(at_work, self.step)


def memory(
    c: ModelConfig,
    strategy: str,
    processes: int,
    precision: str,
    tokens: int,
    head_chunk: int = 0,
    bucket_mb: int = 200,
    native_loss: bool = True,
    on_gpu: bool = False,
) -> Memory:
    """Memory of one of `processes` devices; `tokens` are those of its micro batch. `strategy` as in --strategy; auto: one, or DDP."""
    count, dtype_bytes = parameter_count(c), BYTES[precision]
    engine = strategy.startswith("deepspeed")
    stage = int(strategy.split("_")[2]) if engine else 0
    offload = strategy.endswith("_offload")
    part = count / processes if engine else count
    weights = dtype_bytes * (part if stage == 3 else count)
    gradients = dtype_bytes * (part if stage >= 2 else count)
    optimizer = (12 if engine or dtype_bytes < 4 else 8) * part
    step = 4 * part if engine else 4.0 * _piece(c, count) if dtype_bytes < 4 else 0.0
    on_cpu = 0.0
    if offload:
        on_cpu, optimizer, step = optimizer + step, 0.0, 0.0
        if stage == 3:
            on_cpu, weights = on_cpu + weights, 0.0
        if stage >= 2:  # handed over bucket by bucket
            gradients = 0.0
    if stage >= 2:
        gradients += 2 * dtype_bytes * min(count, bucket_mb * 1_000_000)
    if stage == 3:
        weights += dtype_bytes * min(count, GATHERED_AT_A_TIME)
    return Memory(
        weights,
        gradients,
        optimizer,
        step,
        activation_bytes(c, tokens, precision, on_gpu),
        logit_bytes(c, tokens, dtype_bytes, head_chunk, native_loss),
        on_cpu,
        recomputed_bytes(c, tokens, precision, on_gpu),
    )


def _piece(c: ModelConfig, count: int) -> int:
    """The most parameters whose gradients MasterAdamW has in fp32 at a time."""
    return min(count, max(optim.MAX_FP32_GRAD_NUMEL, c.vocab_size * c.n_embd, c.dim_ffn * c.n_embd))


def describe(config: RunConfig, model: ModelConfig, exit_tokens: int, processes: int, precision: str) -> str:
    """What `train.py --plan` prints."""
    tokens = config.micro_bsz * config.ctx_len
    per_step = tokens * config.accumulate_grad_batches * processes
    steps = math.ceil(exit_tokens / per_step)
    count = parameter_count(model)
    lines = [
        f"       model  {model.title}, {count:,} parameters, vocabulary {model.vocab_size:,}, low-rank sizes w {model.d_decay_lora}, "
        f"a {model.d_aaa_lora}, v {model.d_mv_lora}, g {model.d_gate_lora}",
        f"         run  {exit_tokens:,} tokens, {steps:,} steps of {per_step:,} tokens, {exit_tokens / count:.1f} tokens per parameter",
        f"   processes  {processes}, {precision}, micro batch {config.micro_bsz} x {config.ctx_len}, grad_cp {config.grad_cp}, head_chunk {config.head_chunk}",
        f"     compute  {training_flops_per_token(model) * exit_tokens:.3g} floating-point operations",
    ]
    if config.plan > 0:
        hours = exit_tokens / config.plan / 3600
        lines.append(
            f"        time  {hours:,.1f} hours ({hours / 24:,.1f} days) at {config.plan:,.0f} tokens/s of all processes together"
        )
    at_once = "; logits and the block that is recomputed are not there at once" if model.grad_cp else ""
    lines += [
        "",
        f"Memory of one device in GiB, by the formulas of src/training/preflight/plan.py; CUDA, NCCL and fragmentation take 2 or 3 more{at_once}:",
        "",
    ]
    return "\n".join([*lines, *_memory_table(config, model, processes, precision)])


def _memory_table(config: RunConfig, model: ModelConfig, processes: int, precision: str) -> Iterator[str]:
    """A line for each strategy that means something of its own for so many processes; the run's own is marked."""
    yield f"{'--strategy':>28}  weights  gradients  optimizer    step  activations  logits    total  on the CPU"
    for name in STRATEGIES:
        if name == ("ddp" if processes == 1 else "auto"):
            continue  # auto is ddp where there are several processes
        if processes == 1 and name.startswith("deepspeed") and not name.endswith("_offload"):
            continue  # the same as auto
        m = memory(
            model,
            name,
            processes,
            precision,
            config.micro_bsz * config.ctx_len,
            config.head_chunk,
            config.ds_bucket_mb,
            on_gpu=config.accelerator != "cpu",
        )
        mark = ">" if name == config.strategy or (name == "ddp" and config.strategy == "auto") else " "
        cells = zip(
            (m.weights, m.gradients, m.optimizer, m.step, m.activations, m.logits, m.total, m.on_cpu),
            (7, 9, 9, 6, 11, 6, 7, 10),
            strict=True,
        )
        yield f"{mark}{name:>27}  " + "  ".join(f"{value / GIB:{width}.2f}" for value, width in cells)

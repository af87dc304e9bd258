"""The needs of a run before it starts: parameters, memory per device by part, tokens, steps, time. Pure formulas.

Bytes per device, with P parameters, b bytes of the run's dtype and W processes (tests compare them with PyTorch's):

    weights      b P; under ZeRO 3 b P / W, plus the parameters gathered at a time
    gradients    b P; under ZeRO 2 and 3 b P / W, plus the buckets being reduced
    optimizer    two fp32 moments and, below fp32 or under ZeRO, an fp32 master: 8 P or 12 P; under ZeRO / W; with
                 offload in CPU memory
    step         fp32 copies of gradients during the optimizer step: under ZeRO 4 P / W; else, below fp32, those of one
                 chunk (optim.MAX_FP32_GRAD_NUMEL)
    activations  tokens of a micro batch * (what a block keeps for backward): of every layer or, with --grad_cp, of one,
                 while every other layer keeps its input and the results of the recurrence. That one block is recomputed
                 after the logits are freed: the larger of the two counts
                 An adapter beside a frozen base: b P of weights, gradients and optimizer of what is trained, and fewer
                 activations (adapter_memory.py)
    logits       tokens * V * b; their gradient takes their place. With --head_chunk those of one chunk, and the head's
                 gradient in fp32, twice while it is scaled. Where the loss is plain PyTorch (no native library, fp16 on
                 a CPU), in addition the fp32 rows being computed
    pieces       with --chunk_ctx: activations and logits are those of one piece; what is kept beside: piece_memory.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from src.adapt.config import AdapterConfig, adapter_of
from src.config import PLAIN_KERNELS, STRATEGIES, ModelConfig, RunConfig, keeps_base
from src.model.cost import parameter_count, training_flops_per_token
from src.ops.loss import ROWS
from src.ops.portable_layout import CHUNK
from src.ops.recurrence import has_warpgroups
from src.ops.recurrence_op import (
    CHUNKED_SEGMENT,
    CHUNKED_SLOT,
    CPU_SEGMENT,
    CUDA_WINDOW,
    WGMMA_SEGMENT,
    WGMMA_SLOT,
)
from src.training import optim
from src.training.preflight.adapter_memory import (
    base_bytes,
    cast_bytes,
    free_in_first_block,
    kept_by_frozen_block,
    trained_part,
)
from src.training.preflight.cluster_plan import describe_communication, describe_states
from src.training.preflight.front_end_memory import front_end_bytes, front_end_size
from src.training.preflight.piece_memory import Cut, cut_of, describe_pieces, kept_beside
from src.training.preflight.traffic import GATHERED_AT_A_TIME

BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2}
# Tensors [tokens, C] that a block keeps for backward in the run's dtype, in addition to the hidden layer of the channel
# mix (twice, before and after its activation) and the low-rank products; counted in src/model/layers.py, and compared
# with PyTorch's saved tensors in tests/test_plan.py.
KEPT_BY_BLOCK = 30
GIB = 1 << 30


def kept_by_recurrence(c: ModelConfig, precision: str, on_gpu: bool = False) -> float:
    """Bytes per token that wkv7 keeps in one layer in addition to its inputs: some states and, but for the chunked
    kernel, the products S a, all in fp32."""
    if c.kernel in PLAIN_KERNELS:  # the reference keeps far more: nobody trains with it
        return 4 * c.n_embd * (2 + c.head_size / CHUNK)
    # the conditions under which src/ops/recurrence.py takes the chunked kernel
    if on_gpu and precision == "bf16" and c.head_size == 64 and c.kernel in ("auto", "chunked"):
        slot, segment = (WGMMA_SLOT, WGMMA_SEGMENT) if has_warpgroups(None) else (CHUNKED_SLOT, CHUNKED_SEGMENT)
        return 4 * c.n_head * slot / segment
    # One state [C, head_size] is kept every so many tokens; backward recomputes those between.
    interval = CUDA_WINDOW.get(c.head_size, CPU_SEGMENT) if on_gpu else CPU_SEGMENT
    return 4 * c.n_embd * (1 + c.head_size / interval)


def kept_by_block(c: ModelConfig, precision: str, on_gpu: bool = False, adapter: AdapterConfig | None = None) -> float:
    """Bytes per token that one block keeps for backward."""
    if adapter is not None:
        return BYTES[precision] * kept_by_frozen_block(c, adapter) + kept_by_recurrence(c, precision, on_gpu)
    low_rank = c.d_decay_lora + c.d_aaa_lora + c.d_mv_lora + c.d_gate_lora
    in_dtype = KEPT_BY_BLOCK * c.n_embd + 2 * c.dim_ffn + low_rank
    return BYTES[precision] * in_dtype + kept_by_recurrence(c, precision, on_gpu)


def kept_by_checkpoint(c: ModelConfig, precision: str, on_gpu: bool) -> float:
    """Bytes per token that grad_cp keeps of one layer besides its input: it doesn't run a native kernel again, so that
    the kernel's output and what its backward needs are kept."""
    if c.kernel in PLAIN_KERNELS:
        return 0.0
    return BYTES[precision] * c.n_embd + kept_by_recurrence(c, precision, on_gpu)


def activation_bytes(
    c: ModelConfig, tokens: int, precision: str, on_gpu: bool = False, adapter: AdapterConfig | None = None
) -> float:
    """Bytes that a forward pass over `tokens` keeps for backward, without the head; with grad_cp the block being
    recomputed is included."""
    vector = BYTES[precision] * c.n_embd
    if c.grad_cp:
        recurrence = kept_by_checkpoint(c, precision, on_gpu)
        kept = tokens * (2 * vector + c.n_layer * (vector + recurrence))
        return kept + recomputed_bytes(c, tokens, precision, on_gpu, adapter)
    kept = tokens * c.n_layer * kept_by_block(c, precision, on_gpu, adapter)
    if adapter is not None:
        free = tokens * free_in_first_block(c, adapter) * BYTES[precision]
        kept += cast_bytes(c, adapter, BYTES[precision]) - free
    # 2 vectors outside of the blocks: before the first and after the last one
    return tokens * 2 * vector + kept


def recomputed_bytes(
    c: ModelConfig, tokens: int, precision: str, on_gpu: bool = False, adapter: AdapterConfig | None = None
) -> float:
    """The part of `activation_bytes` that the block being recomputed takes, after the logits are freed."""
    recurrence = kept_by_checkpoint(c, precision, on_gpu)
    return tokens * (kept_by_block(c, precision, on_gpu, adapter) - recurrence) if c.grad_cp else 0.0


def logit_bytes(
    c: ModelConfig,
    tokens: int,
    dtype_bytes: int,
    head_chunk: int,
    native_loss: bool = True,
    frozen_head: bool = False,
) -> float:
    """Bytes of the logits, or of one chunk of them and the accumulated head gradient; without the native loss also what
    plain PyTorch adds."""
    rows = min(head_chunk or tokens, tokens)
    per_row = c.vocab_size * dtype_bytes
    # Plain PyTorch adds one copy of fp32 logits; of lower precisions two fp32 copies of ROWS rows at a time.
    in_fp32 = 0 if native_loss else c.vocab_size * (4 * rows if dtype_bytes == 4 else 8 * min(rows, ROWS))
    if not head_chunk:
        return rows * per_row + in_fp32
    if frozen_head:
        return rows * per_row + in_fp32 + dtype_bytes * tokens * c.n_embd
    # The head's gradient is summed over the chunks in fp32, and scaled into a second copy at the end.
    head = 4 * c.vocab_size * c.n_embd
    return head + max(rows * per_row + in_fp32, head) + dtype_bytes * tokens * c.n_embd


@dataclass(frozen=True)
class Memory:
    """Bytes of one device by part, and bytes of CPU memory per process with offload (`on_cpu`)."""

    weights: float
    gradients: float
    optimizer: float
    step: float
    activations: float
    logits: float
    on_cpu: float = 0.0
    recomputed: float = 0.0  # the part of the activations that is never allocated together with the logits
    fragmentation: float = 0.0  # unusable memory between tensors
    pieces: float = 0.0  # with samples in pieces: states at their borders, sums of gradients

    @property
    def total(self) -> float:
        """The peak: during backward, which needs activations, or during the optimizer step, which doesn't."""
        persistent = self.weights + self.gradients + self.optimizer + self.fragmentation
        backward = self.activations + self.logits - min(self.recomputed, self.logits)
        return persistent + max(backward + self.pieces, self.step)


def memory(
    c: ModelConfig,
    strategy: str,
    processes: int,
    precision: str,
    cut: Cut,
    head_chunk: int = 0,
    bucket_mb: int = 200,
    native_loss: bool = True,
    on_gpu: bool = False,
    adapter: AdapterConfig | None = None,
    quant: str = "none",
) -> Memory:
    """Memory of one of `processes` devices, for micro batches that are computed as `cut` says. `strategy` is a value of
    --strategy; "auto" stands for one process or DDP. `bucket_mb` is DeepSpeed's bucket size in million elements.
    `adapter`: what is trained beside a frozen base; None: all weights. `quant`: how the base is stored."""
    if adapter is not None:
        return _adapter_memory(c, strategy, processes, precision, cut, head_chunk, native_loss, on_gpu, adapter, quant)
    count, dtype_bytes = parameter_count(c), BYTES[precision]
    engine = strategy.startswith("deepspeed")
    stage = int(strategy.split("_")[2]) if engine else 0
    offload = strategy.endswith("_offload")
    part = count / processes if engine else count
    weights = dtype_bytes * (part if stage == 3 else count)
    gradients = dtype_bytes * (part if stage >= 2 else count)
    optimizer = (12 if engine or dtype_bytes < 4 else 8) * part
    step = 4 * part if engine else 4.0 * _largest_chunk(c, count) if dtype_bytes < 4 else 0.0
    on_cpu = 0.0
    if offload:
        on_cpu, optimizer, step = optimizer + step, 0.0, 0.0  # the step is computed on the CPU too
        if stage == 3:
            on_cpu, weights = on_cpu + weights, 0.0
        if stage >= 2:
            gradients = 0.0  # moved to the CPU bucket by bucket
    if stage >= 2:
        # two: one bucket is reduced while the next one fills
        gradients += 2 * dtype_bytes * min(count, bucket_mb * 1_000_000)
    if stage == 3:
        weights += dtype_bytes * min(count, GATHERED_AT_A_TIME)
    return Memory(
        weights,
        gradients,
        optimizer,
        step,
        activation_bytes(c, cut.tokens, precision, on_gpu),
        logit_bytes(c, cut.tokens, dtype_bytes, head_chunk, native_loss),
        on_cpu,
        recomputed_bytes(c, cut.tokens, precision, on_gpu),
        pieces=kept_beside(c, cut, dtype_bytes, count),
    )


def with_front_end(m: Memory, config: RunConfig, model: ModelConfig, precision: str) -> Memory:
    """`m` of a run's language model, and its encoder and projector. Where these alone are trained the model has neither
    gradients nor an optimizer; its activations are then a bound."""
    if not config.encoder:
        return m
    if keeps_base(config) and adapter_of(config) is None:
        m = replace(m, gradients=0.0, optimizer=0.0, step=0.0, on_cpu=0.0)
    weights, gradients, optimizer = front_end_bytes(config, model.n_embd, BYTES[precision])
    return replace(m, weights=m.weights + weights, gradients=m.gradients + gradients, optimizer=m.optimizer + optimizer)


def _adapter_memory(
    c: ModelConfig,
    strategy: str,
    processes: int,
    precision: str,
    cut: Cut,
    head_chunk: int,
    native_loss: bool,
    on_gpu: bool,
    adapter: AdapterConfig,
    quant: str,
) -> Memory:
    """`memory` of an adapter: nothing but weights exists of what is frozen. Strategies up to ZeRO 2."""
    part, dtype_bytes = trained_part(c, adapter), BYTES[precision]
    engine = strategy.startswith("deepspeed")
    share = 1 / processes if engine else 1.0
    # An engine keeps fp32 masters, and has what it trains in one dtype; without one the adapter is its own master.
    own_bytes = dtype_bytes if engine and adapter.train else 4
    weights = base_bytes(c, parameter_count(c), dtype_bytes, quant) + own_bytes * (part.adapter + part.kept)
    gradients = own_bytes * part.adapter + dtype_bytes * part.whole
    masters = part.adapter + part.whole if engine else part.whole if dtype_bytes < 4 else 0
    optimizer = share * (8 * (part.adapter + part.whole) + 4 * masters)
    step = 4.0 * share * masters
    on_cpu = 0.0
    if strategy.endswith("_offload"):
        on_cpu, optimizer, step = optimizer + step, 0.0, 0.0
    return Memory(
        weights,
        gradients,
        optimizer,
        step,
        activation_bytes(c, cut.tokens, precision, on_gpu, adapter),
        logit_bytes(c, cut.tokens, dtype_bytes, head_chunk, native_loss, frozen_head=True),
        on_cpu,
        recomputed_bytes(c, cut.tokens, precision, on_gpu, adapter),
        pieces=kept_beside(c, cut, dtype_bytes, part.adapter + part.whole),
    )


def _largest_chunk(c: ModelConfig, count: int) -> int:
    """The largest number of gradients that MasterAdamW has in fp32 at a time."""
    # a tensor is never split, so the largest one is a lower bound
    return min(count, max(optim.MAX_FP32_GRAD_NUMEL, c.vocab_size * c.n_embd, c.dim_ffn * c.n_embd))


def describe(config: RunConfig, model: ModelConfig, exit_tokens: int, processes: int, precision: str) -> str:
    """The text of `train.py --plan`: the run and a table of memory by strategy. `config.plan`: tokens/s, or 0."""
    tokens = config.micro_bsz * config.ctx_len
    per_step = tokens * config.accumulate_grad_batches * processes // config.context_parallel
    steps = math.ceil(exit_tokens / per_step)
    count = parameter_count(model)
    lines = [
        f"       model  {model.title}, {count:,} parameters, vocabulary {model.vocab_size:,}, "
        f"low-rank sizes w {model.d_decay_lora}, a {model.d_aaa_lora}, v {model.d_mv_lora}, g {model.d_gate_lora}",
        f"         run  {exit_tokens:,} tokens, {steps:,} steps of {per_step:,} tokens, "
        f"{exit_tokens / count:.1f} tokens per parameter",
        f"   processes  {processes}, {precision}, micro batch {config.micro_bsz} x {config.ctx_len}, "
        f"grad_cp {config.grad_cp}, head_chunk {config.head_chunk}",
        *describe_pieces(config, model, BYTES[precision]),
        *([f"      trains  {_describe_trained(config, model)}"] if adapter_of(config) is not None else []),
        *([f"     encoder  {_describe_front_end(config, model)}"] if config.encoder else []),
        f"     compute  {training_flops_per_token(model) * exit_tokens:.3g} floating-point operations",
    ]
    if config.plan > 0:
        hours = exit_tokens / config.plan / 3600
        lines.append(
            f"        time  {hours:,.1f} hours ({hours / 24:,.1f} days) at {config.plan:,.0f} tokens/s "
            "of all processes together"
        )
    note = "; logits and the recomputed block are never allocated together" if model.grad_cp else ""
    lines += [
        "",
        "Estimated memory of one device in GiB, by the formulas of src/training/preflight/plan.py; "
        f"CUDA, NCCL and fragmentation add 2 or 3{note}:",
        "",
    ]
    lines += _memory_table(config, model, processes, precision)
    if processes > 1:
        lines += ["", *describe_communication(config, model, processes, BYTES[precision])]
    lines += ["", *describe_states(config, model, processes)]
    return "\n".join(lines)


def _describe_trained(config: RunConfig, model: ModelConfig) -> str:
    adapter = adapter_of(config)
    assert adapter is not None
    part = trained_part(model, adapter)
    base = "as it is" if config.quant == "none" else f"in {config.quant}"
    return f"{adapter.kind}, {part.adapter + part.whole:,} parameters; the frozen base is stored {base}"


def _describe_front_end(config: RunConfig, model: ModelConfig) -> str:
    size = front_end_size(config, model.n_embd)
    return f"{config.encoder} with its projector, {size.trained:,} parameters trained, {size.frozen:,} frozen"


def _memory_table(config: RunConfig, model: ModelConfig, processes: int, precision: str) -> Iterator[str]:
    """One line for each strategy that differs from the others with so many processes; ">" marks the run's."""
    yield f"{'--strategy':>28}  weights  gradients  optimizer    step  activations  logits  pieces    total  on the CPU"
    widths = (7, 9, 9, 6, 11, 6, 6, 7, 10)
    for name in STRATEGIES:
        if name == ("ddp" if processes == 1 else "auto"):
            continue  # with several processes auto is DDP; with one there is nothing to communicate
        if name.startswith("deepspeed_stage_3") and adapter_of(config) is not None:
            continue  # refused
        if processes == 1 and name.startswith("deepspeed") and not name.endswith("_offload"):
            continue  # one process has nothing to partition: the same as auto
        m = memory(
            model,
            name,
            processes,
            precision,
            cut_of(config),
            config.head_chunk,
            config.ds_bucket_mb,
            on_gpu=config.accelerator != "cpu",
            adapter=adapter_of(config),
            quant=config.quant,
        )
        m = with_front_end(m, config, model, precision)
        mark = ">" if name == config.strategy or (name == "ddp" and config.strategy == "auto") else " "
        parts = (m.weights, m.gradients, m.optimizer, m.step, m.activations, m.logits, m.pieces, m.total, m.on_cpu)
        cells = (f"{value / GIB:{width}.2f}" for value, width in zip(parts, widths, strict=True))
        yield f"{mark}{name:>27}  " + "  ".join(cells)

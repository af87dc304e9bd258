"""Forward and backward of fine-tuning a part, in proportion to a full step's: state tuning, and LoRA of rank 32.

    python -m tests.bench.adapt_step [--config mini] [--kinds state,lora]

Each round times one pass of every kind in turn, in one process; printed is the median over the rounds of the ratio to
the full pass of the same round. The optimizer is not counted. Sizes: those of tests/bench/train_step.py; the batch is
packed, as conversations are.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from src.adapt.adapter import add_adapter
from src.adapt.config import adapter_of
from src.config import RunConfig
from src.model import RWKV7
from src.model.weights import IDLE_IN_LAYER_0
from src.training.hardware.allocator import set_up_malloc
from src.training.hardware.selection import DTYPES, choose_hardware
from src.training.objectives import OBJECTIVES
from tests.bench.train_step import CONFIGS, draw_weights

FLAGS = {
    "full": {},
    "state": {"train_type": "state"},
    **{kind: {"peft": kind} for kind in ("lora", "pissa", "dora", "miss")},
    "lora+ln": {"peft": "lora", "lora_train": "ln,vectors"},
}


class Pass:
    """Forward and backward of one kind on random tokens."""

    def __init__(self, config: RunConfig, vocab: int) -> None:
        hardware = choose_hardware(config)
        device = torch.device(hardware.device_type)
        torch.manual_seed(0)
        with torch.device("meta"):
            self.model = RWKV7(config.model_config(vocab))
        self.model = self.model.to(DTYPES[hardware.precision]).to_empty(device=device)
        draw_weights(self.model)
        if (adapter := adapter_of(config)) is not None:
            add_adapter(self.model, adapter)
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.requires_grad and not parameter.any():
                        parameter.normal_(std=0.01)  # zeros would be multiplied as fast, but are no normal step
        else:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name not in IDLE_IN_LAYER_0)
        self.objective = OBJECTIVES["next_token"](self.model.head, config.head_chunk)
        ids = torch.randint(vocab, (config.micro_bsz, config.ctx_len + 1), device=device)
        self.batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def timed(self) -> float:
        begin = time.perf_counter()
        loss, _ = self.objective(self.model, self.batch)
        loss.backward()
        if loss.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        self.model.zero_grad()
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="mini", choices=list(CONFIGS))
    parser.add_argument("--kinds", default="state,lora")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    layers, width, vocab, ctx_len, micro_bsz, _ = CONFIGS[args.config]
    base = RunConfig(
        n_layer=layers,
        n_embd=width,
        ctx_len=ctx_len,
        micro_bsz=micro_bsz,
        precision=args.precision,
        accelerator=args.accelerator,
    )
    if args.accelerator == "cpu":
        set_up_malloc(lean=False)  # as train.py does
    kinds = ["full", *args.kinds.split(",")]
    passes = {kind: Pass(dataclasses.replace(base, **FLAGS[kind]), vocab) for kind in kinds}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(args.warmup + args.rounds):
        for kind, one in passes.items():
            seconds = one.timed()
            if number >= args.warmup:
                times[kind].append(seconds)
    print(f"L{layers}-D{width}, V {vocab}, ctx {ctx_len}, batch {micro_bsz}, {args.precision}, {args.rounds} rounds")
    for kind in kinds:
        ratios = [own / full for own, full in zip(times[kind], times["full"], strict=True)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        milliseconds = 1e3 * statistics.median(times[kind])
        print(f"{kind:>8}  {milliseconds:8.1f} ms   {statistics.median(ratios):.3f} of a full pass ({spread})")


if __name__ == "__main__":
    main()

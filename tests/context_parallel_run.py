"""Gradients of samples that P processes share, for tests/test_context_parallel.py.

    python -m tests.context_parallel_run OUT CASES.json

CASES.json: {"processes": P, "cases": {name: arguments of `gradients`}}. Writes OUT/P/name.pt: the mean over the
processes of loss and gradients, as DDP takes it, the held-out sums, and the bytes that a process received in the step.
With one process the samples are not shared.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from src.adapt.adapter import add_adapter
from src.adapt.config import AdapterConfig
from src.model import RWKV7, ModelConfig
from src.training.distributed.context_parallel import ContextParallel
from src.training.objectives.next_token import NextToken
from src.training.objectives.segments import Segments
from tests.ranks import join_ranks

VOCAB, CTX = 50, 24
SIZES = ModelConfig(n_layer=2, n_embd=32, vocab_size=VOCAB, head_size=16)
# of two rows of CTX: documents over the borders of parts, on them, without tokens, of one token, and over several parts
BOUNDS = torch.tensor([0, 3, 3, 24, 25, 47, 48], dtype=torch.int32)


def gradients(context, packed=False, chunk_ctx=0, bptt=-1, adapter="", double=False, long=False, grad_cp=False):
    torch.manual_seed(0)
    config = ModelConfig(**{**SIZES.__dict__, "kernel": "reference" if double else "auto", "grad_cp": grad_cp})
    model = RWKV7(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if adapter:
        add_adapter(model, AdapterConfig(adapter, r=4))
        for name, parameter in model.named_parameters():
            if name not in model.frozen_base:
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(torch.float64 if double else torch.float32)
    shape = (1, 2 * CTX) if packed else (2, CTX)
    tokens, targets = torch.randint(VOCAB, shape), torch.randint(VOCAB, shape)
    targets[torch.rand(shape) < 0.3] = -100
    bounds = torch.tensor([0, 2 * CTX], dtype=torch.int32) if long else BOUNDS
    batch = (tokens, targets, bounds, torch.tensor(0.7)) if packed else (tokens, targets)
    model.set_context(context)
    objective = NextToken(model.head, 0, Segments(chunk_ctx, CTX, bptt, context))
    before = context.received if context else 0
    loss, _ = objective(model, batch)
    (3.0 * loss).backward()
    result = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    received = context.received - before if context else 0
    with torch.no_grad():
        held_out = objective.evaluate(model, batch)
    result["loss"] = loss.detach()
    if context:
        for name in sorted(result):
            dist.all_reduce(result[name])
            result[name] /= dist.get_world_size()
        dist.all_reduce(held_out)
    return {"values": result, "held_out": held_out, "received": received}


def main():
    out, plan = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    process_group = join_ranks(plan["processes"])
    context = ContextParallel(plan["processes"]) if plan["processes"] > 1 else None
    for name, arguments in plan["cases"].items():
        result = gradients(context, **arguments)
        if process_group.rank == 0:
            (out / str(plan["processes"])).mkdir(exist_ok=True)
            torch.save(result, out / str(plan["processes"]) / f"{name}.pt")
    process_group.shutdown()


if __name__ == "__main__":
    main()

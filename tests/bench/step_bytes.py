"""Memory traffic of a compiled block, counted and not measured: what each kernel of torch.compile's reads and writes.

    python tests/bench/step_bytes.py [--n_embd 768] [--tokens 8192]

For a block after the first in bf16, forward and backward, with its elementwise work as plain PyTorch, which the
compiler fuses, as the native ops of src/ops/elementwise.py, and with these and the first low-rank factors as one
product (src/ops/shifted_products.py), as a GPU has them. Printed: passes over an activation [T, C] by
elementwise kernels, by matrix products and by wkv7, and the number of kernels. Counted with the compiler for CPUs,
whose fusions are nearly a GPU's.
"""

import argparse
import importlib
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.compile_fx as compile_fx
import torch._inductor.config as inductor_config
from torch._inductor.graph import GraphLowering

sys.path.insert(0, str(Path(__file__).parents[2]))

from src.model import ModelConfig
from src.model.layers import Block

KINDS = ("elementwise", "products", "wkv7")


def kind_of(node: Any) -> str:
    names = [getattr(inner.node, "python_kernel_name", None) or "" for inner in node.get_nodes()]
    if any("wkv7_" in name for name in names):
        return "wkv7"
    return "products" if any(name.endswith(("mm", "bmm")) for name in names) else "elementwise"


def count(config: ModelConfig, tokens: int, native: bool, gathered: bool) -> list[tuple[Counter[str], Counter[str]]]:
    """Bytes and kernels by kind, of the forward and the backward graph."""
    elementwise, layers = (importlib.import_module(name) for name in ("src.ops.elementwise", "src.model.layers"))
    gathers = layers.gathers_products
    dtypes, lower = elementwise.NATIVE_DTYPES, GraphLowering.count_bytes
    graphs: list[tuple[Counter[str], Counter[str]]] = []

    def counted(self: GraphLowering) -> Any:
        bytes_, kernels = Counter[str](), Counter[str]()
        for node in self.scheduler.nodes:
            if moved := node.get_read_write_buffers_sizes():
                bytes_[kind_of(node)] += moved
                kernels[kind_of(node)] += 1
        graphs.append((bytes_, kernels))
        return lower(self)

    torch._dynamo.reset()
    GraphLowering.count_bytes = counted  # type: ignore[method-assign]
    elementwise.NATIVE_DTYPES = dtypes if native else {}
    layers.gathers_products = lambda x: gathered
    try:
        x, v_first = (torch.randn(1, tokens, config.n_embd).bfloat16().requires_grad_() for _ in range(2))
        torch.compile(Block(config, 1).bfloat16())(x, v_first, None, None)[0].sum().backward()
    finally:
        GraphLowering.count_bytes, elementwise.NATIVE_DTYPES = lower, dtypes  # type: ignore[method-assign]
        layers.gathers_products = gathers
    return graphs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args()
    # counted only where something logs it, and never for code that comes from a cache
    compile_fx.inductor_metrics_log.setLevel(logging.INFO)
    inductor_config.fx_graph_cache = functorch_config.enable_autograd_cache = False
    ranks = {"d_decay_lora": 64, "d_aaa_lora": 64, "d_mv_lora": 32, "d_gate_lora": 128}
    config = ModelConfig(n_layer=12, n_embd=args.n_embd, vocab_size=65536, **ranks)
    unit = 2 * args.tokens * args.n_embd
    print(
        "| elementwise work | direction | " + " | ".join(KINDS) + " | kernels |\n|---|---|" + "---|" * (len(KINDS) + 1)
    )
    for name, native, gathered in (
        ("plain, fused", False, False),
        ("native ops", True, False),
        ("native ops, products gathered", True, True),
    ):
        graphs = count(config, args.tokens, native, gathered)
        for direction, (bytes_, kernels) in zip(("forward", "backward"), graphs, strict=True):
            cells = [f"{bytes_[kind] / unit:.1f}" for kind in KINDS]
            print(f"| {name} | {direction} | {' | '.join(cells)} | {kernels.total()} |", flush=True)


if __name__ == "__main__":
    main()

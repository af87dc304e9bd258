"""The training step as a GPU is given it. Without one: on meta tensors, which have shapes and no values, so whatever reads a value raises."""

import importlib
import sys
from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src.config import RunConfig
from src.model import RWKV7
from src.ops.build import BuildError, load_native
from src.training.module import TrainingModule
from src.training.preflight import plan
from src.training.strategy import Hardware

VOCAB, CTX, BATCH = 100, 64, 2
SETTINGS = [
    pytest.param({}, id="plain"),
    pytest.param({"grad_cp": 1, "head_chunk": 50}, id="lean"),
    pytest.param({"packed": True}, id="packed"),
    pytest.param({"packed": True, "grad_cp": 1}, id="packed, lean"),
]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The native ops of wkv7 and the loss are taken (their shapes are known), elementwise work is plain PyTorch, AdamW is fused."""
    wkv7, loss = (importlib.import_module(f"src.ops.{name}") for name in ("wkv7", "loss"))
    try:
        load_native(wkv7._register)
        load_native(loss._register)
    except BuildError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(wkv7, "_why_not_native", lambda *given: "")
    monkeypatch.setattr(loss, "_native", lambda *given: True)
    optimizer = sys.modules[torch.optim.Optimizer.__module__]
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["cuda", "meta"])


class Calls(TorchDispatchMode):
    """The ops that are called, with the numbers in their largest output, and whether wkv7 is given rows that lie densely."""

    def __init__(self):
        super().__init__()
        self.calls, self.dense = [], True

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.calls.append((op.name(), max((x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)), default=0)))
        if "wkv7_" in op.name():
            self.dense &= all(x.is_contiguous() for x in args if isinstance(x, torch.Tensor))
        return out

    def count(self, *names, numbers=0):
        return sum(name in names and size >= numbers for name, size in self.calls)


class Step:
    """Optimizer steps on tensors without values, of the objects that train.py trains with."""

    def __init__(self, packed=False, layers=3, **changed):
        config = RunConfig(n_layer=layers, n_embd=128, ctx_len=CTX, micro_bsz=BATCH, weight_decay=0.1, **changed)
        with torch.device("meta"):
            model = RWKV7(config.model_config(VOCAB)).bfloat16()
            self.module = TrainingModule(model, config, Hardware("gpu", 1, 1, "bf16", "plain"), make_dataset=None)
            self.optimizer = self.module.configure_optimizers()
            tokens = torch.zeros(1 if packed else BATCH, CTX, dtype=torch.long)
            bounds = [torch.zeros(4, dtype=torch.int32), torch.ones(())] if packed else []
        self.batch = (tokens, tokens.clone(), *bounds)

    def __call__(self, planted=lambda loss: None):
        loss = self.module.training_step(self.batch, 0)["loss"]
        loss.backward()
        planted(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_reads_nothing_back(as_on_a_gpu, setting):
    step = Step(**setting)
    for _ in range(2):
        step()


@pytest.mark.parametrize(
    "planted",
    [
        lambda x: x.item(),
        lambda x: x.cpu(),
        lambda x: float(x.detach()),
        lambda x: x.reshape(1).tolist(),
        lambda x: x.reshape(1).nonzero(),
        lambda x: "not finite" if x.isnan() else "",
    ],
    ids=["item", "cpu", "float", "tolist", "nonzero", "if"],
)
def test_a_step_that_waits_would_be_noticed(as_on_a_gpu, planted):
    step = Step()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        step(planted)


COPIES = ("aten::clone", "aten::copy_", "aten::contiguous", "aten::_to_copy")
PRODUCTS = (6 + 2 * 3, 6 + 2 * 4)  # of layer 0, which mixes no other layer's values in, and of another; twice as many backward


def test_no_operand_is_copied_and_products_are_as_few_as_can_be(as_on_a_gpu):
    """Of a layer: receptance, key, value, output, two of the channel mix, and two for each low rank."""
    step = Step(layers=3)
    with Calls() as seen:
        step.module.training_step(step.batch, 0)["loss"].backward()
    assert seen.count("aten::mm") == 3 * (PRODUCTS[0] + 2 * PRODUCTS[1] + 1)  # and the head
    assert seen.count("rwkv7::wkv7_forward", "rwkv7::wkv7_backward") == 2 * 3
    assert seen.dense
    assert seen.count(*COPIES, numbers=BATCH * CTX * 128) == 0, Counter(seen.calls)


def test_nor_in_what_is_compiled(as_on_a_gpu):
    """The compiler is given one graph for layer 0 and one for the others, forward and backward each."""
    graphs = []

    def look(graph, inputs):
        nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        sizes = [sum(x.numel() for x in tree_leaves(node.meta.get("val")) if isinstance(x, torch.Tensor)) for node in nodes]
        graphs.append([(node.target.name().split(".")[0], size) for node, size in zip(nodes, sizes, strict=True) if hasattr(node.target, "name")])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=look, bw_compiler=look, partition_fn=min_cut_rematerialization_partition)
    torch._dynamo.reset()
    step = Step(layers=3)
    step.module.model.compile_blocks(backend=backend, fullgraph=True)
    step()
    torch._dynamo.reset()
    products = [sum(name == "aten::mm" for name, _ in graph) for graph in graphs]
    assert sorted(products) == sorted([*PRODUCTS, *(2 * n for n in PRODUCTS)])
    assert not [call for graph in graphs for call in graph if call[0] in COPIES and call[1] >= BATCH * CTX * 128]


def test_the_lean_setting_is_planned_within_5_gb():
    """L12-D768, V 65536, ctx 512, micro batch 16 with --grad_cp 1 --head_chunk 4096 on one GPU in bf16."""
    ranks = {"d_decay_lora": 64, "d_aaa_lora": 64, "d_mv_lora": 32, "d_gate_lora": 128}
    config = RunConfig(n_layer=12, n_embd=768, grad_cp=1, **ranks).model_config(65536)
    assert plan.memory(config, "auto", 1, "bf16", 16 * 512, head_chunk=4096, on_gpu=True).total < 5e9

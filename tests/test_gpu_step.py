"""The training step on a GPU: it never waits for the device. Without a GPU it runs on meta tensors, of which no value
can be read."""

import sys
from collections import Counter

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src.cli import parse
from src.config import RunConfig
from src.dataset.binidx import BinIdxWriter
from src.model import RWKV7, ModelConfig
from src.ops import elementwise, loss, recurrence
from src.ops.build import BuildError, load_native
from src.training.hardware.selection import Hardware
from src.training.module import TrainingModule
from src.training.preflight import plan
from src.training.preflight.piece_memory import Cut
from src.training.run import run

VOCAB, CTX, BATCH = 100, 64, 2
SETTINGS = [
    pytest.param({}, id="plain"),
    pytest.param({"grad_cp": 1, "head_chunk": 50}, id="lean"),
    pytest.param({"packed": True}, id="packed"),
    pytest.param({"packed": True, "grad_cp": 1}, id="packed, lean"),
]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Native ops (by their registered shapes) and fused AdamW."""
    try:
        for module in (recurrence, loss, elementwise):
            load_native(module._register)
    except BuildError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(recurrence, "_choose", lambda *args: "recurrent")
    monkeypatch.setattr(loss, "_native", lambda *args: True)
    monkeypatch.setattr(elementwise, "NATIVE_DTYPES", {"meta": elementwise.NATIVE_DTYPES["cuda"]})
    optimizer = sys.modules[torch.optim.Optimizer.__module__]
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["cuda", "meta"])


class Calls(TorchDispatchMode):
    """The ops called, with the size of their largest output, and whether wkv7's inputs are contiguous."""

    def __init__(self):
        super().__init__()
        self.calls, self.dense = [], True

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.calls.append(
            (op.name(), max((x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)), default=0))
        )
        if "wkv7_" in op.name():
            self.dense &= all(x.is_contiguous() for x in args if isinstance(x, torch.Tensor))
        return out

    def count(self, *names, numbers=0):
        return sum(name in names and size >= numbers for name, size in self.calls)


class Step:
    """Optimizer steps, on tensors without values where no device is given, of the objects that train.py trains with."""

    def __init__(self, packed=False, layers=3, device="meta", **changed):
        # each step by itself: what waits in it is looked for
        settings = {"n_layer": layers, "n_embd": 128, "ctx_len": CTX, "micro_bsz": BATCH, "weight_decay": 0.1}
        config = RunConfig(**{**settings, "cuda_graph": "off", **changed})
        with torch.device(device):
            model = RWKV7(config.model_config(VOCAB)).bfloat16()
            self.module = TrainingModule(model, config, Hardware("gpu", 1, 1, "bf16", "plain"))
            self.optimizer = self.module.configure_optimizers()
            tokens = torch.zeros(1 if packed else BATCH, CTX, dtype=torch.long)
            bounds = [torch.tensor([0, 5, 30, CTX], dtype=torch.int32), torch.ones(())] if packed else []
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
PRODUCTS = (
    6 + 2 * 3,
    6 + 2 * 4,
)  # of layer 0, which mixes no other layer's values in, and of another; twice as many backward


def test_no_operand_is_copied_and_products_are_as_few_as_can_be(as_on_a_gpu):
    """Of a layer: receptance, key, value, output, two of the channel mix, and two for each low rank."""
    step = Step(layers=3)
    with Calls() as seen:
        step.module.training_step(step.batch, 0)["loss"].backward()
    assert seen.count("aten::mm") == 3 * (PRODUCTS[0] + 2 * PRODUCTS[1] + 1)  # and the head
    assert seen.count("rwkv7::wkv7_forward", "rwkv7::wkv7_backward") == 2 * 3
    assert seen.dense
    assert seen.count(*COPIES, numbers=BATCH * CTX * 128) == 0, Counter(seen.calls)


def test_the_compiled_graphs_copy_no_operand_either(as_on_a_gpu):
    """The compiler gets one graph for layer 0 and one for the others, forward and backward each."""
    graphs = []

    def look(graph, inputs):
        nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        sizes = [
            sum(x.numel() for x in tree_leaves(node.meta.get("val")) if isinstance(x, torch.Tensor)) for node in nodes
        ]
        graphs.append(
            [
                (node.target.name().split(".")[0], size)
                for node, size in zip(nodes, sizes, strict=True)
                if hasattr(node.target, "name")
            ]
        )
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
    assert plan.memory(config, "auto", 1, "bf16", Cut(16, 512), head_chunk=4096, on_gpu=True).total < 5e9


# ---- The loop around the step ------------------------------------------------------------------------------

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select", "aten::equal")


@pytest.fixture
def tokens(tmp_path):
    with BinIdxWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document(np.random.default_rng(0).integers(1, VOCAB, 6000).tolist())
    return tmp_path / "data"


def train(tokens, folder, **changed):
    settings = {
        "proj_dir": folder, "data_file": tokens, "vocab_size": VOCAB, "ctx_len": 16, "micro_bsz": 4, "n_layer": 2,
        "n_embd": 64, "head_size": 64, "my_exit_tokens": 16 * 4 * 12, "epoch_steps": 12, "random_seed": 1, **changed,
    }  # fmt: skip
    return run(*parse([word for name, value in settings.items() for word in (f"--{name}", str(value))]))


def in_each_step(monkeypatch, call):
    """call(number of the step) at the beginning of each step of a run."""
    step, number = TrainingModule.training_step, iter(range(10**6))
    monkeypatch.setattr(TrainingModule, "training_step", lambda self, *args: (call(next(number)), step(self, *args))[1])


def test_the_loop_reads_nothing_back(monkeypatch, tmp_path, tokens):
    """Lightning's loop, optimizer and callbacks, from the fourth step of a run to the last but two: a state is saved
    one step before the first weights."""
    seen, starts = Calls(), []
    fit = pl.Trainer.fit

    def watched(self, *args):
        with seen:
            return fit(self, *args)

    monkeypatch.setattr(pl.Trainer, "fit", watched)
    in_each_step(monkeypatch, lambda number: starts.append(len(seen.calls)))
    assert train(tokens, tmp_path / "run", accelerator="cpu", precision="fp32") == 0
    assert len(starts) == 12
    within = seen.calls[starts[3] : starts[-2]]
    assert len(within) > 7 * 100
    assert [name for name, _ in within if name in READS] == []
    assert [name for name, _ in seen.calls if name in READS] != []  # what is saved at the end


# ---- On a GPU ----------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def forbid():
    """forbid(True): PyTorch's synchronising calls raise."""
    before = torch.cuda.get_sync_debug_mode()
    yield lambda now: torch.cuda.set_sync_debug_mode("error" if now else before)
    torch.cuda.set_sync_debug_mode(before)


@gpu
@needs_gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_gpu_step_waits_for_nothing(forbid, setting, compiled):
    step = Step(device="cuda", **setting)
    if compiled:
        step.module.model.compile_blocks()
    for number in range(6):
        forbid(number >= 3)
        step()


@gpu
@needs_gpu
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"grad_cp": 1, "head_chunk": 24},
        {"compile": 1, "grad_cp": 1},
        {"cuda_graph": "off"},
        {"strategy": "deepspeed_stage_2_offload", "grad_cp": 1},
    ],
    ids=["plain", "lean", "compiled", "without a graph", "deepspeed"],
)
def test_gpu_run(monkeypatch, tmp_path, tokens, forbid, changed):
    """A run from its flags to its weights; but under DeepSpeed its loop waits for nothing either."""
    in_each_step(monkeypatch, lambda number: forbid(4 <= number < 10 and "strategy" not in changed))
    assert train(tokens, tmp_path / "run", accelerator="gpu", **changed) == 0
    assert all(tensor.isfinite().all() for tensor in torch.load(tmp_path / "run" / "rwkv-final.pth").values())


@gpu
@needs_gpu
@pytest.mark.parametrize("compiled", ["0", "1"], ids=["plain", "compiled"])
def test_gpu_steps_in_a_graph_are_those_without(compiled):
    """Losses of ten steps whose learning rate and batch change, and what is replayed."""
    curves = []
    for cuda_graph in ("off", "on"):
        torch.manual_seed(0)
        step = Step(device="cuda", cuda_graph=cuda_graph)
        if compiled == "1":
            step.module.model.compile_blocks()
        losses, replayed = [], []
        for number in range(10):
            tokens = torch.randint(VOCAB, (BATCH, CTX + 1), generator=torch.Generator().manual_seed(number)).cuda()
            for group in step.optimizer.param_groups:
                group["lr"] = 1e-3 * (number + 1)
            step.batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

            def closure(step=step, losses=losses):
                loss = step.module.training_step(step.batch, 0)["loss"]
                step.module.optimizer_zero_grad(0, 0, step.optimizer)
                step.module.backward(loss)
                losses.append(loss.detach().clone())

            step.optimizer.step(closure)
            replayed.append(step.module.graph is not None and step.module.graph.replayed)
        assert replayed == [cuda_graph == "on" and number >= 3 for number in range(10)]
        curves.append(torch.stack(losses))
    torch.testing.assert_close(*curves, rtol=1e-3, atol=1e-3)


@gpu
@needs_gpu
@pytest.mark.parametrize("grad_cp", [0, 1])
def test_gpu_memory_is_as_planned(grad_cp):
    model = ModelConfig(8, 512, 6400, grad_cp=bool(grad_cp))
    config = RunConfig(n_layer=8, n_embd=512, ctx_len=512, micro_bsz=8, grad_cp=grad_cp, compile="1", cuda_graph="off")
    with torch.device("cuda"):
        module = TrainingModule(RWKV7(model).bfloat16(), config, Hardware("gpu", 1, 1, "bf16", "plain"))
        optimizer = module.configure_optimizers()
        batch = torch.zeros(8, 512, dtype=torch.long), torch.ones(8, 512, dtype=torch.long)
    module.model.compile_blocks()
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        module.training_step(batch, 0)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    planned = plan.memory(model, "auto", 1, "bf16", 8 * 512, on_gpu=True).total
    assert torch.cuda.max_memory_allocated() < 1.15 * planned + 2**26

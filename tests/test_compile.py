"""torch.compile of a block: one graph, compiled in the first steps only, the same numbers; what backward keeps."""

import importlib
import itertools
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from src.model import RWKV7, ModelConfig
from src.model.layers import Block
from src.ops.loss import cross_entropy_l2wrap
from src.training.optim import MasterAdamW, parameter_groups
from src.training.preflight.plan import kept_by_recurrence

CONFIG = ModelConfig(n_layer=2, n_embd=64, vocab_size=50, head_size=32)


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def busy(module):
    """Every parameter matters: many initial values are zero and would hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def block_gradients(call, x, v_first, bounds, parameters):
    out, v_first_out, _ = call(x, v_first, None, bounds)
    return [out, *torch.autograd.grad(out.square().sum() + v_first_out.sum(), [x, *parameters])]


# Fused on a CPU or plain, as on a GPU; the layer; packed rows; fp32. PAIRS has every two of them in all four ways; the
# rest is slow.
BLOCKS = list(itertools.product((True, False), (0, 1), (False, True), (True, False)))
PAIRS = {(True, 0, False, True), (True, 1, True, False), (False, 0, True, False), (False, 1, False, False),
         (False, 1, True, True)}  # fmt: skip


@pytest.mark.parametrize(
    ("fused", "layer", "packed", "fp32"),
    [pytest.param(*block, marks=[] if block in PAIRS else pytest.mark.slow) for block in BLOCKS],
)
def test_a_block_is_one_graph_with_the_same_numbers(fused, layer, packed, fp32, monkeypatch):
    if not fused:
        monkeypatch.setattr(importlib.import_module("src.ops.elementwise"), "NATIVE_DTYPES", {})
    dtype = torch.float32 if fp32 else torch.bfloat16
    block = busy(Block(CONFIG, layer)).to(dtype)
    bounds = torch.tensor([0, 5, 17, 24], dtype=torch.int32) if packed else None
    x = torch.randn(1 if packed else 2, 24, 64).to(dtype).requires_grad_()
    v_first = torch.randn(x.shape).to(dtype) if layer else None
    parameters = [p for p in block.parameters() if p.requires_grad]
    plain = block_gradients(block, x, v_first, bounds, parameters)
    compiled = block_gradients(
        torch.compile(block, fullgraph=True, backend="aot_eager"), x, v_first, bounds, parameters
    )
    for a, b in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_steps_compile_nothing_new():
    """The first block and another, however many there are: PyTorch's own limit is 8 graphs, and silence beyond."""
    model = busy(RWKV7(replace(CONFIG, n_layer=12)))
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_blocks(backend=counter, fullgraph=True)
    optimizer = MasterAdamW(parameter_groups(model, 0.1), lr=1e-3, betas=(0.9, 0.99), eps=1e-18, grad_clip=1.0)
    for step in range(4):
        tokens = torch.randint(50, (2, 17))
        cross_entropy_l2wrap(model(tokens[:, :-1])[0], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] *= 0.9
        if step == 0:
            graphs = counter.frame_count
    assert counter.frame_count == graphs == 2


def raising_backend(direction):
    """A compiler that fails at the forward or the backward graph."""

    def compile_graph(graph, inputs):
        return make_boxed_func(graph.forward)

    def fail(graph, inputs):
        raise RuntimeError("no such instruction")

    compilers = {"fw_compiler": compile_graph, "bw_compiler": compile_graph, f"{direction}_compiler": fail}
    return aot_autograd(**compilers)


@pytest.mark.parametrize("direction", ["fw", "bw"])
@pytest.mark.parametrize("grad_cp", [False, True])
def test_a_failure_to_compile_falls_back_with_one_warning(direction, grad_cp):
    config = replace(CONFIG, n_layer=3, grad_cp=grad_cp)
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = busy(RWKV7(config))
        if compiled:
            model.compile_blocks(backend=raising_backend(direction))
        tokens = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(1))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                model.zero_grad()
                model(tokens)[0].square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        messages = [str(w.message) for w in caught if "torch.compile failed" in str(w.message)]
        assert len(messages) == compiled
        assert all("no such instruction" in message and "--compile 0" in message for message in messages)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_mistake_in_the_call_is_the_error_without_compilation():
    model = busy(RWKV7(CONFIG))
    model.compile_blocks(backend="aot_eager")
    x, v_first = torch.randn(1, 24, 64), torch.randn(1, 23, 64)  # of another length
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"size|are needed"):
            model.blocks[1](x, v_first, None, None)


@pytest.mark.parametrize("grad_cp", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_packed_rows_soon_compile_nothing_new(grad_cp):
    """The number of documents changes at every step: compiled for the first number, once for any, and once for one."""
    model = busy(RWKV7(replace(CONFIG, n_layer=3, grad_cp=grad_cp)))
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_blocks(backend=counter, fullgraph=True)
    for step, cuts in enumerate([[3, 9], [5], [], [2, 4, 11, 13], [1, 8, 15], [7], []]):
        bounds = torch.tensor([0, *cuts, 16], dtype=torch.int32)
        model(torch.randint(50, (1, 16)), cu_seqlens=bounds)[0].square().sum().backward()
        with torch.no_grad():  # held-out data
            model(torch.randint(50, (1, 16)), cu_seqlens=bounds)
        if step == 2:
            graphs = counter.frame_count
    assert counter.frame_count == graphs <= 2 * 2 * 3


def test_gradient_checkpointing_with_compile():
    tokens = torch.randint(50, (2, 16))
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = busy(RWKV7(ModelConfig(n_layer=2, n_embd=64, vocab_size=50, head_size=32, grad_cp=True)))
        if compiled:
            model.compile_blocks(backend="aot_eager", fullgraph=True)
        model(tokens)[0].square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("grad_cp", [False, True])
def test_what_was_compiled_is_found_again_by_the_next_run(grad_cp, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        model = busy(RWKV7(replace(CONFIG, n_layer=1, grad_cp=grad_cp)))
        model.compile_blocks()
        model(torch.randint(50, (2, 16)))[0].square().mean().backward()
        found.append({name: counters["aot_autograd"][f"autograd_cache_{name}"] for name in ("miss", "hit", "bypass")})
    assert found == [{"miss": 1, "hit": 0, "bypass": 0}, {"miss": 0, "hit": 1, "bypass": 0}]


@pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
])  # fmt: skip
def test_the_loss_curve_is_the_same_with_and_without_compile(device):
    config = ModelConfig(n_layer=2, n_embd=128, vocab_size=64)
    follower = torch.randperm(64)  # a language: mostly the follower of the token before, now and then anything
    text = torch.randint(64, (200, 8, 65))
    for t in range(1, 65):
        text[..., t] = torch.where(torch.rand(200, 8) < 0.7, follower[text[..., t - 1]], text[..., t])
    curves = []
    for compiled in (False, True):
        torch.manual_seed(3)
        model = RWKV7(config).to(device)
        if compiled:
            model.compile_blocks()
        optimizer = MasterAdamW(parameter_groups(model, 0.001), lr=3e-4, betas=(0.9, 0.99), eps=1e-18, grad_clip=1.0)
        losses = []
        for rows in text.to(device):
            loss = cross_entropy_l2wrap(model(rows[:, :-1])[0], rows[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < 0.8 * curves[0][0]  # it learned
    assert (curves[0] - curves[1]).abs().max() < 1e-3


def kept_by_layer(model, tokens):
    """Bytes per token and layer that autograd keeps for backward, what it was given and parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden(torch.zeros(1, tokens, dtype=torch.long))
    return sum(size for size, _ in storages.values()) / tokens


def test_what_backward_keeps_is_as_the_docs_list_it():
    """Multiples of C per token and layer: 24 activations, wkv7's S a and states, the hidden layer twice; low rank."""
    tokens = 512
    sizes = [ModelConfig(n_layer=n, n_embd=128, vocab_size=50) for n in (2, 4)]
    few, many = (kept_by_layer(RWKV7(config), tokens) for config in sizes)
    config = sizes[0]
    width = config.n_embd
    ranks = config.d_decay_lora + config.d_aaa_lora + config.d_mv_lora + config.d_gate_lora
    per_layer = (many - few) / 2 / 4  # fp32 numbers
    states = width * config.head_size * ((tokens - 1) // 32) / tokens
    assert per_layer == pytest.approx(24 * width + width + states + 2 * config.dim_ffn + ranks, rel=0.02)


def test_the_docs_have_these_bytes():
    """Per token and layer of L8-D512: with everything kept, with --grad_cp 1, and that on a GPU in bf16."""
    width, states = 512, 512 * 64 / 32
    config = ModelConfig(8, width, 6400)
    ranks = config.d_decay_lora + config.d_aaa_lora + config.d_mv_lora + config.d_gate_lora
    whole, lean = 4 * (24 * width + width + states + 2 * config.dim_ffn + ranks), 4 * (2 * width + width + states)
    on_gpu = 2 * 2 * width + kept_by_recurrence(config, "bf16", on_gpu=True)
    words = (Path(__file__).parents[1] / "docs/model.md").read_text(encoding="utf-8")
    pattern = r"in fp32: (\d+) KB per token and layer\. With `--grad_cp 1` it is (\d+) KB.*?in bf16 ([\d.]+) KB in all"
    found = [float(number) for number in re.search(pattern, words, re.DOTALL).groups()]
    assert found == [round(whole / 1e3), round(lean / 1e3), round(on_gpu / 1e3, 1)]

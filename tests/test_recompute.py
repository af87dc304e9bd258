"""--grad_cp 1: backward recomputes a block except the recurrence, eager and compiled, with the same gradients."""

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from src.model import RWKV7, ModelConfig, State, layers
from src.ops import wkv7 as op

BOUNDS = {"rows": None, "packed": torch.tensor([0, 5, 17, 17, 24], dtype=torch.int32)}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Calls(TorchDispatchMode):
    """How often wkv7's forward and backward really run, and the products."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = self.products = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.forward += op.name() == "rwkv7::wkv7_forward"
        self.backward += op.name() == "rwkv7::wkv7_backward"
        self.products += op.name() == "aten::mm"
        return op(*args, **(kwargs or {}))


def busy_model(grad_cp, dtype=torch.float32, kernel="auto"):
    torch.manual_seed(0)
    model = RWKV7(ModelConfig(n_layer=3, n_embd=64, vocab_size=50, head_size=32, grad_cp=grad_cp, kernel=kernel))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def gradients(model, bounds, backwards=1):
    """Of everything that is learned and of the state that the sequences begin with."""
    torch.manual_seed(1)
    tokens = torch.randint(50, (1 if bounds is not None else 2, 24))
    sequences = 2 if bounds is None else len(bounds) - 1
    dtype = model.emb.weight.dtype
    state = State.zeros(model.config, sequences, dtype=dtype)
    leaves = [t.normal_().requires_grad_() for layer in state.layers for t in layer]
    logits, after = model(tokens, state, bounds)
    loss = logits.float().square().mean() + sum(layer.wkv.square().mean() for layer in after.layers)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for n in range(backwards):
        grads = torch.autograd.grad(loss, [*parameters, *leaves], retain_graph=n + 1 < backwards)
    return grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bounds", BOUNDS)
def test_the_recurrence_runs_once_a_layer_and_gradients_keep_their_bits(bounds, dtype):
    expected = gradients(busy_model(False, dtype), BOUNDS[bounds])
    with Calls() as plain:
        gradients(busy_model(False, dtype), BOUNDS[bounds])
    with Calls() as calls:
        recomputed = gradients(busy_model(True, dtype), BOUNDS[bounds])
    assert (calls.forward, calls.backward) == (3, 3)
    assert calls.products > plain.products  # the rest was recomputed
    assert all(torch.equal(a, b) for a, b in zip(recomputed, expected, strict=True))


def test_whole_blocks_recomputed_would_be_noticed(monkeypatch):
    monkeypatch.setattr(layers, "recomputed", lambda f, *args, **_: checkpoint(f, *args, use_reentrant=False))
    with Calls() as calls:
        gradients(busy_model(True), None)
    assert calls.forward == 6


def test_backward_twice_through_one_graph():
    with Calls() as calls:
        twice = gradients(busy_model(True), None, backwards=2)
    assert (calls.forward, calls.backward) == (3, 6)
    assert all(torch.equal(a, b) for a, b in zip(twice, gradients(busy_model(False), None), strict=True))


def test_with_the_reference_everything_is_recomputed():
    one, other = (gradients(busy_model(grad_cp, kernel="reference"), None) for grad_cp in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_nothing_is_recorded_without_need():
    """Not without gradients, and not after a block that failed."""
    model = busy_model(True)
    with torch.no_grad(), Calls() as calls:
        model(torch.zeros(1, 24, dtype=torch.long))
    assert calls.forward == 3
    with pytest.raises(RuntimeError):
        model.blocks[1](torch.randn(1, 24, 64), torch.randn(1, 23, 64), None, None)  # v_first of another length
    x = [torch.randn(1, 4, 2, 32, requires_grad=True) for _ in range(6)]
    with Calls() as calls:
        op(*x)[0].sum().backward()
        op(*x)[0].sum().backward()
    assert (calls.forward, calls.backward) == (2, 2)


@pytest.mark.parametrize("bounds", BOUNDS)
def test_compiled_backward_has_no_recurrence_in_its_graph(bounds):
    counts = {"forward": 0, "backward": 0}

    def counting(direction):
        def compile_graph(graph, inputs):
            targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
            counts[direction] += targets.count(torch.ops.rwkv7.wkv7_forward.default)
            return make_boxed_func(graph.forward)

        return compile_graph

    backend = aot_autograd(
        fw_compiler=counting("forward"),
        bw_compiler=counting("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    expected = gradients(busy_model(False), BOUNDS[bounds])
    model = busy_model(True)
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    compiled = gradients(model, BOUNDS[bounds])
    assert counts == {
        "forward": 2,
        "backward": 0,
    }  # once in each graph: that of the first block, and that of the others
    for a, b in zip(compiled, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)

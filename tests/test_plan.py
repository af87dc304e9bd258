"""The formulas of plan.py, compared with the memory that PyTorch and the engines allocate."""

import importlib
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from random_model import random_model
from test_multimodal import tiny_encoder
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from src.adapt.adapter import add_adapter
from src.adapt.config import AdapterConfig
from src.adapt.quantize import quantize_base
from src.cli import parse
from src.config import RunConfig
from src.model import RWKV7, ModelConfig
from src.model.cost import parameter_count
from src.multimodal.config import media_of
from src.multimodal.front_end import FrontEnd
from src.ops.build import load_native
from src.ops.recurrence import _register
from src.training import optim
from src.training.objectives.head_loss import HeadLoss
from src.training.optim import MasterAdamW, parameter_groups
from src.training.preflight import plan
from src.training.preflight.front_end_memory import front_end_size
from src.training.preflight.piece_memory import Cut
from src.training.preflight.plan import Memory, with_front_end
from src.training.run import run


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(8, 512, 6400),
        ModelConfig(12, 768, 65536),
        ModelConfig(3, 128, 77, head_size=32, dim_ffn=200, d_decay_lora=8, d_gate_lora=40),
    ],
)
def test_parameter_count(config):
    with torch.device("meta"):
        model = RWKV7(config)
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(autouse=True)
def _plain_elementwise(monkeypatch):
    """Elementwise ops as on a GPU: the fused ones of a CPU keep less for backward."""
    monkeypatch.setattr(importlib.import_module("src.ops.elementwise"), "NATIVE_DTYPES", {})


def saved_for_backward(config, tokens, dtype, adapter=None):
    model = RWKV7(config).to(dtype)
    if adapter is not None:
        add_adapter(model, adapter)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden, _ = model.hidden(torch.zeros(1, tokens, dtype=torch.long))
    del hidden
    return sum(saved.values())


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(2, 128, 0), (4, 192, 300)])
def test_activation_bytes_equal_the_saved_tensors(precision, shape):
    layers, width, dim_ffn = shape
    config = ModelConfig(layers, width, 100, dim_ffn=dim_ffn)
    measured = saved_for_backward(config, 512, PRECISIONS[precision])
    assert plan.activation_bytes(config, 512, precision) == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_a_block_keeps_is_what_one_more_block_saves(precision):
    """A block after the first: to one in a hundred, so that a wrong count of its tensors is seen."""
    two, three = (saved_for_backward(ModelConfig(n, 128, 100), 512, PRECISIONS[precision]) for n in (2, 3))
    expected = 512 * plan.kept_by_block(ModelConfig(3, 128, 100), precision)
    assert expected == pytest.approx(three - two, rel=0.01)


ADAPTERS = {
    "lora": AdapterConfig("lora", r=8),
    "two matrices": AdapterConfig("lora", r=8, target_modules=("att.key", "att.value")),
    "vectors": AdapterConfig("lora", r=8, train=("ln", "vectors")),
    "pissa": AdapterConfig("pissa", r=8),
    "dora": AdapterConfig("dora", r=8),
    "miss": AdapterConfig("miss", r=8),
    "state": AdapterConfig("state"),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_activation_bytes_of_adapters_equal_the_saved_tensors(kind, precision):
    for layers, width, dim_ffn in ((2, 128, 0), (4, 192, 300)):
        config = ModelConfig(layers, width, 100, dim_ffn=dim_ffn)
        measured = saved_for_backward(config, 256, PRECISIONS[precision], ADAPTERS[kind])
        expected = plan.activation_bytes(config, 256, precision, adapter=ADAPTERS[kind])
        assert expected == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
@pytest.mark.parametrize("kind", ["lora", "pissa", "vectors", "state"])
def test_an_adapted_model_holds_what_the_plan_says(kind, quant):
    """Weights, gradients and moments, counted tensor by tensor: nothing is there for what is frozen."""
    config, adapter = ModelConfig(2, 128, 300), ADAPTERS[kind]
    model = RWKV7(config).bfloat16()
    if quant != "none":
        quantize_base(model, quant)
    add_adapter(model, adapter)
    optimizer = MasterAdamW(parameter_groups(model, 0.0), lr=1e-3, betas=(0.9, 0.99), eps=1e-18, grad_clip=1.0)
    model(torch.zeros(1, 4, dtype=torch.long))[0].float().sum().backward()
    expected = plan.memory(config, "auto", 1, "bf16", Cut(1, 4), adapter=adapter, quant=quant)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert gradients == expected.gradients
    optimizer.step()
    moments = sum(optimizer.moments(p)[kind].nbytes for p in optimizer.parameters for kind in ("exp_avg", "exp_avg_sq"))
    masters = sum(m.nbytes for p, m in zip(optimizer.parameters, optimizer.masters, strict=True) if m is not p)
    assert moments + masters == expected.optimizer
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    largest = 6 * 128 * 512 if quant != "none" else 0  # dequantised while it is multiplied
    assert held + largest == pytest.approx(expected.weights, rel=0.02)


def memory_events(work):
    """Bytes allocated (positive) and freed (negative) by `work`, in order; its result is freed afterwards."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    del result
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak_bytes(work):
    """The peak of the memory that `work` allocates."""
    return max(accumulate(memory_events(work)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_activation_bytes_with_activation_checkpointing(precision):
    """Each layer keeps its input, and the recurrence its output and what its gradients need; one is recomputed."""
    config = ModelConfig(4, 192, 100, grad_cp=True)
    model = RWKV7(config).to(PRECISIONS[precision])
    tokens = torch.zeros(1, 512, dtype=torch.long)
    model.hidden(tokens)  # allocates what is allocated only once
    between = sum(memory_events(lambda: model.hidden(tokens)[0]))
    at_work = plan.kept_by_block(config, precision) - plan.kept_by_recurrence(config, precision)
    at_work -= PRECISIONS[precision].itemsize * config.n_embd
    assert plan.activation_bytes(config, 512, precision) == pytest.approx(between + 512 * at_work, rel=0.05)
    per_layer = between / 512 / config.n_layer / config.n_embd
    states_and_sums, vectors = 4 * (64 / 32 + 1), PRECISIONS[precision].itemsize * (2 + 2 / config.n_layer)
    assert per_layer == pytest.approx(states_and_sums + vectors, rel=0.07)


@pytest.mark.parametrize("native", [True, False], ids=["native", "plain"])
@pytest.mark.parametrize("head_chunk", [0, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logit_bytes_equal_the_peak_of_the_loss(dtype, head_chunk, native, monkeypatch, request):
    if not native:
        monkeypatch.setattr(importlib.import_module("src.ops.loss"), "NATIVE_DTYPES", {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a bf16 product allocates buffers for each
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    config, tokens = ModelConfig(1, 128, 2000), 512
    head = torch.nn.Linear(128, 2000, bias=False).to(dtype)
    hidden = torch.randn(1, tokens, 128, dtype=dtype, requires_grad=True)
    targets = torch.randint(2000, (1, tokens))
    head.weight.grad, hidden.grad = torch.zeros_like(head.weight), torch.zeros_like(hidden)
    HeadLoss(head, head_chunk)(hidden, targets).backward()
    measured = peak_bytes(lambda: HeadLoss(head, head_chunk)(hidden, targets).backward())
    expected = plan.logit_bytes(config, tokens, dtype.itemsize, head_chunk, native)
    new = head.weight.nbytes  # the new gradient before it is added to the old one, which counts as a gradient
    # A processor without bf16 products computes them in fp32, and holds the result in both.
    buffer = 4 * tokens * config.vocab_size if dtype == torch.bfloat16 else 0
    assert expected < measured * 1.25
    assert expected + new + buffer > measured * 0.7


@pytest.mark.parametrize("changed", [{}, {"grad_cp": True}], ids=["plain", "grad_cp"])
def test_a_whole_step_stays_within_the_estimate(changed):
    config = ModelConfig(4, 128, 1000, **changed)
    model = RWKV7(config)
    optimizer = MasterAdamW(parameter_groups(model, 0.0), lr=1e-3, betas=(0.9, 0.99), eps=1e-18, grad_clip=1.0)
    head_loss, tokens = HeadLoss(model.head, 0), torch.randint(1000, (4, 129))

    def step():
        head_loss(model.hidden(tokens[:, :-1])[0], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    expected = plan.memory(config, "auto", 1, "fp32", Cut(4, 128))
    at_work = expected.total - expected.weights - expected.optimizer
    assert 0.7 * at_work < peak_bytes(step) < 1.1 * at_work


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_optimizer_and_gradient_bytes_in_one_process(precision):
    config = ModelConfig(2, 128, 300)
    model = RWKV7(config).to(torch.float32 if precision == "fp32" else torch.bfloat16)
    optimizer = MasterAdamW(parameter_groups(model, 0.0), lr=1e-3, betas=(0.9, 0.99), eps=1e-18, grad_clip=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    tensors = [
        t for p in optimizer.parameters for t in (optimizer.moments(p)["exp_avg"], optimizer.moments(p)["exp_avg_sq"])
    ]
    tensors += [optimizer.master_of(p) for p in optimizer.parameters if optimizer.master_of(p) is not p]
    expected = plan.memory(config, "auto", 1, precision, Cut(1, 64))
    assert expected.optimizer == pytest.approx(sum(t.nbytes for t in tensors), rel=0.02)
    assert expected.weights == sum(p.nbytes for p in model.parameters())
    assert expected.gradients == pytest.approx(sum(p.grad.nbytes for p in optimizer.parameters), rel=0.02)


@pytest.mark.parametrize("head_size", [32, 64, 128])
@pytest.mark.parametrize("kernel", ["recurrent", "chunked"])
def test_bytes_kept_by_the_recurrence_equal_the_outputs_of_its_kernels(kernel, head_size):
    """The shapes come from the fake op, which torch.compile uses, for a GPU."""
    if kernel == "chunked" and head_size != 64:
        pytest.skip("the chunked kernel has head size 64")
    config, tokens = ModelConfig(1, 256, 100, head_size=head_size, kernel=kernel), 4800
    load_native(_register)
    with FakeTensorMode():
        r = torch.empty(1, tokens, config.n_head, head_size, dtype=torch.bfloat16, device="cuda")
        _, _, states, sums = torch.ops.rwkv7.wkv7_forward(*6 * [r], None, None, True, kernel == "chunked")
    expected = tokens * plan.kept_by_recurrence(config, "bf16", on_gpu=True)
    assert expected == pytest.approx(states.nbytes + sums.nbytes, rel=0.02)


@pytest.mark.parametrize("chunked", [True, False], ids=["in chunks", "whole"])
def test_a_step_allocates_no_second_copy_of_all_gradients(chunked, monkeypatch):
    """bf16 weights and gradients, fp32 masters and two moments; a step adds the fp32 gradients of one chunk."""
    if chunked:
        monkeypatch.setattr(optim, "MAX_FP32_GRAD_NUMEL", 300_000)
    config = ModelConfig(4, 256, 1200)
    model = RWKV7(config).bfloat16()
    adam = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-18, "grad_clip": 1.0}
    optimizer = MasterAdamW(parameter_groups(model, 0.0), **adam, kernel="portable")  # the native step makes no copies
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # allocates the moments
    measured = peak_bytes(optimizer.step)
    expected = plan.memory(config, "auto", 1, "bf16", Cut(1, 64))
    copies = 4 * parameter_count(config)
    assert 0.75 * expected.step < measured < 1.1 * expected.step
    assert (measured < 0.3 * copies) == chunked


def test_what_each_zero_stage_partitions():
    config, sizes = ModelConfig(61, 8192, 65536), {}
    for name in ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3", "deepspeed_stage_3_offload"):
        sizes[name] = plan.memory(config, name, 64, "bf16", Cut(1, 4096))
    count = parameter_count(config)
    assert sizes["ddp"].optimizer == 12 * count
    assert sizes["deepspeed_stage_1"].optimizer == pytest.approx(12 * count / 64)
    assert sizes["deepspeed_stage_1"].gradients == 2 * count > 20 * sizes["deepspeed_stage_2"].gradients
    assert sizes["deepspeed_stage_2"].weights == 2 * count
    assert sizes["deepspeed_stage_3"].weights == pytest.approx(2 * count / 64 + 2e9)
    buckets = 2 * 2 * 200e6  # two of 200 million elements in bf16: one is reduced while the next one fills
    assert sizes["deepspeed_stage_2"].gradients == pytest.approx(2 * count / 64 + buckets)
    assert sizes["deepspeed_stage_3"].gradients == pytest.approx(2 * count / 64 + buckets)
    assert sizes["deepspeed_stage_3_offload"].gradients == pytest.approx(buckets)
    small = plan.memory(config, "deepspeed_stage_2", 64, "bf16", Cut(1, 4096), bucket_mb=50)
    assert small.gradients == pytest.approx(2 * count / 64 + buckets / 4)
    assert sizes["deepspeed_stage_1"].step == pytest.approx(4 * count / 64)
    offloaded = sizes["deepspeed_stage_3_offload"]
    assert offloaded.optimizer == 0
    assert offloaded.on_cpu == pytest.approx(18 * count / 64)
    totals = [size.total for size in sizes.values()]
    assert totals == sorted(totals, reverse=True)


def test_the_peak_is_that_of_backward_or_of_the_optimizer_step():
    """Logits are never allocated together with the block being recomputed."""
    parts = {"weights": 1, "gradients": 2, "optimizer": 3, "activations": 10, "logits": 5, "fragmentation": 1}
    assert plan.Memory(**parts, step=4, recomputed=3).total == 1 + 2 + 3 + 1 + 10 + 5 - 3
    assert plan.Memory(**parts, step=4, recomputed=9).total == 1 + 2 + 3 + 1 + 10
    assert plan.Memory(**parts, step=40).total == 1 + 2 + 3 + 1 + 40


def test_the_gradient_of_a_chunked_head_exists_twice_while_it_is_scaled():
    config, hidden = ModelConfig(1, 128, 2000), 2 * 512 * 128
    head = 4 * 2000 * 128
    assert plan.logit_bytes(config, 512, 2, head_chunk=16) == 2 * head + hidden
    assert plan.logit_bytes(config, 512, 2, head_chunk=500) == head + 2 * 500 * 2000 + hidden
    assert plan.logit_bytes(config, 512, 2, head_chunk=0) == 2 * 512 * 2000


def test_plan_from_the_command_line(capsys, tmp_path):
    flags = "--n_layer 12 --n_embd 768 --vocab_size 65536 --ctx_len 512 --micro_bsz 16 --my_exit_tokens 1498226207"
    assert (
        run(*parse(["--plan", "100000", "--proj_dir", str(tmp_path / "none"), *flags.split(), "--devices", "8"])) == 0
    )
    output = capsys.readouterr().out
    assert "191,084,544 parameters" in output
    assert "22,862 steps of 65,536 tokens" in output
    assert "4.2 hours" in output
    assert "deepspeed_stage_3_offload" in output
    assert not (tmp_path / "none").exists()
    assert run(*parse(["--plan", *flags.split()])) == 0
    assert "hours at" not in capsys.readouterr().out


def test_plan_takes_the_vocabulary_of_the_weights(capsys, tmp_path):
    torch.save(random_model(n_layer=1, n_embd=64, vocab_size=65792).state_dict(), tmp_path / "base.pth")
    flags = ["--load_model", str(tmp_path / "base.pth"), "--tokenizer", "world", "--my_exit_tokens", "99999"]
    assert run(*parse(["--plan", *flags])) == 0
    assert "vocabulary 65,792" in capsys.readouterr().out


@pytest.mark.parametrize("encoder", ["patches", "hf"])
def test_a_front_end_is_counted(encoder, tmp_path):
    """Its weights, and of what is trained gradients and optimizer; a frozen base beside a projector has neither."""
    folder = tiny_encoder("clip", tmp_path / "clip") if encoder == "hf" else None
    model = ModelConfig(n_layer=2, n_embd=32, vocab_size=64, head_size=16)
    config = RunConfig(encoder=f"hf:{folder}" if folder else "patches", encoder_dim=16, projector="linear")
    media = media_of(config)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in FrontEnd(media, 32).named_children()}
    size = front_end_size(config, 32)
    assert size == ((counts["projector"], counts["encoder"]) if folder else (sum(counts.values()), 0))
    plain = Memory(100, 100, 100, 100, 100, 100)
    with_media = with_front_end(plain, config, model, "bf16")
    base = 0 if folder else 100
    assert with_media.weights == 100 + 2 * sum(counts.values())
    assert (with_media.gradients, with_media.optimizer) == (base + 2 * size.trained, base + 12 * size.trained)
    assert with_front_end(plain, replace(config, encoder=""), model, "bf16") == plain

"""The optimizer: AdamW's mathematics, fp32 masters, clipping, skipped steps, loss scaling."""

import copy
from types import SimpleNamespace

import pytest
import torch

from src.config import RunConfig
from src.model import RWKV7, ModelConfig
from src.training import optim
from src.training.checkpoint import callbacks
from src.training.optim import MasterAdamW, adam_arguments, parameter_groups

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-18, "grad_clip": 0.5}


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    return RWKV7(ModelConfig(2, 64, 20, head_size=32)).to(dtype)


def build(model, **changed):
    optimizer = MasterAdamW(parameter_groups(model, weight_decay=0.1), **{**SETTINGS, **changed})
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_scale"]
    return optimizer


def set_gradients(model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype) if p.requires_grad else None


def test_parameter_groups_follow_the_init_table():
    groups = parameter_groups(small_model(), weight_decay=0.1)
    by_rule = {(g["lr_scale"], g["weight_decay"]): g["names"] for g in groups}
    assert by_rule.keys() == {(2.0, 0.0), (1.0, 0.1), (1.0, 0.0)}
    assert by_rule[2.0, 0.0] == ["blocks.0.att.w0", "blocks.1.att.w0"]
    assert "emb.weight" in by_rule[1.0, 0.1]
    assert "blocks.0.att.w1" in by_rule[1.0, 0.0]
    assert not [n for g in groups for n in g["names"] if n.startswith("blocks.0.att.v") and n[-1] in "012"]


def test_settings_of_adam_are_those_of_the_flags():
    config = RunConfig(lr_init=1e-3, beta1=0.8, beta2=0.95, adam_eps=1e-9, grad_clip=0.3)
    assert adam_arguments(config) == {"lr": 1e-3, "betas": (0.8, 0.95), "eps": 1e-9, "grad_clip": 0.3}


@pytest.mark.parametrize("eps", [1e-18, 0.1])
def test_three_steps_match_the_formula_in_float64(eps):
    model = small_model()
    optimizer = build(model, eps=eps)
    names = {id(p): n for n, p in model.named_parameters()}
    theta = {n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad}
    m = {n: torch.zeros_like(t) for n, t in theta.items()}
    v = {n: torch.zeros_like(t) for n, t in theta.items()}
    for step in (1, 2, 3):
        set_gradients(model, seed=step, scale=1e-3 if step == 2 else 1.0)  # whose norm is below the limit
        grads = {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad}
        norm = torch.sqrt(sum(g.square().sum() for g in grads.values()))
        clip = min(1.0, 0.5 / (norm.item() + 1e-6))
        for group in optimizer.param_groups:
            for p in group["params"]:
                n, lr = names[id(p)], group["lr"]
                g = grads[n] * clip
                m[n] = 0.9 * m[n] + 0.1 * g
                v[n] = 0.99 * v[n] + 0.01 * g * g
                theta[n] *= 1 - lr * group["weight_decay"]
                theta[n] -= lr * (m[n] / (1 - 0.9**step)) / (torch.sqrt(v[n] / (1 - 0.99**step)) + eps)
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    for n, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.detach().double(), theta[n], atol=1e-6, rtol=1e-5)


def test_a_grad_clip_of_0_clips_nothing():
    models = [small_model(), small_model()]
    for model, grad_clip in zip(models, (0.0, 1e9), strict=True):
        optimizer = build(model, grad_clip=grad_clip)
        for seed in (1, 2):
            set_gradients(model, seed)
            optimizer.step()
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert not torch.equal(models[0].head.weight, small_model().head.weight)


def test_masters_accumulate_updates_below_the_resolution_of_bf16():
    """Without an fp32 master these updates would be rounded away."""
    model = small_model(torch.bfloat16)
    before = model.head.weight.detach().clone()
    optimizer = build(model, lr=1e-5)
    for _ in range(300):
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()
    moved = (before - model.head.weight.detach()).float()
    assert moved.mean().item() == pytest.approx(300 * 1e-5, rel=0.05)
    assert all(master.dtype == torch.float32 for master in optimizer.masters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_with_a_non_finite_gradient_is_skipped(dtype, value):
    model = small_model(dtype)
    optimizer = build(model)
    set_gradients(model, seed=1)
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    moments = {p: copy.deepcopy(optimizer.moments(p)) for p in optimizer.parameters}
    set_gradients(model, seed=2)
    model.head.weight.grad[0, 0] = value
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for parameter, kept in moments.items():
        assert kept.keys() == {"exp_avg", "exp_avg_sq", "step"}
        for key, tensor in optimizer.moments(parameter).items():
            assert torch.equal(tensor, kept[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_steps_equal_unchunked_ones(dtype, monkeypatch):
    model, chunked_model = small_model(dtype), small_model(dtype)
    optimizer = build(model, kernel="portable")  # the native step of bf16 on a CPU has no chunks
    monkeypatch.setattr(optim, "MAX_FP32_GRAD_NUMEL", 5000)
    chunked = build(chunked_model, kernel="portable")
    for seed in (1, 2):
        for each_model, each in ((model, optimizer), (chunked_model, chunked)):
            set_gradients(each_model, seed)
            each.param_groups[0]["lr"] *= 0.9
            each.step()
    assert optimizer.grad_norm == chunked.grad_norm
    for a, b in zip(optimizer.parameters, chunked.parameters, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.master_of(a), chunked.master_of(b))
        assert all(torch.equal(optimizer.moments(a)[kind], moment) for kind, moment in chunked.moments(b).items())


@pytest.mark.parametrize("eps", [1e-18, 0.1])
def test_the_native_step_is_that_of_plain_pytorch(eps):
    models = [small_model(torch.bfloat16) for _ in range(2)]
    native, plain = build(models[0], eps=eps), build(models[1], eps=eps, kernel="portable")
    if not isinstance(native._adam, optim._AdamOnCpu):
        pytest.skip("no native library on this machine")
    assert not isinstance(plain._adam, optim._AdamOnCpu)
    for seed in (1, 2, 3):
        for model, each in zip(models, (native, plain), strict=True):
            set_gradients(model, seed, scale=1e-3 if seed == 3 else 1.0)
            each.step()
        assert native.grad_norm.item() == pytest.approx(plain.grad_norm.item(), rel=1e-5)
    for a, b in zip(native.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(native.master_of(a), plain.master_of(b), rtol=1e-6, atol=1e-7)
        assert torch.equal(a, native.master_of(a).bfloat16())
        for kind, moment in plain.moments(b).items():
            assert (native.moments(a)[kind] - moment).norm() <= 1e-5 * moment.norm()


def test_the_loss_scale_is_divided_out_and_halved_at_an_overflow():
    plain, scaled = small_model(), small_model()
    plain_optimizer, optimizer = build(plain), build(scaled, scale_loss=True)
    set_gradients(plain, seed=1)
    set_gradients(scaled, seed=1, scale=optimizer.loss_scale.item())
    plain_optimizer.step()
    optimizer.step()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    before = optimizer.loss_scale.item()
    assert optimizer.counters()["good_steps"] == 1
    scaled.head.weight.grad.fill_(float("inf"))
    optimizer.step()
    assert optimizer.loss_scale.item() == before / 2
    assert optimizer.counters()["good_steps"] == 0  # counted anew


def test_the_loss_scale_grows_again_only_after_as_many_good_steps(monkeypatch):
    monkeypatch.setattr(optim, "LOSS_SCALE_GROWTH_STEPS", 3)
    model = small_model()
    optimizer, scales = build(model, scale_loss=True), []
    first = optimizer.loss_scale.item()
    for seed in range(8):
        set_gradients(model, seed)
        optimizer.step()
        scales.append(optimizer.loss_scale.item() / first)
    assert scales == [1, 1, 2, 2, 2, 4, 4, 4]


def test_the_loss_scale_is_never_below_1():
    model = small_model()
    optimizer = build(model, scale_loss=True)
    set_gradients(model, seed=1)
    model.head.weight.grad.fill_(float("inf"))
    for _ in range(optim.LOSS_SCALE_POWER + 3):
        optimizer.step()
    assert optimizer.loss_scale.item() == 1


def test_the_gradient_norm_of_a_bf16_model_is_summed_in_fp32():
    """A norm in bf16 has an error of up to 0.4 %."""
    model = small_model(torch.bfloat16)
    optimizer = build(model)
    for seed in range(3):
        set_gradients(model, seed)
        exact = sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None).sqrt()
        optimizer.step()
        assert optimizer.grad_norm.dtype == torch.float32
        assert optimizer.grad_norm.item() == pytest.approx(exact.item(), rel=1e-5)


def test_counters_are_resumed():
    model, other = small_model(), build(small_model())
    optimizer = build(model)
    for seed in range(5):
        set_gradients(model, seed)
        if seed in (1, 3):
            model.head.weight.grad.fill_(float("nan"))
        optimizer.step()
    assert optimizer.counters() == {"adam_steps": 3, "skipped_steps": 2, "loss_scale": 1, "good_steps": 0}
    other.load_counters(optimizer.counters())
    assert other.counters() == optimizer.counters()


def test_the_loss_scale_is_resumed_only_between_runs_that_have_one():
    scaled, plain, other = (build(small_model(), scale_loss=scales) for scales in (True, False, True))
    first = scaled.loss_scale.item()
    plain.load_counters({**scaled.counters(), "loss_scale": 256.0})
    assert plain.loss_scale.item() == 1.0
    without = {name: plain.counters()[name] for name in ("adam_steps", "skipped_steps")}  # of a run that began in bf16
    scaled.load_counters(without)
    assert scaled.loss_scale.item() == first
    other.load_counters({**scaled.counters(), "loss_scale": 256.0, "good_steps": 5.0})
    assert other.counters()["loss_scale"] == 256.0
    assert other.counters()["good_steps"] == 5.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_from_masters_moments_and_counters_is_bitwise_equal(dtype):
    uninterrupted = small_model(dtype)
    optimizer = build(uninterrupted)
    for seed in (1, 2):
        set_gradients(uninterrupted, seed)
        optimizer.step()
    resumed = small_model(dtype)
    resumed.load_state_dict(uninterrupted.state_dict())
    other = build(resumed)
    with torch.no_grad():
        for old, new in zip(optimizer.parameters, other.parameters, strict=True):
            other.master_of(new).copy_(optimizer.master_of(old))
            for kind in ("exp_avg", "exp_avg_sq"):
                other.moments(new)[kind].copy_(optimizer.moments(old)[kind])
    other.load_counters(optimizer.counters())
    for model, each in ((uninterrupted, optimizer), (resumed, other)):
        set_gradients(model, seed=3)
        each.step()
    for a, b in zip(uninterrupted.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("before", "has_scale"), [("fp16", True), ("bf16", False), ("fp32", False)])
def test_the_loss_scale_of_a_state_is_taken_from_a_run_that_scaled(monkeypatch, before, has_scale):
    """All states have counters of it: 1 in a run that doesn't scale, which would lose small gradients in fp16."""
    loaded = []
    monkeypatch.setattr(callbacks, "load_full_state", lambda *arguments: loaded.append(arguments[-1]))
    counters = {"adam_steps": 3.0, "skipped_steps": 1.0, "loss_scale": 1.0, "good_steps": 2.0}
    state = SimpleNamespace(settings={"precision": before}, counters=counters)
    callbacks.RestoreState(state, None).on_train_start(None, None)
    scale = {"loss_scale": 1.0, "good_steps": 2.0} if has_scale else {}
    assert loaded == [{"adam_steps": 3.0, "skipped_steps": 1.0, **scale}]

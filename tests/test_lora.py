"""Adapters in a model: formulas, gradients in float64, packed rows, names."""

import copy
import dataclasses

import pytest
import torch

from src.adapt.adapter import adapter_tensors, add_adapter, portable
from src.adapt.config import AdapterConfig
from src.config import ModelConfig
from src.ops.loss import cross_entropy_l2wrap
from tests.random_model import random_model

SIZES = ModelConfig(n_layer=2, n_embd=32, vocab_size=40, head_size=16, dim_ffn=48, kernel="reference")
KINDS = ("lora", "pissa", "dora", "miss", "state")


def base(**changed):
    sizes = dataclasses.asdict(dataclasses.replace(SIZES, d_decay_lora=0, d_aaa_lora=0, d_mv_lora=0, d_gate_lora=0))
    return random_model(**{**sizes, **changed}).train()


def adapted(kind, model=None, r=5, **changed):
    model = model or base()
    torch.manual_seed(2)
    config = AdapterConfig(kind, r=r, lora_alpha=7.0, **changed)
    add_adapter(model, config)
    return model, config


def shake(model, scale=0.1):
    """Numbers other than the start's, where half of the gradients are zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape)


def tokens(count=1, length=9, seed=4):
    return torch.randint(40, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_model_begins_as_its_base(kind):
    expected = base()(tokens())[0]
    model, _ = adapted(kind)
    torch.testing.assert_close(model(tokens())[0], expected, rtol=1e-5, atol=1e-5)
    assert all(p.dtype == torch.float32 for p in adapter_tensors(model).values())


def merged_weight(kind, config, weight, t):
    """W of the formulas in the documentation of AdapterConfig, written out."""
    if kind in ("lora", "dora"):
        changed = weight + config.scale * t["lora_B"] @ t["lora_A"]
        return changed * (t["lora_magnitude"] / changed.norm(dim=1))[:, None] if kind == "dora" else changed
    if kind == "pissa":
        return weight - t["lora_B_init"] @ t["lora_A_init"] + t["lora_B"] @ t["lora_A"]
    changed = weight.clone()
    for column in range(weight.shape[1]):  # MiSS: W[:, j r + c] += D[c, :]
        changed[:, column] += t["miss_block"][column % config.r]
    return changed


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_outputs_are_those_of_the_changed_matrices(kind):
    model, config = adapted(kind, target_modules=("key", "att.output"))  # 5 doesn't divide 32 and 48
    shake(model)
    plain = base()
    tensors = adapter_tensors(model)
    prefixes = {name.rpartition(".")[0] for name in tensors}
    assert prefixes == {f"blocks.{i}.{m}" for i in (0, 1) for m in ("att.key", "att.output", "ffn.key")}
    for prefix in prefixes:
        own = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
        module = plain.get_submodule(prefix)
        module.weight.data = merged_weight(kind, config, module.weight.detach(), own)
    difference = (model(tokens())[0] - plain(tokens())[0]).abs().max()
    moved = (model(tokens())[0] - base()(tokens())[0]).abs().max()
    assert difference < 1e-4 < 1e-2 < moved


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_finite_differences(kind):
    model, _ = adapted(kind, base(n_layer=2, n_embd=16, dim_ffn=16).double(), r=3)
    model.double()
    shake(model)
    ids = tokens(2, 5)

    def loss():
        return cross_entropy_l2wrap(model(ids[:, :-1])[0], ids[:, 1:])

    loss().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)
    # L2Wrap is a gradient without a loss: the differences are of the cross entropy alone
    for p in trained.values():
        p.grad = None
    torch.nn.functional.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten()).backward()
    generator = torch.Generator().manual_seed(0)
    for name, p in trained.items():
        direction = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                p += sign * 1e-6 * direction
                logits = model(ids[:, :-1])[0]
                values.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
                p -= sign * 1e-6 * direction
        expected = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close((p.grad * direction).sum(), expected, rtol=1e-5, atol=1e-9, msg=name)


def test_every_document_of_a_packed_row_starts_from_the_tuned_state():
    model, _ = adapted("state", base(kernel="auto"))
    shake(model, 0.5)
    documents = [tokens(1, n, seed=n) for n in (7, 1, 12)]
    bounds = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    packed, state = model(torch.cat(documents, 1), cu_seqlens=bounds)
    packed.square().sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    alone = []
    for document in documents:
        alone.append(model(document)[0])
        alone[-1].square().sum().backward()
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, together[name], rtol=1e-3, atol=1e-3)
    # negative control: without it, the outputs are others, and a state that is given is used in its place
    assert (base(kernel="auto")(documents[0])[0] - alone[0]).abs().max() > 1e-2
    assert (model(documents[2], state.select(torch.tensor([0])))[0] - alone[2]).abs().max() > 1e-2


def test_names_are_those_of_the_file_formats_and_the_base_is_untouched():
    before = {name: t.clone() for name, t in base().state_dict().items()}
    model, _ = adapted("lora", train=("ln", "vectors"))
    assert {name: t for name, t in model.state_dict().items() if name in before}.keys() == before.keys()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items() if name in before)
    tensors = adapter_tensors(model)
    assert tensors["blocks.1.ffn.value.lora_A"].shape == (5, 48)
    assert tensors["blocks.1.ffn.value.lora_B"].shape == (32, 5)
    assert {"ln_out.bias", "blocks.0.ln0.weight", "blocks.1.att.w0", "blocks.0.ffn.x_k"} <= tensors.keys()
    assert not {"blocks.0.att.v0", "blocks.0.att.w1", "emb.weight", "head.weight"} & tensors.keys()
    state, _ = adapted("state")
    assert list(adapter_tensors(state)) == [f"blocks.{i}.att.time_state" for i in (0, 1)]
    assert "blocks.0.att.time_state" not in base().state_dict()


def test_tensors_return_into_another_model():
    model, _ = adapted("dora")
    shake(model)
    other, _ = adapted("dora")
    other.load_state_dict(adapter_tensors(model), strict=False)
    assert torch.equal(other(tokens())[0], model(tokens())[0])


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_all_that_an_adapter_needs_beside_its_base(kind):
    model, config = adapted(kind)
    shake(model)
    torch.use_deterministic_algorithms(True)  # memory without contents is filled with NaN
    try:
        other = base()
        add_adapter(other, config, draw=False)
    finally:
        torch.use_deterministic_algorithms(False)
    other.load_state_dict(adapter_tensors(model), strict=False)
    assert torch.equal(other(tokens())[0], model(tokens())[0])


def test_pissa_is_the_largest_singular_vectors_and_leaves_as_lora_of_twice_the_rank():
    model, config = adapted("pissa")
    weight = base().blocks[1].att.key.weight
    start = model.blocks[1].att.key
    u, s, vt = torch.linalg.svd(weight)
    torch.testing.assert_close(start.lora_B @ start.lora_A, u[:, :5] * s[:5] @ vt[:5], rtol=1e-4, atol=1e-5)
    shake(model)
    as_lora, tensors = portable(config, adapter_tensors(model))
    assert (as_lora.kind, as_lora.r, as_lora.scale) == ("lora", 10, 1.0)
    other = base()
    add_adapter(other, as_lora)
    other.load_state_dict(tensors, strict=False)
    torch.testing.assert_close(other(tokens())[0], model(tokens())[0], rtol=1e-4, atol=1e-4)


def test_dropout_is_drawn_again_in_the_recomputation():
    gradients = []
    for grad_cp in (False, True):
        model, _ = adapted("lora", base(grad_cp=grad_cp, kernel="auto"), lora_dropout=0.3)
        shake(model)
        torch.manual_seed(9)
        model(tokens(2, 20))[0].square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)
    model.eval()
    torch.manual_seed(10)
    assert torch.equal(model(tokens())[0], model(tokens())[0])


def test_a_copy_of_an_adapted_model_is_adapted():
    model, _ = adapted("lora")
    shake(model)
    assert torch.equal(copy.deepcopy(model)(tokens())[0], model(tokens())[0])


def test_bfloat16_bases_keep_adapters_in_fp32():
    model, _ = adapted("lora", base(kernel="auto").bfloat16())
    shake(model)
    logits = model(tokens())[0]
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert model.blocks[0].att.key.lora_A.grad.dtype == torch.float32

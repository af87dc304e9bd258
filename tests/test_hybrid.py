"""A model some of whose blocks are attention (ModelConfig.blocks); that it learns is in test_readme.py."""

import pytest
import torch

from src.errors import UserError
from src.model import RWKV7, ModelConfig, State
from src.model.weights import fit_weights
from tests.test_model import perturbed_model, tokens_of

KINDS = ("rwkv", "attention", "rwkv")
SIZES = {"n_layer": 3, "n_embd": 64, "vocab_size": 50, "head_size": 32}
CONFIG = ModelConfig(**SIZES, blocks=KINDS)


@pytest.fixture(scope="module")
def model():
    return perturbed_model(CONFIG)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[11, 8], [1] * 19, [5, 1, 13]], ids=len)
def test_any_split_with_carried_state_equals_the_whole(model, cuts):
    tokens = tokens_of(2, 19)
    whole, _ = model(tokens)
    state, parts = None, []
    for part in tokens.split(cuts, 1):
        logits, state = model(part, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)
    assert state.layers[1].wkv.shape == (2, 2, 19, 64)


@torch.no_grad()
def test_attention_sees_every_earlier_token_and_none_later(model):
    x = torch.randn(1, 9, 64)
    changed = x.clone()
    changed[0, 3] += 1
    before, after = (model.blocks[1].att(value)[0][0] for value in (x, changed))
    torch.testing.assert_close(before[:3], after[:3])
    assert ((before[3:] - after[3:]).abs().amax(1) > 1e-4).all()


def test_attention_is_softmax_of_products(model):
    x = torch.randn(1, 7, 64)
    att = model.blocks[1].att
    q, k, v = (linear(x)[0].view(7, 2, 32) for linear in (att.query, att.key, att.value))
    future = torch.ones(7, 7).triu(1).bool()
    shares = (torch.einsum("thn,shn->hts", q, k) / 32**0.5).masked_fill(future, -torch.inf).softmax(-1)
    expected = torch.einsum("hts,shn->thn", shares, v).flatten(1) @ att.output.weight.T
    torch.testing.assert_close(att(x)[0][0], expected, atol=1e-5, rtol=1e-4)


def test_gradients_reach_every_trained_parameter_also_recomputed():
    gradients = []
    for grad_cp in (False, True):
        model = perturbed_model(ModelConfig(**SIZES, blocks=KINDS, grad_cp=grad_cp))
        model(tokens_of(2, 9))[0].square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


def test_state_dict_is_that_of_a_model_but_for_the_projections_of_attention(model):
    names = set(RWKV7(ModelConfig(**SIZES)).state_dict())
    attention = {name for name in names if name.startswith("blocks.1.att.")}
    projections = {f"blocks.1.att.{name}.weight" for name in ("query", "key", "value", "output")}
    assert set(model.state_dict()) == names - attention | projections
    copy = RWKV7(CONFIG)
    copy.load_state_dict(model.state_dict())
    tokens = tokens_of(1, 5)
    assert torch.equal(copy(tokens)[0], model(tokens)[0])


def test_rwkv_blocks_alone_are_the_default():
    assert RWKV7(ModelConfig(**SIZES, blocks=("rwkv",) * 3)).state_dict().keys() == (
        RWKV7(ModelConfig(**SIZES)).state_dict().keys()
    )


@pytest.mark.parametrize(("blocks", "expected"), [
    (("rwkv",), "each of n_layer = 3"), (("rwkv", "conv", "rwkv"), "rwkv and attention"),
    (("attention", "rwkv", "rwkv"), "first"),
])  # fmt: skip
def test_lists_that_no_model_can_have_are_refused(blocks, expected):
    with pytest.raises(UserError, match=expected):
        ModelConfig(**SIZES, blocks=blocks)


def test_what_serves_and_trains_models_says_that_it_does_not_take_a_hybrid(model, tmp_path):
    path = tmp_path / "hybrid.pth"
    torch.save(model.state_dict(), path)
    with pytest.raises(UserError, match=r"hybrid.*load_state_dict"):  # chat, evaluate, generate, serve, export
        RWKV7.from_checkpoint(path)
    with pytest.raises(UserError, match="hybrid"):  # train.py --load_model
        fit_weights(model.state_dict(), RWKV7(ModelConfig(**SIZES)), "hybrid.pth")
    states = lambda: State.zeros(CONFIG, 1), lambda: model.initial_state(1), lambda: model.set_initial_states({})
    for take in states:
        with pytest.raises(UserError, match="constant size"):
            take()
    with pytest.raises(ValueError, match="cu_seqlens"):
        model(tokens_of(1, 4), cu_seqlens=torch.tensor([0, 2, 4], dtype=torch.int32))

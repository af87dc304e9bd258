"""The model: whole sequences, continued ones, single tokens and packed documents agree; names; learning."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from src.model import RWKV7, ChannelMix, ModelConfig, State, TimeMix
from src.model.layers import last_tokens
from src.ops.loss import cross_entropy_l2wrap

CONFIG = ModelConfig(n_layer=2, n_embd=64, vocab_size=50, head_size=32)


@pytest.fixture
def model():
    return perturbed_model(CONFIG)


def perturbed_model(config, seed=0):
    """A model with noise on every parameter: many initial values are zero and would hide mistakes."""
    torch.manual_seed(seed)
    model = RWKV7(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens_of(*shape, vocab=50):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_whole_sequence_equals_token_by_token(model):
    tokens = tokens_of(2, 19)
    whole, end = model(tokens)
    state, steps = None, []
    for t in range(19):
        logits, state = model(tokens[:, t : t + 1], state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=2e-5, rtol=1e-4)
    for a, b in zip(state.layers, end.layers, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 7, 16, 32])
def test_any_split_with_carried_state_equals_the_whole(model, cut):
    tokens = tokens_of(2, 33)
    whole, _ = model(tokens)
    first, state = model(tokens[:, :cut])
    second, _ = model(tokens[:, cut:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_zero_state_is_no_state(model):
    tokens = tokens_of(3, 5)
    torch.testing.assert_close(model(tokens, State.zeros(CONFIG, 3))[0], model(tokens)[0])


@torch.no_grad()
def test_packed_documents_equal_each_alone(model):
    lengths = [5, 1, 17, 8]
    documents = [tokens_of(1, n) for n in lengths]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    packed, state = model(torch.cat(documents, 1), cu_seqlens=bounds)
    alone = [model(document) for document in documents]
    torch.testing.assert_close(packed, torch.cat([logits for logits, _ in alone], 1), atol=2e-5, rtol=1e-4)
    for d, (_, single) in enumerate(alone):
        torch.testing.assert_close(state.layers[1].wkv[d], single.layers[1].wkv[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(state.layers[1].ffn_shift[d], single.layers[1].ffn_shift[0], atol=2e-5, rtol=1e-4)
    continued, _ = model(torch.cat(documents, 1), state, cu_seqlens=bounds)
    expected = torch.cat([model(doc, single)[0] for doc, (_, single) in zip(documents, alone, strict=True)], 1)
    torch.testing.assert_close(continued, expected, atol=2e-5, rtol=1e-4)


def test_packed_gradients_equal_the_sum_of_each_alone(model):
    documents = [tokens_of(1, n) for n in (6, 11)]
    bounds = torch.tensor([0, 6, 17], dtype=torch.int32)
    model(torch.cat(documents, 1), cu_seqlens=bounds)[0].square().sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for document in documents:
        model(document)[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(packed[name], parameter.grad, atol=1e-3, rtol=1e-3, msg=name)


def test_a_state_keeps_no_activations_alive(model):
    """A view of x's last token would hold all of x as long as the state: gigabytes of a long prompt."""
    for tokens, cu_seqlens in ((torch.arange(36).view(2, 18), None), (torch.arange(36)[None], [0, 5, 5, 36])):
        bounds = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
        with torch.no_grad():
            _, state = model(tokens, cu_seqlens=bounds)
        for layer in state.layers:
            for tensor in layer:
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("bounds", [[0, 0, 3, 7], [0, 3, 3, 7], [0, 3, 7, 7], [0, 0, 0, 7], [0, 0, 0, 0]])
@pytest.mark.parametrize("carried", [False, True])
def test_a_document_without_tokens_keeps_its_token_shift(bounds, carried):
    """Not the last token of the document before it; the others have their own last tokens."""
    x = torch.randn(1, bounds[-1], 8) if bounds[-1] else torch.randn(1, 0, 8)
    shift = torch.randn(3, 8) if carried else None
    if not bounds[-1]:
        x = torch.randn(1, 1, 8)  # a row has a token, here of no document
    last = last_tokens(x, shift, torch.tensor(bounds, dtype=torch.int32))
    for document, (begin, end) in enumerate(pairwise(bounds)):
        before = torch.zeros(8) if shift is None else shift[document]
        assert torch.equal(last[document], x[0, end - 1] if end > begin else before)


def test_an_empty_document_changes_no_other_and_keeps_its_state(model):
    tokens = torch.arange(20)[None]
    bounds = torch.tensor([0, 0, 8, 8, 20, 20], dtype=torch.int32)
    state = State.zeros(model.config, 5)
    for layer in state.layers:
        for tensor in layer:
            tensor.normal_()
    logits, after = model(tokens, state.clone(), bounds)
    for document, (begin, end) in enumerate(pairwise(bounds.tolist())):
        alone = state.select(torch.tensor([document]))
        if begin < end:
            expected, alone = model(tokens[:, begin:end], alone)
            torch.testing.assert_close(logits[:, begin:end], expected, rtol=1e-4, atol=1e-5)
        for layer, own in zip(after.layers, alone.layers, strict=True):
            for tensor, wanted in zip(layer, own, strict=True):
                torch.testing.assert_close(tensor[document : document + 1], wanted, rtol=1e-4, atol=1e-5)


def test_no_token_sees_the_future(model):
    tokens = tokens_of(1, 12)
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 50
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_gradient_checkpointing_leaves_the_gradients_unchanged():
    tokens = tokens_of(2, 16)
    gradients = []
    for grad_cp in (False, True):
        model = perturbed_model(ModelConfig(n_layer=3, n_embd=64, vocab_size=50, grad_cp=grad_cp))
        model(tokens)[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-6, rtol=1e-5)


def test_gradients_reach_every_trained_parameter_and_the_state(model):
    state = State([type(layer)(*(t.requires_grad_() for t in layer)) for layer in State.zeros(CONFIG, 2).layers])
    model(tokens_of(2, 9), state)[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == parameter.requires_grad, name
    for layer in state.layers:
        assert all(t.grad.abs().sum() > 0 for t in layer)


def test_state_dict_names_and_shapes_are_frozen():
    width, vocab, rank = 64, 50, 32
    expected = {"emb.weight": (vocab, width), "head.weight": (vocab, width)}
    expected |= {f"ln_out.{part}": (width,) for part in ("weight", "bias")}
    for i in range(2):
        block = f"blocks.{i}."
        for norm in ("ln0", "ln1", "ln2") if i == 0 else ("ln1", "ln2"):
            expected |= {f"{block}{norm}.{part}": (width,) for part in ("weight", "bias")}
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a"):
            expected[f"{block}att.{name}"] = (1, 1, width)
        for name in "wavg":
            expected |= {f"{block}att.{name}1": (width, rank), f"{block}att.{name}2": (rank, width)}
        expected[f"{block}att.r_k"] = (2, 32)
        for name in ("receptance", "key", "value", "output"):
            expected[f"{block}att.{name}.weight"] = (width, width)
        expected |= {f"{block}att.ln_x.{part}": (width,) for part in ("weight", "bias")}
        expected[f"{block}ffn.x_k"] = (1, 1, width)
        expected |= {f"{block}ffn.key.weight": (4 * width, width), f"{block}ffn.value.weight": (width, 4 * width)}
    assert {name: tuple(t.shape) for name, t in RWKV7(CONFIG).state_dict().items()} == expected


@pytest.mark.parametrize("head_size", [16, 32, 64, 128])
def test_head_sizes(head_size):
    model = RWKV7(ModelConfig(n_layer=1, n_embd=128, vocab_size=11, head_size=head_size))
    logits, state = model(tokens_of(1, 4, vocab=11))
    assert logits.shape == (1, 4, 11)
    assert state.layers[0].wkv.shape == (1, 128 // head_size, head_size, head_size)


def test_explicit_low_rank_and_ffn_sizes():
    config = ModelConfig(1, 64, 11, d_decay_lora=8, d_aaa_lora=16, d_mv_lora=24, d_gate_lora=40, dim_ffn=100)
    model = RWKV7(config)
    assert [model.blocks[0].att.get_parameter(f"{n}1").shape[1] for n in "wavg"] == [8, 16, 24, 40]
    assert model.blocks[0].ffn.key.weight.shape == (100, 64)
    assert torch.isfinite(model(tokens_of(1, 3, vocab=11))[0]).all()


@pytest.mark.parametrize(
    ("sizes", "flag"),
    [
        ({"n_embd": 100}, "--n_embd"),
        ({"n_layer": 0}, "--n_layer"),
        ({"head_size": 20, "n_embd": 40}, "--head_size"),
        ({"d_gate_lora": -1}, "--d_gate_lora"),
        ({"kernel": "fast"}, "--kernel"),
    ],
)
def test_an_error_about_an_impossible_size_names_the_flag(sizes, flag):
    with pytest.raises(ValueError, match=flag):
        ModelConfig(**{"n_layer": 1, "n_embd": 64, "vocab_size": 8, **sizes})


def test_bf16_model_is_close_to_fp32(model):
    tokens = tokens_of(2, 20)
    with torch.no_grad():
        exact, low = model(tokens)[0], model.bfloat16()(tokens)[0]
    assert low.dtype == torch.bfloat16
    assert torch.isfinite(low).all()
    assert (low - exact).norm() / exact.norm() < 0.05


def test_overfits_a_tiny_text():
    torch.manual_seed(0)
    text = torch.tensor([list(b"the quick brown fox jumps over the lazy dog; " * 2)])
    model = RWKV7(ModelConfig(n_layer=2, n_embd=64, vocab_size=128, head_size=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.99))
    for _ in range(120):
        loss = cross_entropy_l2wrap(model(text[:, :-1])[0], text[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


class Classifier(nn.Module):
    """A network that isn't RWKV-7, built from the two halves of a block."""

    def __init__(self):
        super().__init__()
        config = ModelConfig(n_layer=1, n_embd=64, vocab_size=20, head_size=32)
        self.embedding = nn.Embedding(20, 64)
        self.norms = nn.ModuleList([nn.LayerNorm(64), nn.LayerNorm(64)])
        self.time, self.channel, self.output = TimeMix(config), ChannelMix(config), nn.Linear(64, 2)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.time(self.norms[0](x))[0]
        x = x + self.channel(self.norms[1](x))[0]
        return self.output(x[:, -1])


def test_time_and_channel_mix_build_another_network_that_learns():
    """The label is whether a 7 occurs anywhere in the sequence: only the recurrent state can carry that to the end."""
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        tokens = torch.randint(20, (count, 14), generator=generator)
        return tokens, (tokens == 7).any(1).long()

    torch.manual_seed(0)
    network = Classifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for _ in range(100):
        tokens, answers = draw(64)
        loss = nn.functional.cross_entropy(network(tokens), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens, answers = draw(512)
    with torch.no_grad():
        accuracy = (network(tokens).argmax(-1) == answers).float().mean()
    assert accuracy > 0.9

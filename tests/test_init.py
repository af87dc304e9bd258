"""The init table: one row per parameter, with the values of the published recipe."""

import math

import pytest
import torch

from src.model import RWKV7, ModelConfig, TimeMix
from src.model.init import TABLE, row_of

SMALL = ModelConfig(n_layer=3, n_embd=128, vocab_size=300)


@pytest.mark.parametrize(
    ("n_layer", "n_embd", "vocab_size", "parameters"), [(8, 512, 6400, 34_158_592), (12, 768, 65536, 191_084_544)]
)
def test_published_parameter_counts(n_layer, n_embd, vocab_size, parameters):
    with torch.device("meta"):
        model = RWKV7(ModelConfig(n_layer=n_layer, n_embd=n_embd, vocab_size=vocab_size))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("n_embd", "head_size", "sizes"),
    [
        (512, 64, (64, 64, 32, 128)),  # 2.5 sqrt(512)/32 = 1.77 -> 2; 1.7 -> 1.2 -> 1; 5 -> 3.5 -> 4
        (768, 64, (64, 64, 32, 128)),
        (1024, 64, (64, 64, 64, 160)),  # exactly 2.5 rounds to 2
        (2048, 64, (128, 128, 64, 224)),
        (1024, 128, (160, 160, 96, 160)),  # wider heads: decay, a and v double before rounding
        (64, 32, (32, 32, 32, 32)),
    ],
)
def test_low_rank_sizes(n_embd, head_size, sizes):
    config = ModelConfig(n_layer=1, n_embd=n_embd, vocab_size=8, head_size=head_size)
    assert (config.d_decay_lora, config.d_aaa_lora, config.d_mv_lora, config.d_gate_lora) == sizes


def test_each_parameter_matches_exactly_one_row_and_each_row_is_used():
    names = [name for name, _ in RWKV7(SMALL).named_parameters()]
    used = {row_of(name).pattern for name in names}  # row_of asserts that there is exactly one
    assert used == {row.pattern for row in TABLE}


def test_decay_and_lr_scale_follow_the_rule_of_the_optimizer():
    for name, parameter in RWKV7(SMALL).named_parameters():
        row = row_of(name)
        matrix = name.endswith(".weight") and sum(size > 1 for size in parameter.shape) >= 2
        assert row.decay == matrix, name
        assert row.lr_scale == (2.0 if name.endswith("att.w0") else 1.0), name


@pytest.mark.parametrize("layer", [0, 2])
def test_values_channel_by_channel(layer):
    model = RWKV7(SMALL)
    att, ffn = model.blocks[layer].att, model.blocks[layer].ffn
    count, width, heads = SMALL.n_layer, SMALL.n_embd, 64
    p, q = layer / (count - 1), 1 - layer / count
    for c in (0, 1, 63, 64, 100, width - 1):
        d, lin = c / width, c / (width - 1) - 0.5
        z = (c % heads - (heads - 1) / 2) / ((heads - 1) / 2)
        zz = z * abs(z)
        expected = {
            "x_r": 1 - d ** (0.2 * q),
            "x_g": 1 - d ** (0.2 * q),
            "x_w": 1 - d ** (0.9 * q),
            "x_a": 1 - d ** (0.9 * q),
            "x_k": 1 - d ** (0.7 * q),
            "x_v": 1 - d ** (0.7 * q),
            "w0": -6 + 6 * (c / (width - 1)) ** (1 + p**0.3) + 0.5 + 2.5 * zz,
            "a0": -0.19 + 0.3 * zz + 0.4 * lin,
            "v0": 0.73 - 0.4 * lin,
            "k_k": 0.71 - 0.1 * lin,
            "k_a": 1.02,
        }
        for name, value in expected.items():
            assert getattr(att, name)[0, 0, c].item() == pytest.approx(value, abs=1e-6), (name, c)
        assert ffn.x_k[0, 0, c].item() == pytest.approx(1 - d ** (q**4), abs=1e-6)
    assert torch.all(att.r_k == -0.04)
    assert att.ln_x.weight[5].item() == pytest.approx(((1 + layer) / count) ** 0.7)
    for zero in (att.w1, att.a1, att.v1, att.g1, att.output.weight, ffn.value.weight, att.ln_x.bias):
        assert torch.count_nonzero(zero) == 0


def _assert_orthogonal(matrix, gain):
    rows, columns = matrix.shape
    tall = matrix.double() if rows >= columns else matrix.double().T
    torch.testing.assert_close(tall.T @ tall, gain**2 * torch.eye(min(rows, columns)).double(), atol=1e-5, rtol=1e-4)


def test_orthogonal_matrices_and_their_gains():
    model = RWKV7(SMALL)
    att, ffn = model.blocks[1].att, model.blocks[1].ffn
    for matrix, gain in [
        (att.receptance.weight, 1.0),
        (att.value.weight, 1.0),
        (att.key.weight, 0.1),
        (ffn.key.weight, 1.0),
        (att.w2, 0.1),
        (att.g2, 0.1),
        (model.head.weight, 0.5 * math.sqrt(300 / 128)),
    ]:
        _assert_orthogonal(matrix.detach(), gain)
    narrow = RWKV7(ModelConfig(n_layer=1, n_embd=128, vocab_size=100))
    _assert_orthogonal(narrow.head.weight.detach(), 0.5)
    tall = TimeMix(ModelConfig(n_layer=1, n_embd=64, vocab_size=8, d_gate_lora=256), 0)
    _assert_orthogonal(tall.g2.detach(), 0.1 * 2)  # sqrt(256 / 64)


def test_embedding_is_uniform_with_a_tiny_range():
    emb = RWKV7(SMALL).emb.weight.detach()
    assert emb.abs().max() <= 1e-4
    assert emb.std().item() == pytest.approx(1e-4 / math.sqrt(3), rel=0.05)


def test_a_model_of_one_layer_has_finite_values():
    model = RWKV7(ModelConfig(n_layer=1, n_embd=64, vocab_size=16))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_layer_0_value_residual_is_kept_but_never_trained():
    model = RWKV7(SMALL)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}
    assert frozen <= model.state_dict().keys()


def test_a_seed_draws_the_values_that_it_drew_before():
    """The initial values depend on every draw before them, those of PyTorch's overwritten defaults included."""
    torch.manual_seed(3)
    model = RWKV7(ModelConfig(1, 64, 100))
    assert model.emb.weight[0, :3].tolist() == pytest.approx([2.112224e-05, 6.998387e-05, -3.774430e-05], rel=1e-5)

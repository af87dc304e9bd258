"""The quantised base: published levels, exact dequantisation, products and their gradient, nothing kept."""

import bitsandbytes
import pytest
import torch
from random_model import random_model

from src.adapt import quantize
from src.adapt.quantize import NF4_BLOCK, NF4_LEVELS, QuantizedLinear, quantize_base, quantize_nf4

# Dettmers et al., QLoRA, 2023, appendix E.
PUBLISHED = (
    *(-1, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0),
    *(0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1),
)


def matrix(out=48, width=160, seed=0):
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def test_the_levels_are_the_published_ones():
    assert pytest.approx(PUBLISHED, abs=5e-9) == NF4_LEVELS
    assert torch.equal(torch.tensor(NF4_LEVELS), bitsandbytes.functional.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("shape", [(48, 160), (5, 7), (1, 64), (3, 43)])
def test_nf4_takes_the_nearest_level_of_each_block(shape):
    weight = matrix(*shape)
    actual = QuantizedLinear(weight, "nf4").weight
    levels = torch.tensor(PUBLISHED)
    for start in range(0, weight.numel(), NF4_BLOCK):
        block = weight.flatten()[start : start + NF4_BLOCK]
        choices = levels * block.abs().max()
        nearest = choices[(block.unsqueeze(1) - choices).abs().argmin(1)]
        torch.testing.assert_close(actual.flatten()[start : start + NF4_BLOCK], nearest, rtol=1e-6, atol=1e-7)


def test_codes_and_numbers_are_those_of_bitsandbytes():
    # its CPU kernel is wrong where a block of 64 crosses the end of a row (0.50.2), so 192 columns
    weight = matrix(48, 192)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
    codes, absmax = quantize_nf4(weight)
    assert torch.equal(codes, packed.flatten())
    assert torch.equal(absmax, state.absmax)
    expected = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert torch.equal(QuantizedLinear(weight, "nf4").weight, expected)
    # what a GPU takes where the package is installed, here by its implementation for CPUs
    assert torch.equal(quantize._dequantize_by(bitsandbytes.functional, codes, absmax, (48, 192)), expected)


def test_int8_rounds_by_rows():
    weight = matrix()
    weight[3] = 0
    module = QuantizedLinear(weight, "int8")
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((module.weight - weight).abs() <= 0.5 * step * (1 + 1e-5)).all())
    assert module.codes.dtype == torch.int8
    assert set(module.codes.abs().amax(1).tolist()) == {0, 127}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_the_dequantised_matrix(kind, dtype):
    module = QuantizedLinear(matrix(), kind).to(dtype)  # as a bf16 model is made: codes and scales stay
    x = matrix(6, 160, seed=1).to(dtype).view(2, 3, 160).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(x)
    assert kept == [], "nothing is kept for backward but the module's codes"
    expected = torch.nn.functional.linear(twin, QuantizedLinear(matrix(), kind).weight.to(dtype))
    assert torch.equal(y, expected)
    for out in (y, expected):
        out.float().square().sum().backward()
    assert torch.equal(x.grad, twin.grad)
    assert not list(module.parameters())
    assert not module.state_dict()


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.03), ("nf4", 0.25)])
def test_a_quantised_model_is_close_to_its_base(kind, error):
    model, base = random_model(n_layer=2), random_model(n_layer=2)
    quantize_base(model, kind)
    changed = base.state_dict().keys() - model.state_dict().keys()
    assert len(changed) == 2 * 6
    assert {name.rpartition(".")[0].partition(".")[2].partition(".")[2] for name in changed} == set(quantize.TARGETS)
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        actual, expected = model(tokens)[0], base(tokens)[0]
    relative = float((actual - expected).norm() / expected.norm())
    assert 0 < relative < error

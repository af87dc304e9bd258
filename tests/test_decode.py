"""Decoding token by token: the native step, the step in plain PyTorch and the model compute the same function."""

import ctypes
import gc
from dataclasses import replace

import pytest
import torch
from random_model import random_model

from src.errors import UserError
from src.inference.decoder import Decoder
from src.inference.step import TorchStep
from src.model import State
from src.ops.build import BuildError, load_native
from src.ops.decode import MATRICES, MOST_SEQUENCES, decode_step

SIZES = {
    "plain": {},
    "one-layer": {"n_layer": 1},
    "heads-of-16": {"n_embd": 96, "head_size": 16},
    "heads-of-128": {"n_embd": 256, "head_size": 128, "n_layer": 2},
    "odd-ranks": {"d_decay_lora": 7, "d_aaa_lora": 1, "d_mv_lora": 13, "d_gate_lora": 50},
    "narrow-channel-mix": {"dim_ffn": 176},
}


def steps(model, sequences, count=4):
    """Logits of `count` steps of a Decoder, [count, B, V], and its state."""
    decoder = Decoder(model, sequences)
    generator = torch.Generator().manual_seed(sequences)
    tokens = torch.randint(0, model.config.vocab_size, (count, sequences), generator=generator)
    return torch.stack([decoder.step(row.tolist()).clone() for row in tokens]), decoder, tokens


def forward(model, tokens):
    """Logits [count, B, V] and state of the training forward; tokens [count, B]."""
    logits, state = model(tokens.t())
    return logits.transpose(0, 1), state


def assert_as_accurate_as_the_forward(logits, state, sizes, tokens):
    """The error against float64 is at most twice that of the training forward in fp32."""
    plain, plain_state = forward(random_model(**sizes), tokens)
    exact, exact_state = forward(random_model(**sizes, kernel="reference").double(), tokens)
    actual, expected, reference = (
        [x, *(t for layer in s.layers for t in layer)]
        for x, s in ((logits, state), (plain, plain_state), (exact, exact_state))
    )
    for m, p, e in zip(actual, expected, reference, strict=True):
        assert m.isfinite().all()
        # The forward's own error depends on how its sums are divided among threads, and may be small by chance: a few
        # roundings are always allowed.
        rounding = 4 * torch.finfo(torch.float32).eps * e.norm()
        assert (m - e).norm() <= 2 * max((p - e).norm(), rounding)


@pytest.mark.parametrize("sequences", [1, 2, 5, 8])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_native_step_agrees_with_the_training_forward(sizes, sequences):
    logits, decoder, tokens = steps(random_model(**sizes), sequences)
    assert decoder.native
    assert_as_accurate_as_the_forward(logits, decoder.state, sizes, tokens)


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_pytorch_step_agrees_with_the_training_forward(sizes, sequences):
    model = random_model(**sizes)
    step, state = TorchStep(model), State.zeros(model.config, sequences)
    tokens = torch.arange(4 * sequences).view(4, sequences) * 7 % 97
    logits = torch.stack([step(row, state) for row in tokens])
    assert_as_accurate_as_the_forward(logits, state, sizes, tokens)


@pytest.mark.parametrize("sequences", [MOST_SEQUENCES, MOST_SEQUENCES + 1])
def test_batch_sizes_on_either_side_of_the_native_limit(sequences):
    logits, decoder, tokens = steps(random_model(), sequences)
    assert_as_accurate_as_the_forward(logits, decoder.state, {}, tokens)


def test_in_bf16_the_arithmetic_is_fp32():
    """At most half the error of plain PyTorch in the same dtype."""
    model = random_model().bfloat16()
    logits, _, tokens = steps(model, 3, count=12)
    exact, _ = forward(random_model().bfloat16().float(), tokens)
    step, state = TorchStep(model), State.zeros(model.config, 3, dtype=torch.bfloat16)
    plain = torch.stack([step(row, state) for row in tokens])
    assert (logits - exact).norm() < 0.5 * (plain - exact).norm()


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_fp32_weights_with_bf16_values_are_packed_without_loss(sizes, sequences):
    model = random_model(**sizes).bfloat16().float()
    last = model.blocks[-1]
    last.ffn.key.weight[100, 5] += 1e-6  # a single value that bf16 can't express keeps the matrix in fp32
    far = -torch.randint(40, (1, last.ffn.value.weight.shape[1]), generator=torch.Generator().manual_seed(2))
    last.ffn.value.weight *= torch.exp2(far.float())  # columns too far apart to be packed
    last.att.output.weight[3, 7:20] *= 2.0**-20  # few: some exceptions
    model.head.weight[::9, 1] = -(2.0**-30)
    logits, decoder, tokens = steps(model, sequences)
    torch.testing.assert_close(logits, forward(model, tokens)[0], rtol=1e-5, atol=1e-5)
    dtypes_read = [t.dtype for t in decoder.native_weights.layers[-9:]]
    assert dtypes_read.count(torch.float32) == 2  # the vectors, and that matrix
    if sequences == 1:
        packs = torch.ops.rwkv7.pack(torch.ones(1, 128).bfloat16()).numel() > 0
        dtypes = dict(zip(MATRICES, dtypes_read[-len(MATRICES) :], strict=True))
        wide = model.config.n_embd % 128 == 0
        assert dtypes["att.receptance"] == dtypes["att.output"] == (torch.uint8 if packs and wide else torch.bfloat16)
        assert dtypes["ffn.value"] == torch.bfloat16
        decoder.keep([0, 0])
        decoder.step([1, 1])
        assert torch.uint8 not in [t.dtype for t in decoder.native_weights.layers]
        assert Decoder(model, pack=False).native_weights.head.dtype == torch.bfloat16
    else:
        assert dtypes_read.count(torch.bfloat16) == 7
        packed = Decoder(model).native_weights  # several sequences can be decoded from packed weights, too
        second = Decoder(model, sequences)
        other = torch.stack([decode_step(row, packed, *second._stacked) for row in tokens])
        torch.testing.assert_close(other, logits, rtol=1e-5, atol=1e-5)
    assert decoder.state.layers[0].att_shift.dtype == torch.float32


def pack(matrix):
    load_native()
    if torch.ops.rwkv7.pack(torch.ones(1, 128).bfloat16()).numel() == 0:
        pytest.skip("nothing is packed for this processor's instruction set")
    return torch.ops.rwkv7.pack(matrix)


def unpack(packed):
    """The matrix in the format that cuda/packed.h describes, decoded independently of that code."""
    rows, columns, exceptions, base = packed[:32].view(torch.int64).tolist()
    first = packed[32 : 36 + 4 * rows].view(torch.int32).tolist()
    listed = packed[36 + 4 * rows :][: 8 * exceptions].view(-1, 8).contiguous()
    start = (36 + 4 * rows + 8 * exceptions + 63) // 64 * 64
    groups = packed[start:].view(rows, columns // 128, 3, 64).int()
    codes = torch.cat([groups[:, :, 2] & 15, groups[:, :, 2] >> 4], dim=-1)
    exponents = torch.where(codes % 8 == 0, 0, base + codes % 8)
    bits = (codes // 8) << 15 | exponents << 8 | groups[:, :, :2].flatten(2)
    bits = bits.view(-1, 4, 2, 4, 2).permute(0, 2, 4, 1, 3)  # q, v / 2, d, v % 2 -> v, q, d
    matrix = bits.reshape(rows, columns).to(torch.int32).bitwise_left_shift(16).view(torch.float32).clone()
    for row in range(rows):
        for entry in listed[first[row] : first[row + 1]]:
            matrix[row, entry[:4].view(torch.int32)] = entry[4:].view(torch.float32)
    return matrix.bfloat16()


SPECIAL = [0.0, -0.0, 1.0, -1.9, 2.0**-126, -1e-39, 3e38, -3e38, 2.0**-40, 2.0**30, float("inf")]


@pytest.mark.parametrize("spread", [0.0, 0.7, 1.2])
def test_packing_keeps_every_bit(spread):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(70, 256, generator=generator) * torch.exp2(spread * torch.randn(70, 1, generator=generator))
    matrix[5, 20 : 20 + len(SPECIAL)] = torch.tensor(SPECIAL)
    matrix[69, -1] = 2.0**100
    matrix = matrix.bfloat16()
    packed = pack(matrix)
    assert 1.5 * matrix.numel() < packed.numel() < 1.65 * matrix.numel()
    assert torch.equal(unpack(packed).view(torch.int16), matrix.view(torch.int16))


def test_matrices_that_packing_would_not_shrink_are_not_packed():
    wide = torch.exp2(torch.linspace(-60, 60, 64 * 64)).view(32, 128)
    for matrix in (wide, torch.ones(8, 64), torch.ones(8, 48), torch.ones(0, 128)):
        assert pack(matrix.bfloat16()).numel() == 0
    with pytest.raises(RuntimeError, match="must be bfloat16 and contiguous"):
        pack(torch.ones(4, 128))


def test_a_packed_matrix_of_other_sizes_is_rejected():
    decoder = Decoder(random_model(n_layer=1).bfloat16().float())
    decoder.step([1])
    weights = decoder.native_weights
    for head in (pack(torch.ones(97, 256).bfloat16()), weights.head[:-1], weights.head[:8]):
        with pytest.raises(RuntimeError, match="head was packed from another matrix than one of 97 x 128"):
            decode_step(torch.tensor([1]), replace(weights, head=head), *decoder._stacked)


def test_the_number_of_threads_changes_no_bit():
    model = random_model(n_embd=256, vocab_size=1024)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, _, _ = steps(model, 2)
        torch.set_num_threads(3)
        three, _, _ = steps(model, 2)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)


def test_without_a_compiler_the_pytorch_step_is_used(monkeypatch):
    def fail(*_: object) -> None:
        raise BuildError("no compiler")

    monkeypatch.setattr("src.ops.decode.build.load_native", fail)
    model = random_model()
    decoder = Decoder(model)
    assert not decoder.native
    torch.testing.assert_close(decoder.step([3]), model(torch.tensor([[3]]))[0][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [{"dim_ffn": 100}, {"n_embd": 320, "head_size": 320}])
def test_sizes_that_the_native_step_does_not_support(sizes):
    sizes = {"n_layer": 2, **sizes}
    logits, decoder, tokens = steps(random_model(**sizes), 2)
    assert not decoder.native
    assert_as_accurate_as_the_forward(logits, decoder.state, sizes, tokens)


def test_invalid_input_raises_and_leaves_the_state_unchanged():
    decoder = Decoder(random_model(), 2)
    decoder.step([1, 2])
    before = decoder.state
    for tokens, invalid in (([1, 97], 97), ([-1, 1], -1)):
        with pytest.raises(UserError) as caught:
            decoder.step(tokens)
        assert f"token id {invalid}" in caught.value.problem
        assert "97" in caught.value.expected
        with pytest.raises(RuntimeError, match="outside the vocabulary of 97"):
            decode_step(torch.tensor(tokens), decoder.native_weights, *decoder._stacked)
    att_shift, wkv, ffn_shift = decoder._stacked
    for wrong in (
        (att_shift[:2], wkv, ffn_shift),
        (att_shift, wkv.double(), ffn_shift),
        (att_shift, wkv, ffn_shift.transpose(0, 1)),
    ):
        with pytest.raises(RuntimeError, match="decode_step"):
            decode_step(torch.tensor([1, 2]), decoder.native_weights, *wrong)
    weights = decoder.native_weights
    w, a, g, v = weights.ranks
    no_channels = replace(weights, embedding=weights.embedding[:, :0]), wkv[:, :, :0]
    no_channel_mix = replace(weights, layers=[t[:0] if t.shape[0] == 512 else t for t in weights.layers]), wkv
    negative_rank = replace(weights, ranks=(w + a + 1, -1, g, v)), wkv  # with the right sum
    for unfit, heads in (no_channels, no_channel_mix, negative_rank):
        with pytest.raises(RuntimeError, match="unfit sizes"):
            decode_step(torch.tensor([1, 2]), unfit, att_shift, heads, ffn_shift)
    for layer, layer_before in zip(decoder.state.layers, before.layers, strict=True):
        assert all(map(torch.equal, layer, layer_before))


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 to count the heap's bytes")
def test_steps_leak_no_heap_memory():
    heap = ctypes.CDLL(None).mallinfo2
    heap.restype = _MallInfo
    decoder = Decoder(random_model(n_layer=1))
    for _ in range(100):
        decoder.step([1])
    gc.collect()
    before = heap().uordblks
    for _ in range(500):
        decoder.step([1])
    gc.collect()
    assert heap().uordblks - before < 500 * 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_captured_step_agrees_with_the_pytorch_step(dtype, sequences):
    """A graph replays with the tokens of each call on its own state, and continues from a state that was assigned."""
    model = random_model().to("cuda", dtype)
    logits, decoder, tokens = steps(model, sequences, count=12)
    step, state = TorchStep(model), State.zeros(model.config, sequences, "cuda", dtype)
    with torch.inference_mode():
        plain = torch.stack([step(row, state) for row in tokens.cuda()])
    torch.testing.assert_close(logits, plain, rtol=1e-2, atol=1e-2)
    exact, _ = forward(random_model().to(dtype).float().cuda(), tokens.cuda())
    assert (logits - exact).norm() < 2 * (plain - exact).norm() + 1e-3
    state_before = decoder.state
    first = decoder.step(tokens[0].tolist()).clone()
    decoder.step(tokens[1].tolist())
    decoder.state = state_before
    assert torch.equal(decoder.step(tokens[0].tolist()), first)

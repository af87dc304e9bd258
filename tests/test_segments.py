"""Samples in pieces (--chunk_ctx): loss and gradients of one pass, whatever is trained and however it is packed."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from training_runs import CTX as RUN_CTX
from training_runs import losses, train, train_until

from src.adapt.adapter import add_adapter
from src.adapt.config import AdapterConfig
from src.config import PLACEHOLDER, RunConfig
from src.dataset.pretrain import collate_documents
from src.model import RWKV7, ModelConfig
from src.multimodal.config import MediaConfig
from src.multimodal.front_end import attach_front_end
from src.training.hardware.selection import Hardware
from src.training.objectives.head_loss import HeadLoss
from src.training.objectives.next_token import NextToken
from src.training.objectives.segments import Segments
from src.training.preflight.out_of_memory import estimate, suggest_settings
from src.training.preflight.piece_memory import TOKEN_BYTES, border_bytes, describe_pieces
from src.training.preflight.plan import GIB

VOCAB, CTX = 50, 24
# of two packed rows of CTX: documents over the borders of pieces, on them, without tokens, and of one token
BOUNDS = torch.tensor([0, 3, 3, 20, 21, 32, 48], dtype=torch.int32)


def busy_model(dtype=torch.float32, kernel="auto", adapter=None, **sizes):
    torch.manual_seed(0)
    model = RWKV7(ModelConfig(n_layer=2, n_embd=32, vocab_size=VOCAB, head_size=16, kernel=kernel, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype)
    if adapter is not None:
        add_adapter(model, adapter)
        for name, parameter in model.named_parameters():
            if name not in model.frozen_base:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def a_batch(packed):
    torch.manual_seed(1)
    shape = (1, 2 * CTX) if packed else (2, CTX)
    tokens, targets = torch.randint(VOCAB, shape), torch.randint(VOCAB, shape)
    targets[torch.rand(shape) < 0.3] = -100  # pieces have different numbers of tokens that count
    targets[0, 6:12] = -100  # and one of six has none
    return (tokens, targets, BOUNDS, torch.tensor(0.7)) if packed else (tokens, targets)


def loss_and_gradients(model, batch, chunk_ctx=0, bptt=-1, head_chunk=0):
    objective = NextToken(model.head, head_chunk, Segments(chunk_ctx, CTX, bptt))
    model.zero_grad()
    loss, metrics = objective(model, batch)
    torch.manual_seed(5)  # backward has to bring its own random numbers
    (3.0 * loss).backward()
    assert torch.equal(metrics["loss"], loss.detach())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        assert torch.equal(objective(model, batch)[0], loss) or model.blocks[0].draws_random_numbers
    return loss.detach(), gradients


def largest_error(gradients, expected):
    """Relative to the norm of each tensor."""
    assert gradients.keys() == expected.keys()
    return max(((gradients[n] - expected[n]).norm() / expected[n].norm().clamp(min=1e-12)).item() for n in expected)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("chunk_ctx", [3, 6, 12])
def test_gradients_are_those_of_one_pass(packed, chunk_ctx):
    model, batch = busy_model(torch.float64, "reference"), a_batch(packed)
    expected_loss, expected = loss_and_gradients(model, batch)
    loss, gradients = loss_and_gradients(model, batch, chunk_ctx)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
    assert largest_error(gradients, expected) < 1e-9


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("options", [{}, {"grad_cp": True}, {"head_chunk": 5}], ids=str)
def test_native_gradients_are_those_of_one_pass(packed, options):
    options = dict(options)
    head_chunk = options.pop("head_chunk", 0)
    model, batch = busy_model(**options), a_batch(packed)
    expected_loss, expected = loss_and_gradients(model, batch, head_chunk=head_chunk)
    loss, gradients = loss_and_gradients(model, batch, 6, head_chunk=head_chunk)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert largest_error(gradients, expected) < 1e-5


@pytest.mark.parametrize("kind", ["state", "lora", "pissa", "miss", "dora"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_gradients_of_adapters_and_tuned_states(packed, kind):
    adapter = AdapterConfig(kind=kind, r=4) if kind != "state" else AdapterConfig(kind="state")
    model, batch = busy_model(adapter=adapter), a_batch(packed)
    _, expected = loss_and_gradients(model, batch)
    _, gradients = loss_and_gradients(model, batch, 6)
    assert largest_error(gradients, expected) < 1e-5
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


def test_bf16_gradients_are_summed_in_fp32():
    """Over many pieces they are as close to the exact ones as those of one pass are."""
    batch = a_batch(False)
    exact = loss_and_gradients(busy_model(torch.float64, "reference"), batch)[1]

    def error(chunk_ctx):
        gradients = loss_and_gradients(busy_model(torch.bfloat16), batch, chunk_ctx)[1]
        return sum((gradients[n].double() - exact[n]).norm() / exact[n].norm() for n in exact) / len(exact)

    assert error(1) < 1.2 * error(0)


def test_dropout_drops_the_same_numbers_when_a_piece_is_computed_again(monkeypatch):
    """Compared with a computation of all pieces in one graph, which draws its numbers once."""
    adapter = AdapterConfig(kind="lora", r=4, lora_dropout=0.5)
    model, batch = busy_model(adapter=adapter), a_batch(False)
    torch.manual_seed(2)
    loss, gradients = loss_and_gradients(model, batch, 6)
    torch.manual_seed(2)
    state, parts = None, []
    for begin in range(0, CTX, 6):
        tokens, targets = (x[:, begin : begin + 6] for x in batch)
        hidden, state = model.hidden(tokens, state)
        counted = (targets >= 0).sum()
        parts.append(HeadLoss(model.head, 0)(hidden, targets) * counted)
    expected = sum(parts) / (batch[1] >= 0).sum()
    model.zero_grad()
    (3.0 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert largest_error(gradients, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}) < 1e-5


@pytest.mark.parametrize("bptt", [1, 2, 4])
def test_bptt_connects_the_last_pieces(bptt):
    model, batch = busy_model(), a_batch(False)
    _, gradients = loss_and_gradients(model, batch, 6, bptt)
    state, parts = None, []
    for i in range(4):
        hidden, state = model.hidden(batch[0][:, 6 * i : 6 * i + 6], state)
        targets = batch[1][:, 6 * i : 6 * i + 6]
        parts.append(HeadLoss(model.head, 0)(hidden, targets) * (targets >= 0).sum())
        if i + bptt < 4:  # pieces 4 - bptt .. 3 are connected
            state = state.detach()
    model.zero_grad()
    (3.0 * sum(parts) / (batch[1] >= 0).sum()).backward()
    assert largest_error(gradients, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}) < 1e-5
    whole = loss_and_gradients(model, batch)[1]
    assert (largest_error(gradients, whole) < 1e-5) == (bptt == 4)


def test_gradients_are_accumulated_once_a_parameter():
    """What DDP and ZeRO hang on this would otherwise communicate incomplete gradients."""
    model = busy_model()
    trained, times = [p for p in model.parameters() if p.requires_grad], []
    handles = [p.register_post_accumulate_grad_hook(times.append) for p in trained]
    expected = loss_and_gradients(model, a_batch(False), 6)[1]
    assert sorted(map(id, times)) == sorted(map(id, trained))
    for handle in handles:
        handle.remove()
    for name, parameter in model.named_parameters():  # gradients of an earlier micro batch stay
        parameter.grad = torch.ones_like(parameter) if name in expected else None
    objective = NextToken(model.head, 0, Segments(6, CTX))
    (3.0 * objective(model, a_batch(False))[0]).backward()
    assert all(torch.allclose(p.grad, expected[n] + 1) for n, p in model.named_parameters() if n in expected)


def test_states_at_the_borders_are_fp32_below_it(monkeypatch):
    seen = []
    hidden = RWKV7.hidden

    def recording(model, tokens, state=None, *rest):
        seen.extend(layer.wkv.dtype for layer in state.layers)
        return hidden(model, tokens, state, *rest)

    monkeypatch.setattr(RWKV7, "hidden", recording)
    loss_and_gradients(busy_model(torch.bfloat16), a_batch(False), 6)
    assert set(seen) == {torch.float32}
    assert len(seen) == 2 * (3 + 4 + 4)  # layers, and pieces: in both passes and without a gradient


STEPS = 50
RUN = {"my_exit_tokens": RUN_CTX * 4 * STEPS, "epoch_steps": 25, "grad_clip": 0.5}


def test_a_run_in_pieces_has_the_losses_of_one_pass_and_is_continued_exactly(tmp_path, data, monkeypatch):
    whole, pieces, killed = tmp_path / "whole", tmp_path / "pieces", tmp_path / "killed"
    assert train(whole, data, **RUN) == 0
    assert train(pieces, data, **RUN, chunk_ctx=4, val_data_file=data, val_every="25steps", val_windows=8) == 0
    assert losses(pieces) == pytest.approx(losses(whole), abs=1e-5)
    assert losses(whole)[-1] < losses(whole)[0] - 0.5
    train_until(30, killed, data, monkeypatch, **RUN, chunk_ctx=4)
    assert train(killed, data, **RUN, chunk_ctx=4) == 0
    assert losses(killed) == losses(pieces)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_compiled_blocks_in_pieces(packed):
    torch._dynamo.reset()
    model, batch = busy_model(), a_batch(packed)
    expected = loss_and_gradients(model, batch)[1]
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_blocks(backend=counter, fullgraph=True)
    gradients = loss_and_gradients(model, batch, 6)[1]
    graphs = counter.frame_count
    assert graphs >= 2
    loss_and_gradients(model, batch, 6)
    assert counter.frame_count == graphs
    assert largest_error(gradients, expected) < 2e-5
    torch._dynamo.reset()


# ---- --document_states: documents inside a window --------------------------------------------------------------------


def test_documents_of_windows_are_apart():
    """The loss of two windows is that of their documents, each computed alone."""
    ids = torch.tensor([[3, 5, 0, 7, 7, 0, 0, 9, 4], [1, 2, 3, 4, 5, 6, 7, 8, 0]])
    batch = collate_documents([(row[:-1], row[1:]) for row in ids])
    assert batch[2].tolist() == [0, 3, 6, 7, 8, 16]
    model = busy_model()
    loss = NextToken(model.head, 0, Segments(2, 8))(model, batch)[0]
    total = 0.0
    for row, begin, end in ((0, 0, 3), (0, 3, 6), (0, 6, 7), (0, 7, 8), (1, 0, 8)):
        hidden, _ = model.hidden(ids[row : row + 1, begin:end])
        total += HeadLoss(model.head, 0)(hidden, ids[row : row + 1, begin + 1 : end + 1]).item() * (end - begin)
    assert loss.item() == pytest.approx(total / 16, rel=1e-6)


def test_a_run_with_document_states_reads_and_measures_documents(tmp_path, data):
    apart, joined = tmp_path / "apart", tmp_path / "joined"
    short = {**RUN, "my_exit_tokens": RUN_CTX * 4 * 6, "val_data_file": data, "val_every": "3steps", "val_windows": 8}
    assert train(apart, data, **short, document_states=1, chunk_ctx=8) == 0
    assert train(joined, data, **short) == 0
    assert losses(apart)[1:] != losses(joined)[1:]


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_what_is_kept_at_a_border_is_as_planned():
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = busy_model(dtype)
        state = model.hidden(torch.zeros(3, 5, dtype=torch.long))[1]
        kept = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors())
        assert kept == 3 * border_bytes(model.config, size)


@pytest.mark.slow
def test_the_peak_memory_of_a_step_grows_by_what_is_kept_at_the_borders():
    """Of the process, from 4 pieces to 96; a second piece's gradients or a fragmented heap would be tens of MB."""
    bench = Path(__file__).parent / "bench/long_context.py"
    piece, few, many = 256, 4, 96
    peaks = [
        int(subprocess.run([sys.executable, bench, "peak", str(n * piece), str(piece)], stdout=subprocess.PIPE).stdout)
        for n in (few, many)
    ]
    grown = (many - few) * (border_bytes(ModelConfig(4, 256, 6400), 4) + TOKEN_BYTES * piece)
    assert peaks[1] - peaks[0] < 1.1 * grown + (4 << 20)


def test_pieces_are_proposed_where_nothing_else_fits():
    model = ModelConfig(12, 768, 6400)
    config = RunConfig(ctx_len=1 << 17, micro_bsz=1, n_layer=12, n_embd=768, head_chunk=1024, grad_cp=True)
    cpu = Hardware("cpu", 1, 1, "fp32", "plain")
    (advice,) = suggest_settings(config, model, cpu, 6 * GIB)
    assert "--chunk_ctx" in advice
    chunk = int(advice.split("--chunk_ctx ")[1].split()[0])
    assert config.ctx_len % chunk == 0
    assert estimate(replace(config, chunk_ctx=chunk), model, cpu).total <= 6 * GIB
    lines = describe_pieces(replace(config, chunk_ctx=4096, context_parallel=4), model, 4)
    assert "32 of 4,096 tokens" in lines[0]
    assert "32,768 tokens of it each" in lines[1]


@pytest.mark.parametrize("bptt", [-1, 1])
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "projector"])
def test_pieces_with_rows_in_the_place_of_tokens(frozen, bptt):
    """Pictures over the borders of pieces, and pieces without one: gradients of model, projector and encoder."""
    model = busy_model(torch.float64, "reference")
    front_end = attach_front_end(model, MediaConfig("patches", image_size=(16, 24), encoder_dim=8)).double()
    if frozen:
        model.requires_grad_(False)
        front_end.projector.requires_grad_(True)
    tokens, targets, *packed = a_batch(True)
    for begin in (4, 22, 40):  # six places each
        tokens[0, begin : begin + 6] = PLACEHOLDER
    pictures = torch.randint(256, (3, 3, 16, 24), dtype=torch.uint8)
    batch = (tokens, targets, *packed, pictures, torch.ones(3, dtype=torch.int64))
    whole_loss, whole = loss_and_gradients(model, batch)
    loss, gradients = loss_and_gradients(model, batch, 3, bptt)
    assert loss.item() == pytest.approx(whole_loss.item(), rel=1e-12)
    assert any(name.startswith("media.projector") and g.any() for name, g in gradients.items())
    assert bptt == 1 or largest_error(gradients, whole) < 1e-9
